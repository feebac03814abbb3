"""The buffer against a numpy array, and what it sends counted in bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax import ConfigError, InvalidArgumentError, ShapeMismatchError
from pyagent_kv_jax.tables.cpu_gpu_buffer import CpuGpuBuffer

ROWS, COLS = 9, 5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_writes_arrive_and_nothing_handed_out_changes(data: st.DataObject) -> None:
    buffer, model = CpuGpuBuffer((ROWS, COLS), jnp.int32), np.full((ROWS, COLS), -1, np.int32)
    values = st.integers(-(2**31), 2**31 - 1)
    handed_out: list[tuple[jax.Array, np.ndarray]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["set", "set_row", "set_rows", "get_gpu"]))
        row = data.draw(st.integers(0, ROWS - 1))
        if kind == "set":
            col, value = data.draw(st.integers(0, COLS - 1)), data.draw(values)
            buffer.set(row, col, value)
            model[row, col] = value
        elif kind == "set_row":
            new = data.draw(st.lists(values, max_size=COLS))
            buffer.set_row(row, new)
            model[row] = new + [-1] * (COLS - len(new))
        elif kind == "set_rows":
            rows = data.draw(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS))
            width = data.draw(st.integers(0, COLS))
            new = np.random.default_rng(row).integers(-50, 50, (len(rows), width))
            buffer.set_rows(rows, new)
            model[rows, :width], model[rows, width:] = new, -1
        else:
            handed_out.append((buffer.get_gpu(), model.copy()))
        np.testing.assert_array_equal(buffer.get_cpu(), model)
    handed_out.append((buffer.get_gpu(), model.copy()))
    for array, wanted in handed_out:
        np.testing.assert_array_equal(array, wanted)


def test_only_dirty_rows_are_sent() -> None:
    buffer = CpuGpuBuffer((1000, 64), np.int32)
    whole, a_row = 1000 * 64 * 4, 64 * 4 + 4
    assert buffer.bytes_sent == whole  # at first
    buffer.get_gpu()
    assert buffer.bytes_sent == whole
    for row in (3, 999, 3, 0):
        buffer.set(row, 63, row)
    assert buffer.bytes_sent == whole  # not before it is asked for
    first = buffer.get_gpu()
    assert buffer.bytes_sent == whole + 4 * a_row  # three rows, in the program for four
    assert buffer.get_gpu() is first
    buffer.set_rows(np.arange(500), np.ones((500, 64), int))
    buffer.get_gpu()
    assert buffer.bytes_sent == whole + 4 * a_row + 512 * a_row
    buffer.set_rows(np.arange(501), np.zeros((501, 64), int))
    np.testing.assert_array_equal(buffer.get_gpu(), buffer.get_cpu())
    assert buffer.bytes_sent == 2 * whole + 516 * a_row


def test_elements_rows_and_the_view() -> None:
    buffer = CpuGpuBuffer((2, 3), jnp.float32, jax.devices()[0], fill=0.5)
    buffer.set_row(1, [1, 2.25])
    buffer.set(0, 2, np.nan)
    assert buffer.get(1, 1) == 2.25
    assert isinstance(buffer.get(1, 1), float)
    wanted = [[0.5, 0.5, np.nan], [1, 2.25, 0.5]]
    np.testing.assert_array_equal(buffer.get_gpu(), np.array(wanted, np.float32))
    view = buffer.get_cpu()
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    buffer.set(0, 0, 7)
    assert view[0, 0] == 7
    assert CpuGpuBuffer((1, 2), jnp.uint8, fill=0).get_gpu().dtype == jnp.uint8
    assert CpuGpuBuffer((1, 2), jnp.bfloat16).get_gpu().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (InvalidArgumentError, lambda b: b.set(9, 0, 1), "row: got 9, want 0 to 8"),
        (InvalidArgumentError, lambda b: b.set(0, -1, 1), "col: got -1"),
        (InvalidArgumentError, lambda b: b.set(0, 0, 1.5), "1.5"),
        (InvalidArgumentError, lambda b: b.set(0, 0, 2**31), "int32"),
        (InvalidArgumentError, lambda b: b.set(0, 0, "1"), "want values of int32"),
        (ShapeMismatchError, lambda b: b.set(0, 0, [1]), "one value"),
        (InvalidArgumentError, lambda b: b.get(0, 5), "col: got 5"),
        (InvalidArgumentError, lambda b: b.get(1.0, 0), "row"),
        (ShapeMismatchError, lambda b: b.set_row(0, range(6)), "at most 5"),
        (ShapeMismatchError, lambda b: b.set_row(0, 3), r"shape \(\)"),
        (InvalidArgumentError, lambda b: b.set_row(0, [1, np.nan]), "nan"),
        (InvalidArgumentError, lambda b: b.set_row(-1, [1]), "rows"),
        (InvalidArgumentError, lambda b: b.set_rows([1, 1], [[1], [2]]), "each once"),
        (ShapeMismatchError, lambda b: b.set_rows([1, 2], [[1]]), r"want \[2, at most 5\]"),
        (ShapeMismatchError, lambda b: b.set_rows([1.0], [[1]]), "float64"),
        (ConfigError, lambda b: CpuGpuBuffer((3,), np.int32), "two positive"),
        (ConfigError, lambda b: CpuGpuBuffer((3, 0), np.int32), "two positive"),
        (ConfigError, lambda b: CpuGpuBuffer((3, 1), np.int64), "int32"),
        (InvalidArgumentError, lambda b: CpuGpuBuffer((3, 1), np.uint8), "fill: got"),
    ],
)
def test_bad_input_raises_and_changes_nothing(error: type[Exception], call: object, wanted: str) -> None:
    buffer = CpuGpuBuffer((ROWS, COLS), np.int32)
    buffer.set_row(4, [1, 2, 3])
    before, on_device = buffer.get_cpu().copy(), buffer.get_gpu()
    with pytest.raises(error, match=wanted):
        call(buffer)
    np.testing.assert_array_equal(buffer.get_cpu(), before)
    assert buffer.get_gpu() is on_device
