"""Number formats made by hand, against the library's own, for every value there is or near enough."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import number_format
from pallas_kernels.nvidia import Gpu
from pallas_kernels.triton_numbers import decode, encode, round_half_to_even, viewed

A100 = Gpu("NVIDIA A100-SXM4-80GB", 80, 108)
FP8 = [jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)]
EVERY_BYTE = jnp.arange(256, dtype=jnp.uint8)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_decode_every_fp8_without_instructions_for_it(dtype: jnp.dtype) -> None:
    one_by_one, in_pairs = viewed(EVERY_BYTE[:255], dtype, A100), viewed(EVERY_BYTE, dtype, A100)
    assert (one_by_one.dtype, in_pairs.dtype) == (jnp.uint8, jnp.uint16)
    for wanted in (jnp.float32, jnp.float16, jnp.bfloat16):
        expected = number_format.decode(EVERY_BYTE, dtype).astype(wanted)
        for stored in (one_by_one, in_pairs):
            got = decode(stored, dtype, jnp.dtype(wanted), A100)
            assert got.dtype == wanted
            np.testing.assert_array_equal(got.astype(jnp.float32), expected[: got.size].astype(jnp.float32))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_encode_fp8_without_instructions_for_it(dtype: jnp.dtype) -> None:
    every = number_format.decode(EVERY_BYTE, dtype)
    halfway = ((every[:, None] + every[None, :]) / 2).reshape(-1)
    rng = np.random.default_rng(0)
    random = jnp.asarray(rng.standard_normal(20000) * 10.0 ** rng.uniform(-8, 6, 20000), jnp.float32)
    values = jnp.concatenate([every, halfway, jnp.nextafter(halfway, jnp.inf), random, jnp.array([-0.0, jnp.inf])])
    got = jax.jit(lambda x: encode(x, dtype, A100))(values)
    expected = jax.jit(lambda x: number_format.encode(x, jnp.uint8, dtype))(values)
    is_nan = jnp.isnan(values)
    np.testing.assert_array_equal(got[~is_nan], expected[~is_nan])
    assert jnp.isnan(jax.lax.bitcast_convert_type(got[is_nan], dtype).astype(jnp.float32)).all()


def test_encode_int8() -> None:
    values = jnp.concatenate([jnp.arange(-300, 300) / 2, jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.49999997])])
    int8 = jnp.dtype(jnp.int8)
    np.testing.assert_array_equal(encode(values, int8, A100), number_format.encode(values, jnp.uint8, int8))


def test_round_half_to_even() -> None:
    values = jnp.arange(-1001, 1001, dtype=jnp.float32) / 4
    np.testing.assert_array_equal(round_half_to_even(values), jnp.round(values))
