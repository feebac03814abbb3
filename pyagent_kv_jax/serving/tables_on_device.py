"""A step's block tables on the accelerator, of which only the rows that changed since the last step are sent."""

from __future__ import annotations

import jax
import numpy as np

from pyagent_kv_jax.tables.cpu_gpu_buffer import CpuGpuBuffer


class TablesOnDevice:
    """``CpuGpuBuffer`` for the tables of an engine's steps, which are all of one shape.

    With 256 rows of 8,192 columns a step's tables are 8 MiB, in which a decode step changes a number or two in 16 rows.
    """

    def __init__(self, sharding: jax.sharding.Sharding | None = None) -> None:
        """On JAX's default device, or where ``sharding`` says."""
        self._sharding = sharding
        self._buffer: CpuGpuBuffer | None = None
        self._last: np.ndarray | None = None  # sent last; decode steps in reserved blocks come with the same array

    @property
    def bytes_sent(self) -> int:
        """To the device so far."""
        return 0 if self._buffer is None else self._buffer.bytes_sent

    def send(self, tables: np.ndarray) -> jax.Array:
        """i32[R, W], or i32[G, R, W] of several groups, as i32[G * R, W] on the device.

        Nobody may write to ``tables`` afterwards.
        """
        if self._buffer is not None and tables is self._last:
            return self._buffer.get_gpu()
        self._last, rows = tables, tables.reshape(-1, tables.shape[-1])
        if self._buffer is None or self._buffer.get_cpu().shape != rows.shape:  # another block size has other tables
            self._buffer = CpuGpuBuffer(rows.shape, np.int32, self._sharding)
        changed = np.flatnonzero((rows != self._buffer.get_cpu()).any(axis=1))
        self._buffer.set_rows(changed, rows[changed])
        return self._buffer.get_gpu()

    def warm_up(self, tables: np.ndarray) -> None:
        """Compile what ``send`` may need for tables of this shape: a program for each power of two of rows."""
        self.send(tables)
        others = tables.reshape(-1, tables.shape[-1])
        for count in (2**i for i in range(len(others).bit_length())):
            others = others.copy()
            others[:count] ^= 1
            jax.block_until_ready(self.send(others))
