"""Everything that can be wrong with a call of ``paged_attention``, found before anything is launched."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import (
    is_real,
    require_array,
    require_float_scalar,
    require_int32,
    require_int_scalar,
    require_pages,
    require_positive_int,
    require_scale,
    require_shape,
    same_dtype,
)
from pallas_kernels.errors import describe, require
from pallas_kernels.number_format import logical_dtype
from pallas_kernels.paged_attention.context_parallel import WHOLE_CONTEXT, ContextParallel

_STATIC = ("causal", "kv_dtype", "v_head_dim", "return_lse", "max_query_len", "max_kv_len")


def check_arguments(**arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments as the forms take them: (arrays and what may be traced, what is static). Defaults filled
    in.

    Raises:
        ArgumentError: shapes, dtypes or sizes that do not fit.
        NotImplementedError: ``v_pages`` is None.
    """
    q, k_pages = arguments["q"], arguments["k_pages"]
    _check_pages(q, k_pages, arguments["v_pages"])
    _check_tables(q, k_pages, arguments)
    _check_masks(arguments)
    _check_numbers(q, k_pages, arguments)
    arguments["context_parallel"] = _context_parallel(arguments["context_parallel"])
    _check_interleave(k_pages.shape[2], arguments["context_parallel"], arguments["block_positions"])
    arguments["kv_dtype"] = logical_dtype("k_pages", k_pages.dtype, arguments["kv_dtype"])
    arguments["v_head_dim"] = _v_head_dim(q, arguments["v_pages"], arguments["v_head_dim"])
    if arguments["scale"] is None:
        arguments["scale"] = 1 / math.sqrt(q.shape[-1])
    static = {name: arguments.pop(name) for name in _STATIC}
    return arguments, static


def _check_pages(q: Any, k_pages: Any, v_pages: Any) -> None:
    if v_pages is None:
        raise NotImplementedError("v_pages=None is reserved for latent attention (MLA), which is not there yet")
    require_pages("k_pages", k_pages)
    require_pages("v_pages", v_pages)
    require_shape("v_pages", v_pages, (*k_pages.shape[:3], v_pages.shape[3]), "k_pages but for head_dim")
    same_dtype("k_pages", k_pages, "v_pages", v_pages)
    _, kv_heads, _, storage_head_dim = k_pages.shape
    want = "floating [tokens, q_heads, head_dim]"
    require_array("q", q, want, 3)
    require(jnp.issubdtype(q.dtype, jnp.floating), "q", q, want)
    require(q.shape[1] > 0 and q.shape[1] % kv_heads == 0, "q", q, f"q_heads a multiple of kv_heads {kv_heads}")
    fits = 0 < q.shape[2] <= storage_head_dim
    require(fits, "q", q, f"head_dim 1 to {storage_head_dim}, the head_dim of k_pages {describe(k_pages)}")


def _v_head_dim(q: Any, v_pages: Any, v_head_dim: Any) -> int:
    if v_head_dim is None:
        return min(q.shape[-1], v_pages.shape[-1])
    require_positive_int("v_head_dim", v_head_dim)
    require(v_head_dim <= v_pages.shape[-1], "v_head_dim", v_head_dim, f"at most {v_pages.shape[-1]}, of v_pages")
    return int(v_head_dim)


def _check_tables(q: Any, k_pages: Any, arguments: dict[str, Any]) -> None:
    tables, loc = arguments["block_tables"], arguments["query_start_loc"]
    require_int32("block_tables", tables, "int32[seqs, width]", 2)
    seqs = tables.shape[0]
    require(tables.shape[1] > 0, "block_tables", tables, "a width of at least 1")
    require_int32("kv_lens", arguments["kv_lens"], f"int32[{seqs}] = [seqs]", 1)
    require_shape("kv_lens", arguments["kv_lens"], (seqs,), "[seqs], as block_tables")
    if loc is None:
        want = f"{seqs} tokens, one a sequence of block_tables, as query_start_loc is None"
        require(q.shape[0] == seqs, "q", q, want)
    else:
        require_int32("query_start_loc", loc, f"int32[{seqs + 1}] = [seqs + 1]", 1)
        require_shape("query_start_loc", loc, (seqs + 1,), "[seqs + 1]")
    positions = arguments["block_positions"]
    if positions is not None:
        require_int32("block_positions", positions, "int32[seqs, width]", 2)
        require_shape("block_positions", positions, tuple(tables.shape), "[seqs, width], as block_tables")


def _check_masks(arguments: dict[str, Any]) -> None:
    for name in ("causal", "return_lse"):
        require(isinstance(arguments[name], bool), name, arguments[name], "True or False, static")
    for name in ("sliding_window", "chunk_size"):
        if arguments[name] is not None:
            require_int_scalar(name, arguments[name], minimum=1)
    for name in ("max_query_len", "max_kv_len"):
        if arguments[name] is not None:
            require_positive_int(name, arguments[name])


def _check_numbers(q: Any, k_pages: Any, arguments: dict[str, Any]) -> None:
    for name in ("scale", "logits_soft_cap"):
        if arguments[name] is not None:
            require_float_scalar(name, arguments[name])
    cap = arguments["logits_soft_cap"]
    if is_real(cap):
        require(cap > 0, "logits_soft_cap", cap, "a cap above 0, or None")
    if arguments["sinks"] is not None:
        want = f"floating [{q.shape[1]}] = [q_heads]"
        require_array("sinks", arguments["sinks"], want, 1)
        require(jnp.issubdtype(arguments["sinks"].dtype, jnp.floating), "sinks", arguments["sinks"], want)
        require_shape("sinks", arguments["sinks"], (q.shape[1],), "[q_heads]")
    for name in ("k_scale", "v_scale"):
        require_scale(name, arguments[name], k_pages.shape[1])


def _context_parallel(value: Any) -> ContextParallel:
    if value is None:
        return WHOLE_CONTEXT
    require(
        isinstance(value, tuple) and len(value) == 3,
        "context_parallel",
        value,
        "(size, rank, interleave) or None",
    )
    size, rank, interleave = value
    require_positive_int("context_parallel size", size)
    require_int_scalar("context_parallel rank", rank, minimum=0)
    require_positive_int("context_parallel interleave", interleave)
    if not isinstance(rank, jax.core.Tracer):
        require(int(rank) < size, "context_parallel rank", int(rank), f"0 to {size - 1}, of {size} ranks")
    return ContextParallel(int(size), rank, int(interleave))


def _check_interleave(block_size: int, context: ContextParallel, block_positions: Any) -> None:
    if block_positions is not None and context.size > 1:
        divides = block_size % context.interleave == 0
        want = f"a divisor of block_size {block_size}, as block_positions is given"
        require(divides, "context_parallel interleave", context.interleave, want)
