"""The five operations at real shapes, beside other ways to do the same and beside what the hardware allows.

    python -m benchmarks.kernels --json FILE [--only WORD ...]

Ours is the first form that runs on this device. Beside it stand XLA's form, JAX's own paged attention, cuDNN on a
contiguous cache, FlashInfer and torch, each where it can be had; why one cannot is in the file. The limit is bytes over
the bandwidth of a copy, or floating-point operations over the rate of a matrix product, both measured in the same run.
On a CPU the working sets are tiny: a check that everything runs, not a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.device_time import copy_bandwidth, matmul_flops
from benchmarks.kernel_baselines import attention_baselines
from benchmarks.kernel_calls import attention_us, copy_us, gather_us, merge_us, write_us
from benchmarks.kernel_inputs import AttentionInputs, Sizes, pages_to_move, states_to_merge
from benchmarks.report import Row, argument_parser, publish
from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape

XLA = {"implementation": "xla"}


@dataclasses.dataclass
class Bench:
    """What all cases share: how large they are, what the device can do, and what was left out and why."""

    sizes: Sizes
    bytes_a_second: float
    flops_a_second: float
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def rows(
        self, case: str, ours_us: float, others: dict[str, Callable[[], float]], num_bytes: int, flops: float = 0.0
    ) -> list[Row]:
        """A row for each baseline that can be had; one without, if none can.

        ``num_bytes`` and ``flops`` are what the case has to move and compute; its limit is the larger of both times.
        """
        limit_us = max(num_bytes / self.bytes_a_second, flops / self.flops_a_second) * 1e6
        rows, work = [], {"num_bytes": num_bytes, "flops": flops}
        for name, measure in others.items():
            try:
                rows.append(Row(case, ours_us, name, measure(), limit_us, **work))
            except Exception as error:
                self.left_out[f"{case}: {name}"] = f"{type(error).__name__}: {error}"[:300]
        return rows or [Row(case, ours_us, limit_us=limit_us, **work)]


def movement(bench: Bench, name: str, shape: AttentionShape) -> Iterator[list[Row]]:
    """Gather, copy and write of a working set's worth of pages or tokens."""
    pages, ids = pages_to_move(bench.sizes, shape)
    count, page_bytes = len(ids) // 2, pages[0].nbytes
    src, dst = ids[:count], ids[count:]
    moved = 2 * count * page_bytes
    size = f"{count} pages of {page_bytes >> 10} KiB, {name}"
    yield bench.rows(f"gather {size}", gather_us(pages, src), {"xla": lambda: gather_us(pages, src, **XLA)}, moved)
    yield bench.rows(f"copy {size}", copy_us(pages, src, dst), {"xla": lambda: copy_us(pages, src, dst, **XLA)}, moved)
    for tokens in bench.sizes.written_tokens:
        for stored, kv_dtype in ((jnp.bfloat16, None), (jnp.uint8, jnp.float8_e4m3fn)):
            given = (pages.shape, tokens, stored, kv_dtype)
            moved = tokens * shape.kv_heads * pages.shape[3] * 2 * (2 + jnp.dtype(stored).itemsize)
            case = f"write {tokens} tokens, {jnp.dtype(kv_dtype or stored)}, {name}"
            others = {"xla": lambda given=given: write_us(*given, **XLA)}
            yield bench.rows(case, write_us(*given), others, moved)


def merging(bench: Bench) -> Iterator[list[Row]]:
    """Merge of a few states of as many tokens as fill the working set."""
    for states in (2, 8):
        outs, lses = states_to_merge(bench.sizes, states)
        moved = outs.nbytes + outs.nbytes // states
        case = f"merge {states} states of {outs.shape[1]} tokens, 32 heads of 128, float32"
        others = {"xla": lambda outs=outs, lses=lses: merge_us(outs, lses, **XLA)}
        yield bench.rows(case, merge_us(outs, lses), others, moved)


def attention(bench: Bench, name: str, inputs: AttentionInputs) -> list[Row]:
    """One batch: every way there is to compute it. The limit is the larger of its two."""
    shape = SHAPES[name]
    read, flops = inputs.bytes_read(shape.sliding_window), inputs.flops(shape.sliding_window)
    plain = not (shape.sliding_window or shape.chunk_size or shape.logits_soft_cap or shape.has_sinks)
    others = {"xla": lambda: attention_us(shape, inputs, **XLA)}
    if inputs.max_query_len > 1 and jax.default_backend() == "gpu":  # a form of ours that runs only where it is named
        others["mosaic_gpu"] = lambda: attention_us(shape, inputs, implementation="mosaic_gpu")
    if plain and inputs.kv_dtype is None:
        others |= attention_baselines(inputs)
    return bench.rows(f"{inputs.what}, {name}", attention_us(shape, inputs), others, read, flops)


def all_rows(bench: Bench, only: list[str]) -> Iterator[list[Row]]:
    """Every case whose name has one of the words ``only``; all if there are none."""

    def wanted(case: str) -> bool:
        return not only or any(word in case for word in only)

    if wanted("movement"):
        for name in ("Llama-3-8B", "Gemma-3-27B"):
            yield from movement(bench, name, SHAPES[name])
    if wanted("merge"):
        yield from merging(bench)
    for name, make in bench.sizes.attention_cases():
        if wanted(f"{make.__name__} {name}"):
            yield attention(bench, name, make(SHAPES[name]))


def main() -> None:
    """Measure, print, write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="words: movement, merge, decode, prefill, a model's name")
    arguments = parser.parse_args()
    sizes = Sizes.for_platform(jax.default_backend())
    bench = Bench(sizes, copy_bandwidth(sizes.moved_bytes), matmul_flops(sizes.matmul, jnp.bfloat16))
    rows = [row for some in all_rows(bench, arguments.only) for row in some]
    limits = {"copy_bytes_a_second": bench.bytes_a_second, "matmul_flops_a_second": bench.flops_a_second}
    publish(rows, arguments.json, limits=limits, left_out=bench.left_out)


if __name__ == "__main__":
    main()
