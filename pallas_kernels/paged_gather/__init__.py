"""Pages by id, side by side."""

from __future__ import annotations

import jax

from pallas_kernels.arguments import require_int32, require_pages
from pallas_kernels.dispatch import Implementation, Operation

_OPERATION = Operation(
    "paged_gather",
    {
        "triton": "pallas_kernels.paged_gather.triton",
        "mosaic_tpu": "pallas_kernels.paged_gather.mosaic_tpu",
        "xla": "pallas_kernels.paged_gather.reference",
    },
)


def paged_gather(pages: jax.Array, ids: jax.Array, *, implementation: Implementation = None) -> jax.Array:
    """Gather pages by id: for swap, transfer, and attention over a contiguous copy.

    Args:
        pages: [pages, kv_heads, block_size, head_dim], any dtype.
        ids: i32[n]; -1 is padding. Ids may repeat.
        implementation: a form, a sequence of forms to try in turn, or None for the best possible here.

    Returns:
        [n, kv_heads, block_size, head_dim]; zeros for -1. An id outside the pool gives zeros too; in
        ``checking()`` it is a ``checkify`` error.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        NotImplementedError: no form asked for can run here.
    """
    require_pages("pages", pages)
    require_int32("ids", ids, "int32[n]", 1)
    return _OPERATION(implementation, pages, ids)
