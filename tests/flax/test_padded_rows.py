"""Padded rows to ragged tokens and back, against a loop in plain Python."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_kv_jax import InvalidArgumentError, ShapeMismatchError
from pyagent_kv_jax.flax.padded_rows import PaddedRows

ROWS, LENGTH, TOKENS = 4, 5, 24  # four tokens more than fit: a step may be padded to any size


def there(x: jax.Array, starts: jax.Array) -> jax.Array:
    return PaddedRows.of(starts, ROWS, LENGTH, TOKENS).ragged(x)


def back(x: jax.Array, starts: jax.Array) -> jax.Array:
    return PaddedRows.of(starts, ROWS, LENGTH, TOKENS).padded(x)


_there, _back = jax.jit(there), jax.jit(back)
_lengths = st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS)


def _starts(lengths: list[int]) -> jax.Array:
    return jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


@settings(max_examples=40, deadline=None)
@given(_lengths)
def test_there_and_back(lengths: list[int]) -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 3)).astype(np.float32)
    real = [(row, index) for row in range(ROWS) for index in range(lengths[row])]
    poisoned = np.full_like(x, np.nan)
    ragged, padded = np.zeros((TOKENS, 3), np.float32), np.zeros_like(x)
    for token, at in enumerate(real):
        poisoned[at] = ragged[token] = padded[at] = x[at]
    np.testing.assert_array_equal(_there(poisoned, _starts(lengths)), ragged)

    ragged[len(real) :] = np.nan
    np.testing.assert_array_equal(_back(ragged, _starts(lengths)), padded)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_every_way_of_calling(self) -> None:
        starts = _starts([2, 0, 5, 1])
        x = jnp.arange(ROWS * LENGTH, dtype=jnp.int32).reshape(ROWS, LENGTH) + 1
        ragged = self.variant(there)(x, starts)
        np.testing.assert_array_equal(ragged, [1, 2, 11, 12, 13, 14, 15, 16] + [0] * 16)
        padded = self.variant(back)(ragged, starts)
        np.testing.assert_array_equal(padded, np.where(np.arange(LENGTH) < [[2], [0], [5], [1]], x, 0))


def test_decode_layout_is_one_token_a_row() -> None:
    x = jnp.arange(ROWS * 2.0).reshape(ROWS, 1, 2)
    tokens = PaddedRows.of(None, ROWS, 1)
    np.testing.assert_array_equal(tokens.ragged(x), x[:, 0])
    np.testing.assert_array_equal(tokens.padded(tokens.ragged(x)), x)
    assert len(jax.tree.leaves(tokens)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PaddedRows.of(None, 4, 2), ShapeMismatchError, r"got 8 tokens in \[4, 2\], want one a row"),
        (lambda: PaddedRows.of(jnp.zeros(4, jnp.int32), 4, 2), ShapeMismatchError, r"got shape \(4,\), want \(5,\)"),
        (lambda: PaddedRows.of(None, 0, 1), InvalidArgumentError, "rows: got 0"),
        (lambda: PaddedRows.of(None, 4, 1).ragged(jnp.zeros((4, 2))), ShapeMismatchError, r"want \[4, 1, ...\]"),
        (lambda: PaddedRows.of(None, 4, 1).padded(jnp.zeros((3, 2))), ShapeMismatchError, r"want \[4, ...\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
