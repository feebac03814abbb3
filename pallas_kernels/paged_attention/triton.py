"""Attention in Triton: decode split over the keys and merged by LSE, prefill in tiles of rows; one kernel for both.

Sequences with few queries (decode) are one tile each, and where those do not fill the GPU, the keys of each are dealt
to several programs. Sequences with many queries (prefill) are several tiles, each reading what it sees. A mixed batch
is served by both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.merge_attention_states.triton import merge_states
from pallas_kernels.number_format import per_head
from pallas_kernels.nvidia import Gpu, target_gpu
from pallas_kernels.page_ids import report_out_of_range
from pallas_kernels.paged_attention.context_parallel import ContextParallel
from pallas_kernels.paged_attention.reference import report_lengths
from pallas_kernels.paged_attention.triton_items import columns_of, items_of_decode, items_of_long, items_of_short
from pallas_kernels.paged_attention.triton_kernel import LOG2_E, Kernel, Operands
from pallas_kernels.paged_attention.triton_parameters import Parameters, TileMemory, choose_parameters
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables, report_room
from pallas_kernels.triton_numbers import multiplied, viewed
from pallas_kernels.tuning import next_power_of_2

# Rows of a tile up to which a batch counts as decode throughout (speculative decoding checks a few tokens at once).
FEW_ROWS = 64


def paged_attention(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *args: Any, v_head_dim: int, **kwargs: Any
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention through a block table; see the public function."""
    gpu = target_gpu()
    for name, size in (("head_dim", q.shape[2]), ("v_head_dim", v_head_dim)):
        if size % 16 or size > 512:
            raise NotImplementedError(f"{name} {size}: tiles are made of multiples of 16 up to 512")
    chosen = choose_parameters(gpu, q, k_pages, kwargs["kv_dtype"])
    return attend(q, k_pages, v_pages, *args, v_head_dim=v_head_dim, gpu=gpu, chosen=chosen, **kwargs)


@partial(
    jax.jit,
    static_argnames=(
        "causal", "kv_dtype", "v_head_dim", "return_lse", "max_query_len", "max_kv_len", "gpu", "chosen", "long"
    ),
)  # fmt: skip
def attend(
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
    gpu: Gpu,
    chosen: Parameters,
    long: Callable[[Attention, Sequences, int], tuple[jax.Array, jax.Array]] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``paged_attention`` on ``gpu``; ``long`` does what ``Attention.of_long`` does, in its place."""
    tokens, q_heads, _ = q.shape
    kv_heads = k_pages.shape[1]
    report_out_of_range("block_tables", block_tables, k_pages.shape[0])
    report_lengths(kv_lens, query_start_loc, tokens)
    if block_positions is None:
        report_room(kv_lens, block_tables.shape[1], k_pages.shape[2], context_parallel)
    Visibility(causal, sliding_window, chunk_size).report()
    if not tokens or not block_tables.shape[0]:
        out, lse = jnp.zeros((tokens, q_heads, v_head_dim), q.dtype), jnp.full((tokens, q_heads), -jnp.inf)
        return (out, lse) if return_lse else out
    attention = Attention(
        given=Operands(
            q=q,
            k_pages=viewed(k_pages, kv_dtype, gpu),
            v_pages=viewed(v_pages, kv_dtype, gpu),
            block_tables=block_tables,
            block_positions=block_positions,
            kv_lens=kv_lens,
            items=None,
            columns=None,
            factors=_factors(scale, k_scale, v_scale, logits_soft_cap, kv_heads),
            cap=_one(logits_soft_cap, jnp.float32),
            sinks=None if sinks is None else sinks.astype(jnp.float32) * LOG2_E,
            sliding_window=_one(sliding_window, jnp.int32),
            chunk_size=_one(chunk_size, jnp.int32),
            rank=_one(context_parallel.rank, jnp.int32) if context_parallel.size > 1 else None,
        ),
        static={
            "group": q_heads // kv_heads,
            "v_head_dim": v_head_dim,
            "causal": causal,
            "context_size": context_parallel.size,
            "context_interleave": context_parallel.interleave,
            "kv_dtype": kv_dtype,
            "gpu": gpu,
        },
        gpu=gpu,
        chosen=chosen,
        max_kv_len=max_kv_len,
        long=long or Attention.of_long,
    )
    longest = 1 if query_start_loc is None else min(max_query_len or tokens, tokens)
    if query_start_loc is None:
        out, lse = attention.of_short(None, 1)
        out, lse = out.reshape(tokens, q_heads, v_head_dim), lse.reshape(tokens, q_heads)
    else:
        out, lse = attention.of_batch(Sequences.create(query_start_loc, kv_lens, tokens), longest)
    return (out, lse) if return_lse else out


def _factors(scale: Any, k_scale: Any, v_scale: Any, cap: Any, kv_heads: int) -> jax.Array:
    """f32[2, kv_heads], of the logits (in base 2, unless a soft cap comes between) and of the output."""
    of_logits = jnp.asarray(scale, jnp.float32) * (1.0 if cap is not None else LOG2_E)
    if k_scale is not None:
        of_logits = of_logits * per_head(k_scale)
    of_output = jnp.float32(1) if v_scale is None else per_head(v_scale)
    return jnp.stack([jnp.broadcast_to(x, kv_heads) for x in (of_logits, of_output)])


def _one(value: Any, dtype: Any) -> jax.Array | None:
    return None if value is None else jnp.asarray(value, dtype).reshape(1)


class Attention:
    """One call: what it reads, what is static, and how it is cut into programs."""

    def __init__(
        self,
        *,
        given: Operands,
        static: dict[str, Any],
        gpu: Gpu,
        chosen: Parameters,
        max_kv_len: int | None,
        long: Callable[[Attention, Sequences, int], tuple[jax.Array, jax.Array]],
    ) -> None:
        self.given, self.static, self.gpu, self.chosen, self.long = given, static, gpu, chosen, long
        self.tokens, self.q_heads, _ = given.q.shape
        _, self.kv_heads, block_size, _ = given.k_pages.shape
        held = given.block_tables.shape[1] * block_size
        self.longest_context = min(held, max_kv_len or held)
        kv_dtype = static["kv_dtype"]
        dot_itemsize = multiplied(given.q.dtype, kv_dtype).itemsize
        self.memory = TileMemory(gpu, given.q.shape[2], static["v_head_dim"], dot_itemsize, kv_dtype.itemsize)

    def of_batch(self, sequences: Sequences, longest: int) -> tuple[jax.Array, jax.Array]:
        """(out [tokens, q_heads, v_head_dim], lse) of a ragged batch."""
        group = self.static["group"]
        few = longest if longest * group <= FEW_ROWS else 1
        if few == longest:
            out = jnp.zeros((self.tokens, self.q_heads, self.static["v_head_dim"]), self.given.q.dtype)
            lse = jnp.full((self.tokens, self.q_heads), -jnp.inf, jnp.float32)
        else:
            out, lse = self.long(self, sequences, few)
        short_out, short_lse = self.of_short(items_of_short(sequences, few), few)
        index = jnp.arange(few, dtype=jnp.int32)
        is_short = sequences.query_len <= few
        mine = is_short[:, None] & (index < sequences.query_len[:, None])
        token = jnp.where(mine, sequences.start[:, None] + index, self.tokens)
        return _scatter(out, token, short_out, group), _scatter(lse, token, short_lse, group)

    def of_short(self, items: jax.Array | None, few: int) -> tuple[jax.Array, jax.Array]:
        """(out [seqs, kv_heads, few * group, v_head_dim], lse) of sequences of at most ``few`` queries each."""
        seqs, num_rows = self.given.block_tables.shape[0], few * self.static["group"]
        splits = self.chosen.splits(self.gpu, seqs * self.kv_heads, self.longest_context)
        rows = max(next_power_of_2(num_rows), 16)
        rows, keys = self.memory.fit(rows, self.chosen.decode_keys, fewest_rows=rows)
        kernel = Kernel(
            rows=rows,
            keys=keys,
            splits=splits,
            fewest_steps=max(self.chosen.fewest_keys // keys, 1),
            one_position=few == 1,
            by_item=True,
            **self.static,
        )
        given = self.given._replace(items=items, columns=self.columns(items, kernel.rows))
        shape = (seqs, self.kv_heads, num_rows)
        dtype = given.q.dtype if splits == 1 else jnp.float32
        out, lse = self.launch(
            kernel,
            given,
            shape if splits == 1 else (splits, *shape),
            dtype,
            (seqs, self.kv_heads, splits),
            num_warps=self.chosen.decode_warps,
            num_stages=self.chosen.decode_stages,
            name="paged_attention_decode",
        )
        if items is not None:
            # Sequences that are no item were not written; their rows are dropped, but merging them must be safe.
            idle = (items[:, 3] == 0)[:, None, None]
            lse = jnp.where(idle, -jnp.inf, lse)
        return (out, lse) if splits == 1 else merge_states(out, lse, given.q.dtype, self.gpu, keep_nan=True)

    def of_long(self, sequences: Sequences, few: int) -> tuple[jax.Array, jax.Array]:
        """(out [tokens, q_heads, v_head_dim], lse); rows of sequences of at most ``few`` queries are not written."""
        group = self.static["group"]
        rows = min(self.chosen.prefill_rows, max(next_power_of_2(self.tokens * group), 16))
        rows, keys = self.memory.fit(rows, self.chosen.prefill_keys, fewest_rows=16)
        items = items_of_long(sequences, self.tokens, more_than=few, group=group, rows=rows)
        kernel = Kernel(
            rows=rows,
            keys=keys,
            splits=1,
            fewest_steps=1,
            one_position=False,
            by_item=False,
            **self.static,
        )
        return self.launch(
            kernel,
            self.given._replace(items=items, columns=self.columns(items, rows)),
            (self.tokens, self.q_heads),
            self.given.q.dtype,
            (items.shape[0], self.kv_heads, 1),
            num_warps=self.chosen.prefill_warps,
            num_stages=self.chosen.prefill_stages,
            name="paged_attention_prefill",
        )

    def columns(self, items: jax.Array | None, rows: int) -> jax.Array | None:
        """Which columns of a table with positions each item sees; without, the kernel knows by itself."""
        if self.given.block_positions is None:
            return None
        items = items_of_decode(self.given.kv_lens) if items is None else items
        return columns_of(items, self.tables(0), self.visibility, group=self.static["group"], rows=rows)

    def tables(self, step: int) -> Tables:
        """The block tables as XLA walks them, with ``step`` spare columns."""
        given, static = self.given, self.static
        rank = 0 if given.rank is None else given.rank[0]
        return Tables.create(
            given.block_tables,
            given.block_positions,
            step=step,
            num_pages=given.k_pages.shape[0],
            block_size=given.k_pages.shape[2],
            context=ContextParallel(static["context_size"], rank, static["context_interleave"]),
        )

    @property
    def visibility(self) -> Visibility:
        window, chunk = (None if x is None else x[0] for x in (self.given.sliding_window, self.given.chunk_size))
        return Visibility(self.static["causal"], window, chunk)

    def launch(
        self,
        kernel: Kernel,
        given: Operands,
        shape: tuple[int, ...],
        dtype: Any,
        grid: tuple[int, ...],
        *,
        num_warps: int,
        num_stages: int,
        name: str,
    ) -> tuple[jax.Array, jax.Array]:
        def body(given: Operands, out: Any, lse: Any) -> None:
            kernel(given, out, lse)

        return pl.pallas_call(
            body,
            out_shape=(
                jax.ShapeDtypeStruct((*shape, kernel.v_head_dim), dtype),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            ),
            grid=grid,
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=self.gpu.interpret,
            name=name,
        )(given)


def _scatter(into: jax.Array, token: jax.Array, values: jax.Array, group: int) -> jax.Array:
    """``values`` [seqs, kv_heads, few * group, ...] to rows ``token`` i32[seqs, few] of [tokens, q_heads, ...]."""
    seqs, kv_heads, _, *rest = values.shape
    few = token.shape[1]
    by_token = jnp.moveaxis(values.reshape(seqs, kv_heads, few, group, *rest), 2, 1)
    return into.at[token.reshape(-1)].set(by_token.reshape(seqs * few, *into.shape[1:]), mode="drop")
