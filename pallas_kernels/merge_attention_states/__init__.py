"""Attention over parts of a context, merged into attention over all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import require_array, require_shape
from pallas_kernels.dispatch import Implementation, Operation
from pallas_kernels.errors import require

_OPERATION = Operation(
    "merge_attention_states",
    {
        "triton": "pallas_kernels.merge_attention_states.triton",
        "mosaic_tpu": "pallas_kernels.merge_attention_states.mosaic_tpu",
        "xla": "pallas_kernels.merge_attention_states.reference",
    },
)


def merge_attention_states(
    outs: jax.Array, lses: jax.Array, *, implementation: Implementation = None
) -> tuple[jax.Array, jax.Array]:
    """Merge n partial attentions of the same queries over disjoint sets of keys.

    ``out = sum(exp(lse_i) * out_i) / sum(exp(lse_i))``, ``lse = log(sum(exp(lse_i)))``: the state merge of
    FlashInfer (arXiv 2501.01005) and of flash-decoding. A state whose LSE is -inf saw no key: its output is
    not looked at, so NaN in it does no harm. An LSE of +inf or NaN counts as -inf. Sinks may have been
    counted in at most one of the states.

    Args:
        outs: floating [n, ..., heads, d], n at least 1.
        lses: floating [n, ..., heads], natural log.
        implementation: a form, a sequence of forms to try in turn, or None for the best possible here.

    Returns:
        out [..., heads, d] of the dtype of ``outs``, and lse f32 [..., heads]. Where all n saw nothing: 0 and
        -inf.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        NotImplementedError: no form asked for can run here.
    """
    require_array("outs", outs, "[n, ..., heads, d]", tuple(range(3, 12)))
    require(jnp.issubdtype(outs.dtype, jnp.floating), "outs", outs, "a floating dtype")
    require(outs.shape[0] > 0, "outs", outs, "at least one state to merge")
    require_array("lses", lses, f"{list(outs.shape[:-1])} = [n, ..., heads]", outs.ndim - 1)
    require(jnp.issubdtype(lses.dtype, jnp.floating), "lses", lses, "a floating dtype")
    require_shape("lses", lses, outs.shape[:-1], "[n, ..., heads], outs without its last dimension")
    return _OPERATION(implementation, outs, lses)
