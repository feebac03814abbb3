"""Rotary frequencies and rotation beside formulas written out in plain numpy."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax.models.rope import RopeConfig, rotary_table, rotate


def llama3_by_wavelength(theta, head_dim, factor, low, high, original):
    """The published rule: one decision for each frequency, by its wavelength."""
    result = []
    for i in range(0, head_dim, 2):
        frequency = 1.0 / theta ** (i / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            result.append(frequency)
        elif wavelength > original / low:
            result.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result)


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "low", "high", "original"),
    [
        (500_000.0, 128, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500_000.0, 64, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (10_000.0, 16, 4.0, 1.5, 5.0, 32),
    ],
)
def test_llama3_scaling(theta, head_dim, factor, low, high, original):
    rope = RopeConfig(theta, "llama3", factor, low, high, original)
    want = llama3_by_wavelength(theta, head_dim, factor, low, high, original)
    plain = RopeConfig(theta).inverse_frequencies(head_dim)
    assert 0 < np.sum(np.isclose(want, plain)) < want.size  # the case has both kept and changed frequencies
    chex.assert_trees_all_close(rope.inverse_frequencies(head_dim), want.astype(np.float32), rtol=1e-6)


def test_linear_scaling_is_position_divided():
    positions = jnp.arange(0, 400, 4)
    scaled = rotary_table(positions, RopeConfig(kind="linear", factor=4.0), 32)
    plain = rotary_table(positions // 4, RopeConfig(), 32)
    chex.assert_trees_all_close(scaled, plain, atol=1e-5)


def test_rotation_is_a_complex_product():
    draw = np.random.default_rng(0)
    x, positions = draw.normal(size=(7, 3, 16)), draw.integers(0, 2000, 7)
    frequencies = 10_000.0 ** -(np.arange(8) / 8)
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * positions[:, None] * frequencies)[:, None]
    got = rotate(jnp.array(x, jnp.float32), rotary_table(jnp.array(positions), RopeConfig(), 16))
    chex.assert_shape(got, (7, 3, 16))
    chex.assert_trees_all_close(got, np.concatenate([turned.real, turned.imag], -1).astype(np.float32), atol=1e-3)


def test_rotation_keeps_the_dtype_and_works_in_float32():
    x = jnp.array(np.random.default_rng(1).normal(size=(3, 2, 16)), jnp.bfloat16)
    table = rotary_table(jnp.array([1023, 5, 77]), RopeConfig(), 16)
    assert rotate(x, table).dtype == jnp.bfloat16
    chex.assert_trees_all_close(rotate(x, table), rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16), atol=0)
