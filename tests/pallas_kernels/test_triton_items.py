"""Where the Triton kernel starts and stops in a table with positions: at the first and last column that is seen."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.triton_items import columns_of, items_of_decode, items_of_long
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables

BLOCK_SIZE, WIDTH, GROUP, ROWS, NUM_PAGES = 8, 30, 2, 16, 50


def tables_of(rng: np.random.Generator, seqs: int) -> tuple[Tables, np.ndarray, np.ndarray]:
    """Columns in random order, some unused, some holes."""
    positions = np.stack([rng.permutation(WIDTH) for _ in range(seqs)]) * BLOCK_SIZE
    positions = np.where(rng.random(positions.shape) < 0.4, -1, positions).astype(np.int32)
    blocks = rng.integers(-10, NUM_PAGES + 5, positions.shape).astype(np.int32)
    sizes = {"step": 0, "num_pages": NUM_PAGES, "block_size": BLOCK_SIZE, "context": ContextParallel(1, 0, 1)}
    return Tables.create(jnp.asarray(blocks), jnp.asarray(positions), **sizes), blocks, positions


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_columns_of_every_tile(causal: bool, window: int | None) -> None:
    rng = np.random.default_rng(0)
    query_lens, kv_lens = np.array([70, 1, 0, 33, 40]), np.array([90, 5, 0, 240, 40], np.int32)
    tables, blocks, positions = tables_of(rng, len(kv_lens))
    loc = jnp.asarray(np.append(0, np.cumsum(query_lens)).astype(np.int32))
    sequences = Sequences.create(loc, jnp.asarray(kv_lens), int(loc[-1]))
    for items in (
        items_of_long(sequences, int(loc[-1]), more_than=0, group=GROUP, rows=ROWS),
        items_of_decode(jnp.asarray(kv_lens)),
    ):
        visibility = Visibility(causal, None if window is None else jnp.int32(window), None)
        got = np.asarray(columns_of(items, tables, visibility, group=GROUP, rows=ROWS))
        assert any(got[:, 1] > got[:, 0])
        for (sequence, first_row, _, queries, kv_len), (first, last) in zip(np.asarray(items), got, strict=True):
            seen = np.zeros(WIDTH * BLOCK_SIZE, bool)
            for row in range(first_row, min(first_row + ROWS, queries * GROUP)):
                position = kv_len - queries + row // GROUP
                start = 0 if window is None else max(position - window + 1, 0)
                seen[start : max(min(kv_len, position + 1) if causal else kv_len, 0)] |= position >= 0
            of_column = [
                0 <= block < NUM_PAGES and at >= 0 and seen[at : at + BLOCK_SIZE].any()
                for block, at in zip(blocks[sequence], positions[sequence], strict=True)
            ]
            if queries and any(of_column):
                assert (first, last) == (min(np.flatnonzero(of_column)), max(np.flatnonzero(of_column)) + 1)
            elif queries:
                assert first >= last
