"""What the Mosaic TPU forms share: how pages lie in TPU memory, what fits in it, and copies of pages.

A TPU keeps the last two dimensions of an array in tiles of 128 lanes by 8, 16 or 32 rows of elements of 4, 2 or 1
bytes; 8 rows, where a whole number of the larger ones would not do. Pages whose head_dim is no multiple of 128 are
laid out by XLA in another way than Mosaic reads them, so every call would copy the whole pool: store them padded to
128 (``head_dim`` of q may stay 64). Pages of whole tiles are moved by DMA as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import Tpu
from pallas_kernels.tuning import parameters

LANES = 128
SUBLANES = 8
MAX_VMEM_BYTES = 48 * 2**20
MAX_SMEM_BYTES = 960 * 2**10  # of the 1 MiB that every TPU has; the compiler wants some
IDS_A_PIECE = 8192
IN_FLIGHT = 16


def require_arithmetic(*dtypes: Any) -> None:
    """TPUs compute in each of ``dtypes``; they have no vectors of others, not even to move them.

    Raises:
        NotImplementedError: one of them is 16 bits but not bfloat16, or 64 bits.
    """
    for dtype in map(jnp.dtype, dtypes):
        if dtype in (jnp.float16, jnp.float64):
            raise NotImplementedError(f"TPUs have no arithmetic in {dtype}")


def require_tiles(*pages: jax.Array, tpu: Tpu) -> None:
    """Each of ``pages`` consists of whole tiles; the interpreter has none and takes any.

    Raises:
        NotImplementedError: some page does not.
    """
    if tpu.interpret is not False:
        return
    for each in pages:
        *_, block_size, head_dim = each.shape
        if head_dim % LANES:
            raise NotImplementedError(
                f"pages stored with head_dim {head_dim} would be copied whole by every call; pad the storage to a "
                f"multiple of {LANES}"
            )
        if block_size % SUBLANES:
            raise NotImplementedError(f"block_size {block_size} is no multiple of {SUBLANES}")


def require_scalars(count: int) -> None:
    """``count`` 32-bit numbers fit in scalar memory.

    Raises:
        NotImplementedError: they do not.
    """
    if 4 * count > MAX_SMEM_BYTES:
        raise NotImplementedError(
            f"{4 * count} bytes of items, some 28 a sequence, do not fit in the {MAX_SMEM_BYTES} of scalar memory"
        )


def require_parameters(operation: str, chosen: Mapping[str, int], fit: bool, want: str) -> None:
    """What the tuning table or its user chose can be made a kernel of.

    Raises:
        ValueError: it cannot; no ``NotImplementedError``, for which another form would run instead.
    """
    if not fit:
        raise ValueError(f"{operation}, mosaic_tpu: got parameters {dict(chosen)}, want {want}")


def compiler_params(*grid: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Parameters of a kernel, with the semantics of each dimension of its grid."""
    return pltpu.CompilerParams(dimension_semantics=grid, vmem_limit_bytes=MAX_VMEM_BYTES)


def tile_rows(dtype: Any) -> int:
    """Rows in a tile of ``dtype``: 8 of 4 bytes, 16 of 2, 32 of 1."""
    return 32 // jnp.dtype(dtype).itemsize


def transfers_at_a_time(operation: str, tpu: Tpu, pages: jax.Array) -> int:
    """For an operation that moves pages, from the tuning table or by rule.

    Raises:
        ValueError: the table's is less than 1.
    """
    shape = {"page_bytes": pages[0].size * pages.dtype.itemsize}
    chosen = parameters(operation, "mosaic_tpu", tpu.kind, shape, {"in_flight": IN_FLIGHT})
    require_parameters(operation, chosen, chosen["in_flight"] >= 1, "at least 1")
    return chosen["in_flight"]


@dataclasses.dataclass(frozen=True)
class IdPieces:
    """How lists of ids come into scalar memory: ``number`` pieces of ``size``, one for each step of a kernel's grid."""

    number: int
    size: int

    def spec(self, piece: Callable[..., Any]) -> pl.BlockSpec:
        """Of a list: piece ``piece(*grid indices)`` of it."""
        return pl.BlockSpec((self.size,), lambda *indices: (piece(*indices),), memory_space=pltpu.SMEM)

    def fill(self, ids: jax.Array) -> jax.Array:
        """``ids`` filled up to whole pieces, with -1."""
        return jnp.pad(ids, (0, self.number * self.size - ids.size), constant_values=-1)


def id_pieces(ids: jax.Array) -> IdPieces:
    """For a list as long as ``ids``, which is not empty."""
    return IdPieces(-(-ids.size // IDS_A_PIECE), min(ids.size, IDS_A_PIECE))


def copy_in_flight(count: Any, copy: Callable[[Any], tuple[Any, Any]], depth: int) -> None:
    """Inside a kernel: do copies 0 to ``count``, up to ``depth`` of them at a time.

    ``copy(i)`` gives (whether it is wanted, its descriptor). Copies i and i + depth may share a semaphore.
    """

    def start(index: Any) -> None:
        wanted, descriptor = copy(index)
        pl.when(wanted)(descriptor.start)

    def wait(index: Any) -> None:
        wanted, descriptor = copy(index)
        pl.when(wanted)(descriptor.wait)

    @pl.loop(0, count)
    def _(index: Any) -> None:
        pl.when(index >= depth)(lambda: wait(index - depth))
        start(index)

    @pl.loop(jnp.maximum(count - depth, 0), count)
    def _(index: Any) -> None:
        wait(index)
