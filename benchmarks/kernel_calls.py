"""Microseconds of one call of each operation on the device; ``form`` are further arguments, ``implementation`` say."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_time import call_us, device_us
from benchmarks.kernel_inputs import AttentionInputs
from pallas_kernels import merge_attention_states, paged_attention, paged_copy, paged_gather, paged_write
from pallas_kernels.paged_attention.shapes import AttentionShape


def gather_us(pages: jax.Array, ids: jax.Array, **form: Any) -> float:
    return call_us(lambda ids, pages: paged_gather(pages, ids, **form), ids, pages)


def copy_us(pages: jax.Array, src: jax.Array, dst: jax.Array, **form: Any) -> float:
    return device_us(lambda pages, src, dst: paged_copy(pages, src, dst, **form), pages, src, dst)


def write_us(pages_shape: tuple[int, ...], tokens: int, stored: Any, kv_dtype: Any, **form: Any) -> float:
    """K and V of ``tokens`` bfloat16 tokens, into pages in random order, a page's tokens together."""
    num_pages, kv_heads, block_size, head_dim = pages_shape
    token = jax.random.normal(jax.random.key(1), (tokens, kv_heads, head_dim), jnp.bfloat16)
    chosen = jax.random.permutation(jax.random.key(2), num_pages)[: -(-tokens // block_size)].astype(jnp.int32)
    slots = (chosen[:, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)).reshape(-1)[:tokens]
    scale = None if kv_dtype is None else jnp.float32(0.02)

    def step(state: Any, slots: Any) -> Any:
        pages, k = state
        k = k.at[0, 0, 0].add(k[0, 0, 0] * 0)  # carried: else XLA would quantise it once, before the loop
        return paged_write(*pages, k, k, slots, k_scale=scale, v_scale=scale, kv_dtype=kv_dtype, **form), k

    pages = jnp.zeros(pages_shape, stored), jnp.zeros(pages_shape, stored)
    return device_us(step, (pages, token), slots)


def merge_us(outs: jax.Array, lses: jax.Array, **form: Any) -> float:
    return call_us(lambda lses, outs: merge_attention_states(outs, lses, **form), lses, outs)


def attention_us(shape: AttentionShape, inputs: AttentionInputs, **form: Any) -> float:
    """A layer of that model."""
    scale = None if inputs.kv_dtype is None else jnp.float32(0.02)

    def call(small: Any, k_pages: Any, v_pages: Any) -> Any:
        q, tables, lens, loc = small
        return paged_attention(
            q,
            k_pages,
            v_pages,
            tables,
            lens,
            loc,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            chunk_size=shape.chunk_size,
            logits_soft_cap=shape.logits_soft_cap,
            sinks=jnp.zeros(shape.q_heads) if shape.has_sinks else None,
            kv_dtype=inputs.kv_dtype,
            k_scale=scale,
            v_scale=scale,
            max_query_len=inputs.max_query_len,
            **form,
        )

    small = inputs.q, inputs.tables, inputs.kv_lens, inputs.query_start_loc
    return call_us(call, small, inputs.k_pages, inputs.v_pages)
