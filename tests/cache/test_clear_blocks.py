"""``KVPages.clear_blocks``: the blocks named, in every layer, and nothing else; and in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels.checking import checking
from pyagent_kv_jax import DType, KVCacheConfig, KVPages

CONFIG = KVCacheConfig(num_layers=3, num_heads=2, head_dim=8, v_head_dim=4, num_blocks=7, block_size=4)


def random_pages(config: KVCacheConfig) -> KVPages:
    """Random bits everywhere, so that NaNs and negative zeros are among them."""
    rng = np.random.default_rng(0)
    pages = KVPages.create(config)

    def bits(stored: jax.Array) -> jax.Array:
        return jnp.asarray(rng.integers(1, 255, stored.nbytes, np.uint8).view(stored.dtype).reshape(stored.shape))

    return dataclasses.replace(pages, k_pages=bits(pages.k_pages), v_pages=bits(pages.v_pages))


def by_block(stored: jax.Array) -> np.ndarray:
    """Bytes [layers, blocks, bytes of a page], so that NaNs compare."""
    return np.ascontiguousarray(stored).view(np.uint8).reshape(3, 7, -1)


@pytest.mark.parametrize("dtype", list(DType))
def test_only_the_blocks_named_are_cleared(dtype: DType) -> None:
    pages = random_pages(dataclasses.replace(CONFIG, dtype=dtype))
    cleared = jax.jit(KVPages.clear_blocks)(pages, jnp.array([6, -1, 2, 2, 7, 100]))
    for before, after in ((pages.k_pages, cleared.k_pages), (pages.v_pages, cleared.v_pages)):
        wanted = by_block(before).copy()
        wanted[:, [6, 2]] = 0
        np.testing.assert_array_equal(by_block(after), wanted)


def test_an_id_outside_the_pool_is_reported_in_checking_mode() -> None:
    with checking():
        checked = checkify.checkify(jax.jit(KVPages.clear_blocks))
        error, _ = checked(random_pages(CONFIG), jnp.array([7]))
    with pytest.raises(checkify.JaxRuntimeError, match="want -1 or 0 to 6"):
        error.throw()


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FP8])
def test_clearing_is_in_place(dtype: DType) -> None:
    """Over 1 GiB of pages that are never made."""
    config = KVCacheConfig(num_layers=2, num_heads=1, head_dim=128, num_blocks=1_000_000, block_size=4, dtype=dtype)
    pages = jax.eval_shape(lambda: KVPages.create(config))
    ids = jax.ShapeDtypeStruct((256,), jnp.int32)
    memory = jax.jit(KVPages.clear_blocks, donate_argnums=0).lower(pages, ids).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pages.k_pages.size * 2 * pages.k_pages.dtype.itemsize >= 2**30
    assert memory.temp_size_in_bytes < 8 * 2**20
