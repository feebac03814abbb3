"""Other people's attention on the same numbers: what can be imported here. Each returns microseconds of one call."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_time import call_us
from benchmarks.kernel_inputs import AttentionInputs
from pallas_kernels import to_heads_first, to_nhd


def attention_baselines(inputs: AttentionInputs) -> dict[str, Callable[[], float]]:
    """By name; those that cannot be had raise when they are called."""
    platform = jax.default_backend()
    found: dict[str, Callable[[], float]] = {}
    if platform == "cpu":
        return found
    if inputs.query_start_loc is None:
        found["jax paged_attention"] = lambda: _jax_paged(inputs, platform)
    if len(set(inputs.query_lens)) == 1:
        implementation = "cudnn" if platform == "gpu" else "xla"
        found[f"dot_product_attention, {implementation}, contiguous"] = lambda: _contiguous(inputs, implementation)
    if platform == "gpu":
        found["flashinfer"] = lambda: _flashinfer(inputs)
        if len(set(inputs.query_lens)) == 1:
            found["torch sdpa, contiguous"] = lambda: _torch(inputs)
    return found


def _jax_paged(inputs: AttentionInputs, platform: str) -> float:
    k, v = jax.jit(to_heads_first)(inputs.k_pages), jax.jit(to_heads_first)(inputs.v_pages)
    scaled = inputs.q * inputs.q.shape[-1] ** -0.5  # neither of the two scales
    if platform == "gpu":
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        return call_us(lambda small, k, v: paged_attention(small[0], k, v, *small[1:]), _small(inputs, scaled), k, v)
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    return call_us(
        lambda small, k, v: paged_attention(small[0], k, v, small[2], small[1], pages_per_compute_block=8),
        _small(inputs, scaled),
        k,
        v,
    )


def _small(inputs: AttentionInputs, q: jax.Array) -> tuple[jax.Array, ...]:
    return q, inputs.tables, inputs.kv_lens


def _by_sequence(inputs: AttentionInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [seqs, queries, heads, d], K and V [seqs, keys, kv_heads, d], contiguous."""
    seqs = inputs.tables.shape[0]

    @jax.jit
    def contiguous(pages: jax.Array, tables: jax.Array) -> jax.Array:
        gathered = jnp.moveaxis(pages[jnp.maximum(tables, 0)], 2, 3)
        return gathered.reshape(seqs, -1, *gathered.shape[3:])

    q = inputs.q.reshape(seqs, -1, *inputs.q.shape[1:])
    return q, contiguous(inputs.k_pages, inputs.tables), contiguous(inputs.v_pages, inputs.tables)


def _contiguous(inputs: AttentionInputs, implementation: str) -> float:
    q, k, v = _by_sequence(inputs)
    is_causal = q.shape[1] > 1

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation)

    return call_us(call, q, k, v)


def _torch(inputs: AttentionInputs) -> float:
    import torch

    q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in _by_sequence(inputs))
    is_causal = q.shape[2] > 1
    attend = torch.nn.functional.scaled_dot_product_attention
    return _cuda_us(lambda: attend(q, k, v, is_causal=is_causal, enable_gqa=True))


def _flashinfer(inputs: AttentionInputs) -> float:
    import flashinfer
    import torch

    _, kv_heads, block_size, head_dim = inputs.k_pages.shape
    q_heads = inputs.q.shape[1]
    nhd = jax.jit(to_nhd)
    q, k, v = (torch.from_dlpack(x) for x in (inputs.q, nhd(inputs.k_pages), nhd(inputs.v_pages)))
    tables, lens = torch.from_dlpack(inputs.tables), torch.from_dlpack(inputs.kv_lens)
    counts = (lens + block_size - 1) // block_size
    indptr = torch.nn.functional.pad(torch.cumsum(counts, 0, dtype=torch.int32), (1, 0))
    indices = tables[tables >= 0]
    last = (lens - 1) % block_size + 1
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    heads = (q_heads, kv_heads, head_dim, block_size)
    if inputs.query_start_loc is None:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last, *heads, q_data_type=q.dtype, kv_data_type=k.dtype)
    else:
        loc = torch.from_dlpack(inputs.query_start_loc)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(loc, indptr, indices, last, *heads, causal=True, q_data_type=q.dtype, kv_data_type=k.dtype)
    return _cuda_us(lambda: wrapper.run(q, (k, v)))


def _cuda_us(call: Callable[[], Any], repeats: int = 20) -> float:
    """By CUDA events."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
