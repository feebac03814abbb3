"""Copy in XLA; runs anywhere; the definition of correct."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.page_ids import nowhere_if_invalid, report_out_of_range


@jax.jit
def paged_copy(pages: Any, src: jax.Array, dst: jax.Array) -> Any:
    """``pages[dst] = pages[src]`` on every leaf; see the public function."""
    size = jax.tree.leaves(pages)[0].shape[0]
    report_out_of_range("src", src, size)
    report_out_of_range("dst", dst, size)
    src, dst = nowhere_if_invalid(src, size), nowhere_if_invalid(dst, size)
    dst = jnp.where(src < size, dst, size)

    def copy(leaf: jax.Array) -> jax.Array:
        # What is scattered was gathered from the same array: XLA must read first, and may then update in
        # place.
        moved = leaf.at[src].get(mode="clip")
        return leaf.at[dst].set(moved, mode="drop")

    return jax.tree.map(copy, pages)
