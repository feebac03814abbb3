"""Pages copied onto other pages."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from pallas_kernels.arguments import require_int32, require_pages, require_shape
from pallas_kernels.dispatch import Implementation, Operation
from pallas_kernels.errors import require

_OPERATION = Operation(
    "paged_copy",
    {
        "triton": "pallas_kernels.paged_copy.triton",
        "mosaic_tpu": "pallas_kernels.paged_copy.mosaic_tpu",
        "xla": "pallas_kernels.paged_copy.reference",
    },
)

Pages = TypeVar("Pages", bound=Any)


def paged_copy(pages: Pages, src: jax.Array, dst: jax.Array, *, implementation: Implementation = None) -> Pages:
    """Copy page ``src[i]`` onto page ``dst[i]`` for every i, as if all reads came before all writes.

    So ``src`` and ``dst`` may overlap, and a permutation moves in one call. For copy-on-write and
    defragmentation. In place when ``pages`` is donated to the ``jit`` around it.

    Args:
        pages: one array [pages, kv_heads, block_size, head_dim], or any pytree of such arrays (K and V, say)
            with one number of pages; each is copied alike.
        src: i32[n]; -1: this pair is ignored. Ids may repeat.
        dst: i32[n]; -1: this pair is ignored. The others must be distinct; of equal ones any wins, or each in part.
        implementation: a form, a sequence of forms to try in turn, or None for the best possible here.

    Returns:
        The pages after the copy, of the same structure. The pair of an id outside the pool is
        ignored; in ``checking()`` it is a ``checkify`` error.

    Raises:
        ArgumentError: shapes or dtypes that do not fit.
        NotImplementedError: no form asked for can run here.
    """
    leaves = jax.tree.leaves(pages)
    require(bool(leaves), "pages", pages, "at least one array of pages")
    for leaf in leaves:
        require_pages("pages", leaf)
        require(leaf.shape[0] == leaves[0].shape[0], "pages", leaf, f"{leaves[0].shape[0]} pages in each array")
    require_int32("src", src, "int32[n]", 1)
    require_int32("dst", dst, "int32[n]", 1)
    require_shape("dst", dst, src.shape, "[n], as src")
    return _OPERATION(implementation, pages, src, dst)
