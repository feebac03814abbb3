"""Attention on TPUs: what ``mosaic_tpu_kernel`` needs, worked out by XLA, and two calls of it.

The design is that of Ragged Paged Attention (arXiv 2604.15464): ragged queries, pages fetched by DMA through the
block table two steps deep, an online softmax. Ours differs in that work is listed beforehand, an item per tile of
queries of one sequence with just the columns it needs, single queries (decode) apart from long ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import (
    LANES,
    compiler_params,
    require_arithmetic,
    require_scalars,
    require_tiles,
)
from pallas_kernels.number_format import per_head
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.mosaic_tpu_kernel import attend
from pallas_kernels.paged_attention.mosaic_tpu_memory import (
    TABLE_BUFFERS,
    Arrays,
    Outputs,
    Plan,
    Scalars,
    Scratch,
    Semaphores,
)
from pallas_kernels.paged_attention.mosaic_tpu_parameters import Parameters, choose_parameters
from pallas_kernels.paged_attention.reference import report_lengths
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Item, Items, Sequences, Tables
from pallas_kernels.tpu import Tpu, target_tpu
from pallas_kernels.tuning import next_power_of_2

SMALL_TILE = 8
_STATIC = ("causal", "kv_dtype", "v_head_dim", "return_lse", "max_query_len", "max_kv_len", "tpu", "chosen")


def paged_attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, block_tables: jax.Array, kv_lens: jax.Array, **options: Any
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention through a block table; see the public function."""
    tpu = target_tpu()
    require_tiles(k_pages, v_pages, tpu=tpu)
    require_arithmetic(q.dtype, options["kv_dtype"])
    chosen = choose_parameters(tpu, q, k_pages, v_pages, options["kv_dtype"])
    return _attention(q, k_pages, v_pages, block_tables, kv_lens, **options, tpu=tpu, chosen=chosen)


@partial(jax.jit, static_argnames=_STATIC)
def _attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array | None,
    *,
    causal: bool,
    sliding_window: Any,
    chunk_size: Any,
    block_positions: jax.Array | None,
    context_parallel: ContextParallel,
    scale: Any,
    logits_soft_cap: Any,
    sinks: jax.Array | None,
    k_scale: Any,
    v_scale: Any,
    kv_dtype: jnp.dtype,
    v_head_dim: int,
    return_lse: bool,
    max_query_len: int | None,
    max_kv_len: int | None,
    tpu: Tpu,
    chosen: Parameters,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    num_pages, kv_heads, block_size, _ = k_pages.shape
    tokens, q_heads, head_dim = q.shape
    visibility = Visibility(causal, sliding_window, chunk_size)
    report_out_of_range("block_tables", block_tables, num_pages)
    report_lengths(kv_lens, query_start_loc, tokens)
    visibility.report()
    tables = Tables.create(
        block_tables, block_positions, step=0, num_pages=num_pages, block_size=block_size, context=context_parallel
    )
    tables.report(kv_lens)
    outputs = Outputs(
        jnp.zeros((tokens, q_heads, v_head_dim), q.dtype),
        jnp.full((tokens, q_heads, LANES), -jnp.inf, jnp.float32) if return_lse else None,
    )
    sequences = Sequences.create(query_start_loc, kv_lens, tokens)
    longest = 1 if query_start_loc is None else min(max_query_len or tokens, tokens)

    def plan(tile: int, pages: int) -> Plan:
        return Plan(
            kv_heads=kv_heads,
            group=q_heads // kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            block_size=block_size,
            tile=tile,
            step=max(min(pages, tables.width), 1),
            compute=jnp.float32 if jnp.float32 in (q.dtype, kv_dtype) else jnp.bfloat16,
            kv_dtype=kv_dtype,
            causal=causal,
            context_size=context_parallel.size,
            interleave=context_parallel.interleave,
        )

    def scalars(items: Items, most: int) -> Scalars:
        each = jax.vmap(items.get)(jnp.arange(most, dtype=jnp.int32))
        return Scalars(
            num_items=jnp.minimum(items.total, most).reshape(1),
            items=each,
            columns=_needed_columns(tables, visibility, each),
            sliding_window=_integer(sliding_window),
            chunk_size=_integer(chunk_size),
            rank=jnp.asarray(context_parallel.rank, jnp.int32).reshape(1),
            logits_scale=jnp.broadcast_to(scale * (1.0 if k_scale is None else per_head(k_scale)), kv_heads),
            v_scale=jnp.broadcast_to(1.0 if v_scale is None else per_head(v_scale), kv_heads),
            logits_soft_cap=None if logits_soft_cap is None else jnp.asarray(logits_soft_cap, jnp.float32).reshape(1),
        )

    if tokens > 0 and kv_lens.size > 0:
        for items, most, pages in _lists(sequences, tokens, longest, chosen):
            each = plan(items.tile, pages)
            blocks = each.whole_pieces(block_tables)
            positions = None if block_positions is None else each.whole_pieces(block_positions)
            arrays = Arrays(q, k_pages, v_pages, blocks, positions, _sink_rows(sinks, each))
            outputs = _call(each, scalars(items, most), arrays, outputs, tpu)
    return (outputs.out, outputs.lse[..., 0]) if return_lse else outputs.out


def _lists(sequences: Sequences, tokens: int, longest: int, chosen: Parameters) -> list[tuple[Items, int, int]]:
    """Lists of items, how many each can hold at most, and pages of a step. Single queries do not pay for a tile."""
    num_seqs = sequences.kv_len.size
    tile = min(chosen.prefill_queries, next_power_of_2(longest))

    def most(fewest: int) -> int:
        return min(tokens, tokens // tile + min(num_seqs, tokens // fewest))

    if longest <= SMALL_TILE:
        return [(sequences.items(tile, fewest=1), most(1), chosen.decode_pages)]
    singles = sequences.items(1, fewest=1, most=1)
    others = sequences.items(tile, fewest=2)
    return [(singles, min(num_seqs, tokens), chosen.decode_pages), (others, most(2), chosen.prefill_pages)]


def _needed_columns(tables: Tables, visibility: Visibility, items: Item) -> tuple[jax.Array, jax.Array]:
    """First and one past the last column of the table that some query of each item needs."""
    start, _ = visibility.interval(items.position, items.kv_len)
    last_query = items.position + jnp.maximum(items.num_rows - 1, 0)
    _, end = visibility.interval(last_query, items.kv_len)
    return jax.vmap(tables.needed_columns)(items.sequence, start, end)


def _sink_rows(sinks: jax.Array | None, plan: Plan) -> jax.Array | None:
    """f32[kv_heads, rows, 1]: the sink of every row's query head."""
    if sinks is None:
        return None
    by_head = jnp.tile(sinks.astype(jnp.float32).reshape(plan.kv_heads, plan.group), (1, plan.tile))
    return jnp.pad(by_head, ((0, 0), (0, plan.rows - by_head.shape[1])))[..., None]


def _integer(value: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(value, jnp.int32).reshape(1)


def _call(plan: Plan, scalars: Scalars, arrays: Arrays, outputs: Outputs, tpu: Tpu) -> Outputs:
    """``outputs`` with the rows of all items filled in."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    array_specs = jax.tree.map(lambda _: anywhere, arrays)
    if arrays.sinks is not None:
        array_specs = array_specs._replace(sinks=pl.BlockSpec(memory_space=pltpu.VMEM))
    output_specs = jax.tree.map(lambda _: anywhere, outputs)
    before = len(jax.tree.leaves((scalars, arrays)))
    require_scalars(sum(each.size for each in jax.tree.leaves(scalars)))
    (filled,) = pl.pallas_call(
        partial(attend, plan),
        out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1 if tpu.interpret is not False else pltpu.get_tpu_info().num_cores,),
            in_specs=(array_specs, output_specs),
            out_specs=(output_specs,),
            scratch_shapes=[_scratch(plan, arrays, outputs)],
        ),
        input_output_aliases={before + i: i for i in range(len(jax.tree.leaves(outputs)))},
        compiler_params=compiler_params("parallel"),
        interpret=tpu.interpret,
        name="paged_attention",
    )(scalars, arrays, outputs)
    return filled


def _scratch(plan: Plan, arrays: Arrays, outputs: Outputs) -> Scratch:
    def pages(of: jax.Array) -> Any:
        return pltpu.VMEM((2, plan.step, *of.shape[1:]), of.dtype)

    def pieces(of: jax.Array | None) -> Any:
        return None if of is None else pltpu.SMEM((TABLE_BUFFERS, plan.piece), jnp.int32)

    return Scratch(
        q=pltpu.VMEM((2, plan.tile, *arrays.q.shape[1:]), arrays.q.dtype),
        rows=pltpu.VMEM((plan.kv_heads, plan.rows, plan.head_dim), plan.compute),
        k=pages(arrays.k_pages),
        v=pages(arrays.v_pages),
        highest=pltpu.VMEM((plan.kv_heads, plan.rows, 1), jnp.float32),
        total=pltpu.VMEM((plan.kv_heads, plan.rows, 1), jnp.float32),
        values=pltpu.VMEM((plan.kv_heads, plan.rows, plan.v_head_dim), jnp.float32),
        results=jax.tree.map(lambda x: pltpu.VMEM((plan.tile, *x.shape[1:]), x.dtype), outputs),
        keys_across=pltpu.VMEM((1, plan.keys), jnp.int32),
        keys_down=pltpu.VMEM((plan.step, plan.block_size, 1), jnp.int32),
        blocks=pieces(arrays.blocks),
        positions=pieces(arrays.positions),
        fetched=pltpu.SMEM((2,), jnp.int32),
        semaphores=Semaphores(*(pltpu.SemaphoreType.DMA((n,)) for n in (2, 2, 1, TABLE_BUFFERS))),
    )
