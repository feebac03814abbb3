"""Attention that reads K and V through a block table."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import Implementation, Operation
from pallas_kernels.paged_attention.arguments import check_arguments

_OPERATION = Operation(
    "paged_attention",
    {
        "mosaic_gpu": "pallas_kernels.paged_attention.mosaic_gpu",
        "triton": "pallas_kernels.paged_attention.triton",
        "mosaic_tpu": "pallas_kernels.paged_attention.mosaic_tpu",
        "xla": "pallas_kernels.paged_attention.reference",
    },
    by_name_only=("mosaic_gpu",),  # until it has run on a Hopper
)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array | None = None,
    *,
    causal: bool = True,
    sliding_window: Any = None,
    chunk_size: Any = None,
    block_positions: jax.Array | None = None,
    context_parallel: tuple[int, Any, int] | None = None,
    scale: Any = None,
    logits_soft_cap: Any = None,
    sinks: jax.Array | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    v_head_dim: int | None = None,
    return_lse: bool = False,
    max_query_len: int | None = None,
    max_kv_len: int | None = None,
    implementation: Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of ragged queries over paged K and V: prefill, decode and any mix of them in one call.

    PagedAttention (vLLM, arXiv 2309.06180) with an online softmax, in float32 whatever the inputs. Sequence s
    has
    queries ``query_start_loc[s]`` to ``query_start_loc[s + 1]`` and ``kv_lens[s]`` keys, the queries' own
    among them: query i of n stands at position ``kv_len - n + i``, and the key at position x is token ``x %
    block_size`` of page ``block_tables[s, x // block_size]``.

    A query at position p sees the keys at positions x in [0, kv_len) that pass every cut asked for: ``x <=
    p`` if ``causal``; ``x > p - sliding_window`` (the past only: without ``causal`` the future stays open);
    ``x // chunk_size == p // chunk_size``. A query at a negative position sees nothing. A key whose column is
    -1, or past the table, is seen by nobody. What no query sees is never part of a result, NaN or not.

    Args:
        q: floating [tokens, q_heads, head_dim].
        k_pages: [pages, kv_heads, block_size, Dk >= head_dim], of ``kv_dtype`` or of unsigned bits as wide;
            what Dk has beyond head_dim is not read. q_heads is a multiple of kv_heads: head h reads KV head
            ``h // (q_heads // kv_heads)``.
        v_pages: [pages, kv_heads, block_size, Dv], of the same dtype. None is reserved for latent attention.
        block_tables: i32[seqs, width] of page ids, -1: no page.
        kv_lens: i32[seqs].
        query_start_loc: i32[seqs + 1], never falling. Padded sequences repeat the last value; rows past it
            are padding. None: one query a sequence (decode), tokens = seqs.
        causal: whether queries see no later key.
        sliding_window: None, or an integer of at least 1, or i32[] (traced, so that it can vary by layer in a
            scan).
        chunk_size: likewise: the chunked attention of Llama 4.
        block_positions: i32[seqs, width], position of the first token of each column, -1: unused. Columns may
            stand in any order. None: column c starts at ``c * block_size`` (times the ranks, under
            ``context_parallel``).
        context_parallel: None, or (size, rank, interleave): these pages hold only this rank's share of each
            sequence, dealt out ``interleave`` tokens at a time: position x is here if ``(x // interleave) %
            size == rank``. ``kv_lens`` and ``block_positions`` count all ranks' tokens. rank may be traced.
            Merge the ranks' results with ``merge_attention_states``. With ``block_positions``, interleave
            must divide block_size.
        scale: of the logits; None: ``1 / sqrt(head_dim)``. A number or f32[].
        logits_soft_cap: None, or cap: logits become ``cap * tanh(logits / cap)``, after the scale.
        sinks: None, or floating [q_heads]: a logit without a value, in the softmax and the LSE of every query
            at a position of 0 or more. Give it to one partial only if results are merged.
        k_scale: None (1), or a scale [] or [kv_heads], traced: keys are what is stored times it.
        v_scale: likewise for values.
        kv_dtype: logical dtype of the pages, see ``paged_write``. None: the dtype of the pages.
        v_head_dim: logical size of V; what Dv has beyond it is not read. None: the smaller of head_dim and
            Dv.
        return_lse: whether to return the log-sum-exp too.
        max_query_len, max_kv_len: static hints: no sequence has more queries or keys. They choose loops and
            tiles only.
        implementation: a form, a sequence of forms to try in turn, or None for the best possible here.
            "mosaic_gpu" (Hopper, many queries a sequence) is not among those unless named: it is new, and unmeasured.

    Returns:
        out [tokens, q_heads, v_head_dim] of q's dtype; with ``return_lse``, (out, lse f32[tokens, q_heads]),
        natural log. Padding rows, and queries that see nothing, give 0 and -inf (the sink, if there is one
        and position >= 0).

        A page id outside the pool is as -1. In ``checking()`` it is a ``checkify`` error, as are a kv_len past the
        table and a falling query_start_loc.

    Raises:
        ArgumentError: shapes, dtypes or sizes that do not fit.
        NotImplementedError: no form asked for can run here; or a gradient was asked for; or ``v_pages`` is
            None.
    """
    arrays, static = check_arguments(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        block_tables=block_tables,
        kv_lens=kv_lens,
        query_start_loc=query_start_loc,
        causal=causal,
        sliding_window=sliding_window,
        chunk_size=chunk_size,
        block_positions=block_positions,
        context_parallel=context_parallel,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        kv_dtype=kv_dtype,
        v_head_dim=v_head_dim,
        return_lse=return_lse,
        max_query_len=max_query_len,
        max_kv_len=max_kv_len,
    )

    @jax.custom_jvp
    def attend(arrays: dict[str, Any]) -> Any:
        return _OPERATION(implementation, **arrays, **static)

    attend.defjvp(_refuse_gradient)
    return attend(arrays)


def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "paged_attention has no gradient: it reads a KV cache, which is for inference. Train with attention over "
        "the sequence itself (jax.nn.dot_product_attention), or jax.lax.stop_gradient what goes in here"
    )
