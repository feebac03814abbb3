"""What the Mosaic GPU forms share: where they run, and what a warpgroup does with numbers in its registers.

Mosaic GPU is Pallas for NVIDIA GPUs from Hopper on, one level under Triton: a program is a few warpgroups of 128
threads, memory is copied by the tensor memory accelerator (TMA), and barriers say what has arrived. A warpgroup's
numbers lie in its threads' registers in a layout; those here are the matrix layout of Hopper's wgmma instruction and
its rows and columns.

``jax.experimental.pallas.mosaic_gpu`` needs the package ``absl-py``, which JAX itself does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.interpret import interpret_mode, interpret_pallas
from pallas_kernels.nvidia import Gpu, target_gpu

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as error:
    plgpu = None  # type: ignore[assignment]
    _MISSING = str(error)

WARPGROUP_ROWS = 64  # of a product: what one wgmma instruction computes
_HOPPER = 90


def target_hopper() -> tuple[Gpu, Any]:
    """The GPU the program under trace is for, and what to pass to ``plgpu.kernel(interpret=...)``.

    Raises:
        NotImplementedError: it is for no GPU of compute capability 9.0, or Mosaic GPU cannot be imported.
    """
    if plgpu is None:
        raise NotImplementedError(f"jax.experimental.pallas.mosaic_gpu cannot be imported ({_MISSING})")
    mode = interpret_mode()
    if mode:
        if type(mode).__name__ != "InterpretGPUParams":  # JAX has not made its name public
            raise NotImplementedError(f"Mosaic GPU kernels are interpreted by InterpretGPUParams, not by {mode!r}")
        with interpret_pallas():
            return target_gpu(), mode
    gpu = target_gpu()
    if gpu.capability != _HOPPER:
        raise NotImplementedError(
            f"{gpu.kind} has compute capability {gpu.capability / 10}, and wgmma is an instruction of 9.0 alone"
        )
    return gpu, None


def matrix_memory(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Shared memory for [..., rows, columns] that TMA fills and wgmma reads: tiles of 8 rows of 128 bytes, swizzled.

    The swizzle is what keeps both free of bank conflicts. The interpreter knows neither.
    """
    if interpret:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


@dataclasses.dataclass(frozen=True)
class Registers:
    """What a warpgroup computes with. Interpreted, there are no layouts and no tensor cores: plain products.

    Attributes:
        interpret: whether the kernel is interpreted.
    """

    interpret: bool

    def matrix(self, values: jax.Array) -> jax.Array:
        """[64, n] as wgmma lays out its result."""
        return values if self.interpret else plgpu.layout_cast(values, plgpu.Layout.WGMMA)

    def of_rows(self, values: jax.Array) -> jax.Array:
        """[64]: one number for each row of a matrix."""
        return values if self.interpret else plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))

    def of_columns(self, values: jax.Array) -> jax.Array:
        """[n]: one number for each column of a matrix."""
        return values if self.interpret else plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(0))

    def of_threads(self, values: jax.Array) -> jax.Array:
        """[n], n a multiple of 128: thread t has numbers t, t + 128, ..."""
        if self.interpret:
            return values
        return plgpu.layout_cast(values, plgpu.Layout.WG_STRIDED(values.shape, vec_size=1))

    def product(self, a: Any, b: Any, *, transposed: bool = False, meanwhile: Callable[[], None] | None = None) -> Any:
        """``a @ b`` or ``a @ b.T``, f32[64, n]. ``b`` is a ref in ``matrix_memory``, ``a`` one too or in registers.

        ``meanwhile`` is done while the tensor cores work.
        """
        if self.interpret:
            if meanwhile:
                meanwhile()
            left, right = a if isinstance(a, jax.Array) else a[...], b[...]
            plgpu.commit_smem()  # tensor cores read as TMA writes; what stands for them here does not
            contract = (((1,), (1 if transposed else 0,)), ((), ()))
            return lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)

        def multiply(accumulator: Any) -> jax.Array:
            plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)
            if meanwhile:
                meanwhile()
            return accumulator[...]

        columns = b.shape[0 if transposed else 1]
        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], columns), jnp.float32))


def down_rows(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[rows] as [rows, columns], the same in each column."""
    return lax.broadcast_in_dim(values, shape, (0,))


def across_columns(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[columns] as [rows, columns], the same in each row."""
    return lax.broadcast_in_dim(values, shape, (1,))
