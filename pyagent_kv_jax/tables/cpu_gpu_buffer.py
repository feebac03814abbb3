"""One array in two places: edited on the host, read on a device, and only the rows that changed are sent."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from pyagent_kv_jax.arguments import integer
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError, ShapeMismatchError


class CpuGpuBuffer:
    """A (rows, cols) array on the host and on a device. Writes go to the host; ``get_gpu`` sends what is new.

    An array got from ``get_gpu`` stays valid and never changes: steps in flight go on reading what they were given.
    So a synchronisation does not donate; it copies the array within the device, whose bandwidth is some hundred times
    that of the way there. Not thread-safe: whoever owns it holds a lock.

    Attributes:
        shape: (rows, cols).
        dtype: of an element.
        fill: what every element is at first, and what fills up a row given too few values.
        bytes_sent: to the device so far, padding and row numbers included.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: DTypeLike,
        device: jax.Device | jax.sharding.Sharding | None = None,
        *,
        fill: float = -1,
    ) -> None:
        """All ``fill``, which is -1 as in tables, on the host and on ``device`` (None: JAX's default).

        Raises:
            ConfigError: the shape is not two positive integers, or JAX would hold the dtype as another.
            InvalidArgumentError: ``fill`` is no value of ``dtype``.
        """
        if len(shape) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in shape):
            raise ConfigError(f"CpuGpuBuffer.shape: got {shape!r}, want two positive integers")
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = np.dtype(dtype)
        if (held := jax.dtypes.canonicalize_dtype(self.dtype)) != self.dtype:
            raise ConfigError(f"CpuGpuBuffer.dtype: got {self.dtype}, want one that devices hold as it is, e.g. {held}")
        self.fill = self._elements("fill", fill)[()]
        self.bytes_sent = 0
        self._device = device
        self._host = np.full(self.shape, self.fill, self.dtype)
        self._dirty = np.zeros(self.shape[0], bool)
        self._on_device = self._send_all()

    def get_cpu(self) -> np.ndarray:
        """[rows, cols], a read-only view of the host's array as it is from now on."""
        view = self._host.view()
        view.flags.writeable = False
        return view

    def get_gpu(self) -> jax.Array:
        """[rows, cols] on the device, with every write made so far."""
        self._sync_to_gpu()
        return self._on_device

    def get(self, row: int, col: int) -> Any:
        """One element, of the host's array.

        Raises:
            InvalidArgumentError: outside the array.
        """
        return self._host[self._index("row", row, 0), self._index("col", col, 1)].item()

    def set(self, row: int, col: int, value: float) -> None:
        """Write one element.

        Raises:
            InvalidArgumentError: outside the array, or no value of its dtype.
            ShapeMismatchError: not one value.
        """
        at, element = (self._index("row", row, 0), self._index("col", col, 1)), self._elements("value", value)
        if element.ndim:
            raise ShapeMismatchError(f"value: got shape {element.shape}, want one value")
        self._host[at] = element
        self._dirty[at[0]] = True

    def set_row(self, row: int, values: ArrayLike) -> None:
        """Write a row from its first column on; ``fill`` takes the place of values that are missing.

        Raises:
            InvalidArgumentError: no such row, or no values of the dtype.
            ShapeMismatchError: more values than columns, or not one list of them.
        """
        elements = self._elements("values", values)
        if elements.ndim != 1:
            raise ShapeMismatchError(f"values: got shape {elements.shape}, want [n] with n at most {self.shape[1]}")
        self.set_rows([row], elements[None])

    def set_rows(self, rows: ArrayLike, values: ArrayLike) -> None:
        """Write rows ``rows`` i32[n], none twice, with ``values`` [n, at most cols], as ``set_row`` does.

        Raises:
            InvalidArgumentError: no such row, a row named twice, or no values of the dtype.
            ShapeMismatchError: shapes that do not fit.
        """
        index, elements = np.asarray(rows), self._elements("values", values)
        if index.size == 0:
            index = index.astype(np.int32)
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise ShapeMismatchError(f"rows: got {index.dtype}{list(index.shape)}, want integers [n]")
        if elements.ndim != 2 or len(elements) != len(index) or elements.shape[1] > self.shape[1]:
            raise ShapeMismatchError(
                f"values: got shape {elements.shape}, want [{len(index)}, at most {self.shape[1]}], a line for each row"
            )
        outside = (index < 0) | (index >= self.shape[0])
        if outside.any() or len(np.unique(index)) < len(index):
            raise InvalidArgumentError(f"rows: got {index[:20].tolist()}, want each once, 0 to {self.shape[0] - 1}")
        self._host[index, : elements.shape[1]] = elements
        self._host[index, elements.shape[1] :] = self.fill
        self._dirty[index] = True

    def _sync_to_gpu(self) -> None:
        """Send the rows written since last time: by themselves, or the whole array when they are more than half."""
        rows = np.flatnonzero(self._dirty)
        if not len(rows):
            return
        padded = 1 << (len(rows) - 1).bit_length()
        if 2 * len(rows) > self.shape[0]:
            self._on_device = self._send_all()
        else:
            index = np.full(padded, self.shape[0], np.int32)  # past the end: padding is dropped
            index[: len(rows)] = rows
            values = np.full((padded, self.shape[1]), self.fill, self.dtype)
            values[: len(rows)] = self._host[rows]
            self._on_device = _with_rows(self._on_device, index, values)
            self.bytes_sent += index.nbytes + values.nbytes
        self._dirty[:] = False

    def _send_all(self) -> jax.Array:
        self.bytes_sent += self._host.nbytes
        return jax.device_put(self._host.copy(), self._device)  # of a copy: it may be shared, or read later

    def _index(self, name: str, value: int, axis: int) -> int:
        index = int(integer(name, value))
        if not 0 <= index < self.shape[axis]:
            raise InvalidArgumentError(f"{name}: got {index}, want 0 to {self.shape[axis] - 1}")
        return index

    def _elements(self, name: str, values: ArrayLike) -> np.ndarray:
        """``values`` in the array's dtype; floats are rounded, but nothing is truncated or wrapped."""
        given = np.asarray(values)
        if given.size == 0:
            return np.zeros(given.shape, self.dtype)
        with np.errstate(all="ignore"):
            elements = given.astype(self.dtype) if given.dtype.kind in "biuf" or given.dtype == self.dtype else None
        exact = self.dtype.kind in "biu"
        if elements is None or (exact and not np.array_equal(elements, given)):
            raise InvalidArgumentError(f"{name}: got {given.ravel()[:20].tolist()}, want values of {self.dtype}")
        return elements


@jax.jit
def _with_rows(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """``array`` [R, cols] with ``rows`` i32[n] (R: padding) replaced by ``values`` [n, cols]."""
    return array.at[rows].set(values, mode="drop")
