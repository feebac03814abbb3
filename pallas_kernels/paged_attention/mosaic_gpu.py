"""Attention on Hopper: sequences with many queries by ``mosaic_gpu_kernel``, those with few by the Triton kernel.

Where a batch has few queries a sequence throughout (decode), there is nothing for this form to do, and it says so. It
runs where it is asked for by name: no Hopper has run it yet, and of what interpreters and compilers cannot see, that is
the only test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import WARPGROUP_ROWS, matrix_memory, plgpu, target_hopper
from pallas_kernels.nvidia import Gpu
from pallas_kernels.paged_attention import triton
from pallas_kernels.paged_attention.mosaic_gpu_kernel import CONSUMERS, Fetched, Inputs, Kernel, Memory
from pallas_kernels.paged_attention.mosaic_gpu_tiles import ALIGNED, Tile, tiles_of_long
from pallas_kernels.paged_attention.triton_parameters import Parameters, choose_parameters
from pallas_kernels.paged_attention.work_items import Sequences
from pallas_kernels.tuning import parameters

HEAD_DIMS = (64, 128)
_MOST_TILES = 2**16 - 1  # of the second axis of a grid, in CUDA
_TWO_BYTES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


@dataclasses.dataclass(frozen=True)
class Steps:
    """How the keys are taken: how many at a time, how many times that are in memory, and ``Kernel.take_turns``."""

    prefill_keys: int
    prefill_stages: int
    take_turns: int


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    v_head_dim: int,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention through a block table; see the public function."""
    gpu, interpret = target_hopper()
    tokens, q_heads, _ = q.shape
    longest = 1 if query_start_loc is None else min(options["max_query_len"] or tokens, tokens)
    if longest * (q_heads // k_pages.shape[1]) <= triton.FEW_ROWS:
        raise NotImplementedError(f"{longest} queries a sequence at most: decode is what the Triton form does")
    if options["kv_dtype"] != q.dtype:
        raise NotImplementedError(f"q of {q.dtype} and pages of {options['kv_dtype']}: wgmma wants one dtype of both")
    if interpret is None:
        _require_hardware(q, k_pages, v_pages, v_head_dim)
    chosen = _choose_steps(gpu, q, k_pages, v_head_dim)
    _require_steps(chosen, k_pages, interpret)
    form = LongByMosaic(chosen, interpret)
    few = choose_parameters(gpu, q, k_pages, options["kv_dtype"])
    return triton.attend(
        q, k_pages, v_pages, block_tables, kv_lens, query_start_loc,
        v_head_dim=v_head_dim, gpu=gpu, chosen=few, long=form, **options,
    )  # fmt: skip


def _require_hardware(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, v_head_dim: int) -> None:
    """Tiles of wgmma and boxes of TMA fit; the interpreter has neither, and takes any."""
    for name, size in (("head_dim", q.shape[2]), ("v_head_dim", v_head_dim)):
        if size not in HEAD_DIMS:
            raise NotImplementedError(f"{name} {size}: this kernel's tiles are of {HEAD_DIMS}")
    if q.dtype not in _TWO_BYTES:
        raise NotImplementedError(f"{q.dtype}: this kernel's products are of bfloat16 or float16")
    if k_pages.shape[2] < 8:
        raise NotImplementedError(f"block_size {k_pages.shape[2]}: shared memory is swizzled in rows of 8")
    for pages in (k_pages, v_pages):
        if pages.shape[3] % 64:
            raise NotImplementedError(f"pages {pages.shape}: TMA takes rows of them in pieces of 64 numbers")
        if pages.size // pages.shape[3] >= 2**31:
            raise NotImplementedError(f"pages {pages.shape}: TMA counts rows of tokens in 31 bits")


def _require_steps(chosen: Steps, k_pages: jax.Array, interpret: Any) -> None:
    block_size = k_pages.shape[2]
    keys = chosen.prefill_keys
    if keys % 128 and interpret is None:
        raise NotImplementedError(f"{keys} keys a step: the producer's 128 threads take as many positions each")
    if keys % block_size and block_size % keys:
        raise NotImplementedError(f"block_size {block_size} neither divides nor is divided by {keys} keys a step")


def _choose_steps(gpu: Gpu, q: jax.Array, k_pages: jax.Array, v_head_dim: int) -> Steps:
    """From the tuning table, or 128 keys at a time, as often as fit beside the queries and the output."""
    group, head_dim = q.shape[1] // k_pages.shape[1], q.shape[2]
    shape = {"group": group, "head_dim": head_dim, "block_size": k_pages.shape[2]}
    rule = {"prefill_keys": 128, "prefill_stages": 2 if max(head_dim, v_head_dim) > 64 else 4, "take_turns": 1}
    partner = [field.name for field in dataclasses.fields(Parameters)]
    return Steps(**parameters("paged_attention", "mosaic_gpu", gpu.kind, shape, rule, partner))


@dataclasses.dataclass(frozen=True)
class LongByMosaic:
    """What serves the sequences with many queries, in place of Triton's kernel.

    Attributes:
        steps: see ``Steps``.
        interpret: what to pass to ``plgpu.kernel``.
    """

    steps: Steps
    interpret: Any

    def __call__(self, of: triton.Attention, sequences: Sequences, few: int) -> tuple[jax.Array, jax.Array]:
        """(out [tokens, q_heads, v_head_dim], lse); rows of sequences of at most ``few`` queries are anything."""
        given, static = of.given, of.static
        _, kv_heads, block_size, _ = given.k_pages.shape
        kernel = Kernel(
            keys=self.steps.prefill_keys,
            stages=self.steps.prefill_stages,
            take_turns=bool(self.steps.take_turns),
            paired_heads=static["group"] % CONSUMERS == 0,
            group=static["group"],
            block_size=block_size,
            kv_heads=kv_heads,
            head_dim=given.q.shape[2],
            v_head_dim=static["v_head_dim"],
            causal=static["causal"],
            context_size=static["context_size"],
            context_interleave=static["context_interleave"],
            interpret=self.interpret is not None,
        )
        tables = of.tables(step=kernel.pages)
        tiles = tiles_of_long(
            sequences, tables, of.visibility, of.tokens, more_than=few, queries=kernel.queries_a_tile, keys=kernel.keys
        )
        if len(tiles.sequence) > _MOST_TILES:
            raise NotImplementedError(f"{len(tiles.sequence)} tiles of queries at most, and a grid has {_MOST_TILES}")
        spare = _whole_rows(of.tokens) - of.tokens
        inputs = Inputs(
            q=jnp.pad(given.q, ((0, spare), (0, 0), (0, 0))),
            k_rows=given.k_pages.reshape(-1, given.k_pages.shape[3]),
            v_rows=given.v_pages.reshape(-1, given.v_pages.shape[3]),
            blocks=tables.blocks,
            positions=tables.positions,
            tiles=jnp.stack(tiles, axis=1),
            factors=given.factors,
            cap=given.cap,
            sinks=given.sinks,
            sliding_window=given.sliding_window,
            chunk_size=given.chunk_size,
            rank=given.rank,
        )
        out, lse = _launch(kernel, inputs, self.interpret)
        return out[: of.tokens], _by_token(lse, tiles, of.tokens)


def _whole_rows(tokens: int) -> int:
    """Rows of q that TMA can move: whole groups, and enough for one consumer."""
    return max(-(-tokens // ALIGNED) * ALIGNED, WARPGROUP_ROWS)


def _by_token(lse: jax.Array, tiles: Tile, tokens: int) -> jax.Array:
    """f32[tokens, q_heads] of f32[tiles, q_heads, queries]. A consumer's rows are 64 tokens, and end with the last."""
    row = jnp.arange(lse.shape[2], dtype=jnp.int32)
    first = tiles.row[:, None] + row // WARPGROUP_ROWS * WARPGROUP_ROWS
    token = jnp.minimum(first, _whole_rows(tokens) - WARPGROUP_ROWS) + row % WARPGROUP_ROWS
    mine = (token >= jnp.maximum(first, tiles.token[:, None])) & (token < (tiles.token + tiles.num_queries)[:, None])
    rows = jnp.moveaxis(lse, 1, 2).reshape(-1, lse.shape[1])
    token = jnp.where(mine, token, tokens).reshape(-1)
    return jnp.full((tokens, lse.shape[1]), -jnp.inf).at[token].set(rows, mode="drop")


def _launch(kernel: Kernel, inputs: Inputs, interpret: Any) -> tuple[jax.Array, jax.Array]:
    tokens, q_heads, _ = inputs.q.shape
    tiles = inputs.tiles.shape[0]
    leaves, tree = jax.tree.flatten(inputs)
    memory, layout = jax.tree.flatten(_memory(kernel, inputs))

    def paged_attention_prefill(*refs: Any) -> None:
        out, lse, *scratch = refs[len(leaves) :]
        kernel(jax.tree.unflatten(tree, refs[: len(leaves)]), out, lse, jax.tree.unflatten(layout, scratch))

    return plgpu.kernel(
        paged_attention_prefill,
        out_type=(
            jax.ShapeDtypeStruct((tokens, q_heads, kernel.v_head_dim), inputs.q.dtype),
            jax.ShapeDtypeStruct((tiles, q_heads, kernel.queries_a_tile), jnp.float32),
        ),
        scratch_types=tuple(memory),
        grid=(tiles, q_heads // kernel.heads_a_tile),  # heads of one KV head one after another: they share its pages
        grid_names=("tile", "heads"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # we name layouts; the other kind finds them itself
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )(*leaves)


def _memory(kernel: Kernel, inputs: Inputs) -> Memory:
    """The shared memory of a program, as types."""
    interpret, keys, stages = kernel.interpret, kernel.keys, kernel.stages

    def fetched(rows: jax.Array, head_dim: int) -> Fetched:
        return Fetched(
            rows=matrix_memory((stages, keys, head_dim), rows.dtype, interpret),
            positions=plgpu.SMEM((stages, keys), jnp.int32),
            ready=plgpu.Barrier(num_arrivals=kernel.pages + 1, num_barriers=stages),  # of the pages, and the positions
            used=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        )

    rows = (CONSUMERS, WARPGROUP_ROWS)
    return Memory(
        q=matrix_memory((*rows, kernel.head_dim), inputs.q.dtype, interpret),
        q_ready=plgpu.Barrier(num_barriers=CONSUMERS),
        k=fetched(inputs.k_rows, kernel.head_dim),
        v=fetched(inputs.v_rows, kernel.v_head_dim),
        # Plain rows, so that they can be stored singly; 16 bytes apart, so that eight of them are in different banks.
        out=plgpu.SMEM((*rows, kernel.v_head_dim + 16 // inputs.q.dtype.itemsize), inputs.q.dtype),
        lse=plgpu.SMEM(rows, jnp.float32),
        cleaned=plgpu.Barrier(num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
