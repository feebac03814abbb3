"""What an id outside the pool means: an error in checking mode, nowhere at all outside it.

-1 is padding and never an error. Any other id outside the pool is reported in checking mode. Indices are
always [page, head, offset], never flattened to elements: those pass 2**31 in a pool of a few GiB.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.checking import check


def report_out_of_range(name: str, ids: jax.Array, size: int) -> None:
    """In checking mode, an error unless each id is -1 or in [0, size)."""
    check(
        jnp.all((ids >= -1) & (ids < size)),
        f"{name}: got ids from {{low}} to {{high}}, want -1 or 0 to {size - 1}",
        low=jnp.min(ids, initial=0),
        high=jnp.max(ids, initial=0),
    )


def nowhere_if_invalid(ids: jax.Array, size: int) -> jax.Array:
    """Ids outside [0, size) become ``size``: past the end, for ``drop`` and ``fill``. -1 would wrap."""
    return jnp.where((ids >= 0) & (ids < size), ids, size)
