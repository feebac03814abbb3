"""Tables, slot mappings and block sizes over one traffic: bytes, lookup times, attention times.

    python -m benchmarks.tables --json FILE

The traffic: prompts and answers log-normal with medians 512 and 256 and sigma 1.0, both together cut at 131,072 tokens;
4,096 requests, each seen at a random moment of its answer; K and V as in Llama-3-8B (bfloat16, 131,072 bytes a token).

- Tables: a dense one of 4,096 rows of 8,192 columns against a sparse one with room for the blocks in use and an eighth
  more. Lookup: the slots of 256 tokens, and the dense view of 256 rows that attention reads.
- Slot mappings: of every prompt, its blocks of 16 scattered: words of the compressed mapping against int32 slots.
- ``BlockTableV2``: one more block for a request.
- Block sizes: see ``benchmarks.block_sizes``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import block_sizes, traffic
from benchmarks.report import Row, argument_parser, medians_us, publish
from pyagent_kv_jax import BlockTable, BlockTableConfig, BlockTableFactory, SlotMapping, SparseBlockTable
from pyagent_kv_jax.tables import append_rows, slots_of

ROWS, BATCH, BLOCK_SIZE, SEED = 4_096, 256, 16, 0
IN_A_SCAN = 1_000


def filled(lengths: np.ndarray) -> tuple[BlockTable, SparseBlockTable]:
    """Rows of these tokens, the same scattered blocks in both tables."""
    config = BlockTableConfig(BLOCK_SIZE, len(lengths), traffic.LONGEST // BLOCK_SIZE)
    counts = -(-lengths // BLOCK_SIZE)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ids = np.random.default_rng(SEED).permutation(offsets[-1]).astype(np.int32)
    tables = []
    for empty in (BlockTable.create(config), SparseBlockTable.create(config, num_blocks=int(offsets[-1] * 9 // 8))):
        table, ok = jax.jit(append_rows)(empty, ids, offsets, lengths.astype(np.int32))
        assert bool(ok.all())
        tables.append(table)
    dense, sparse = tables
    return dense, sparse


def mapping_bytes(prompts: np.ndarray) -> tuple[int, int]:
    """Bytes of the compressed mappings of all prompts, and of their int32 slots."""
    rng, compressed = np.random.default_rng(SEED), 0
    for length in prompts.tolist():
        blocks = rng.choice(2**20, -(-length // BLOCK_SIZE), replace=False)
        slots = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()[:length].astype(np.int32)
        # Few shapes to compile; -1s at the end take no words.
        slots = np.pad(slots, (0, -length % 1024), constant_values=-1)
        mapping, _ = SlotMapping(slots).compress(BLOCK_SIZE)
        compressed += 4 * int(mapping.num_words)
    return compressed, 4 * int(prompts.sum())


def lookups(dense: BlockTable, sparse: SparseBlockTable, lengths: np.ndarray) -> Iterator[Row]:
    """Sparse beside dense: the next slots of a batch, and its rows as attention reads them."""
    rng = np.random.default_rng(SEED)
    rows = jnp.asarray(rng.choice(len(lengths), BATCH, replace=False), jnp.int32)
    positions = jnp.asarray(lengths, jnp.int32)[rows] - 1
    columns = int(lengths[np.asarray(rows)].max()) // BLOCK_SIZE + 1
    slots, view = jax.jit(slots_of), jax.jit(lambda table: table.to_dense_rows(rows, columns))

    @jax.jit
    def many(table: Any) -> jax.Array:
        return jax.lax.scan(lambda at, _: (at ^ 1, slots_of(table, rows, at)), positions, None, IN_A_SCAN)[1]

    np.testing.assert_array_equal(slots(dense, rows, positions), slots(sparse, rows, positions))
    np.testing.assert_array_equal(view(dense), view(sparse))
    calls: dict[str, tuple[Any, int, int]] = {
        f"slots of {BATCH} tokens, one call": (lambda table: slots(table, rows, positions), 1, 301),
        f"slots of {BATCH} tokens, inside a scan": (many, IN_A_SCAN, 15),
        f"view of {BATCH} rows, {columns} columns": (view, 1, 101),
    }
    for case, (call, number, repeats) in calls.items():
        both = {"sparse": partial(call, sparse), "dense": partial(call, dense)}
        times = medians_us(both, repeats=repeats, warmup=3)
        yield Row(f"{case}, sparse", times["sparse"] / number, "dense", times["dense"] / number)


def facade() -> Iterator[Row]:
    """``BlockTableV2``: one more block for a request, in turns; sparse and predicting beside neither."""
    times = {}
    for use_sparse, use_prediction in ((True, True), (False, False)):
        table = BlockTableFactory.create_v2(BLOCK_SIZE, use_sparse, use_prediction, prediction_horizon=256)
        for row in range(BATCH):
            table.allocate_for_request(f"r{row}", row, 32)
        taken = []
        for _ in range(32):
            for row in range(BATCH):
                began = time.perf_counter()
                table.allocate_for_request(f"r{row}", row, 1)
                taken.append((time.perf_counter() - began) * 1e6)
        times[use_sparse] = statistics.mean(taken[4 * BATCH :])  # what compiles comes first
    case = f"BlockTableV2: a block for one of {BATCH} requests, sparse, predicting"
    yield Row(case, times[True], "dense, not predicting", times[False])


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    args: Any = argument_parser(__doc__).parse_args(argv)
    flow = traffic.lengths(ROWS, SEED)
    lengths = flow.in_flight(SEED)
    dense, sparse = filled(lengths)
    compressed, plain = mapping_bytes(flow.prompts)
    bytes_of = {
        "dense_table": dense.nbytes,
        "sparse_table": sparse.nbytes,
        "dense_by_sparse": round(dense.nbytes / sparse.nbytes, 1),
        "blocks_in_use": int(-(-lengths // BLOCK_SIZE).sum()),
        "compressed_slot_mappings": compressed,
        "int32_slots": plain,
        "slots_by_compressed": round(plain / compressed, 1),
    }
    for name, value in bytes_of.items():
        print(f"{name.replace('_', ' ')}: {value:,}")
    rows = [*lookups(dense, sparse, lengths), *facade()]
    sizes = block_sizes.compare(lengths)
    print(block_sizes.table(sizes))
    publish(rows, args.json, bytes=bytes_of, block_sizes=[size.as_dict() for size in sizes])


if __name__ == "__main__":
    main()
