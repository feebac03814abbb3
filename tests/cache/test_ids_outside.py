"""Ids, slots and tables of ``KVPages`` that name what the pool does not have: never the same of the next layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import checking
from pyagent_kv_jax import KVCacheConfig
from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.cache.kv_pages import KVPages
from pyagent_kv_jax.config import DeviceType, DType

CONFIG = KVCacheConfig(
    num_layers=3, num_heads=2, head_dim=8, num_blocks=7, block_size=4, dtype=DType.FLOAT32, device=DeviceType.CPU
)
OUTSIDE = jnp.array([7, 8, 13, 21, 2**31 - 1])


def random_pages() -> KVPages:
    pages, rng = KVPages.create(CONFIG), np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in (pages.k_pages, pages.v_pages))
    return dataclasses.replace(pages, k_pages=k, v_pages=v)


def write(pages: KVPages, slots: jax.Array) -> KVPages:
    tokens = jnp.ones((len(slots), 2, 8))
    return pages.write(jnp.int32(0), tokens, tokens, slots)


CALLS = {
    "copy from": lambda pages: pages.copy_blocks(OUTSIDE, jnp.arange(5)),
    "copy to": lambda pages: pages.copy_blocks(jnp.arange(5), OUTSIDE),
    "clear": lambda pages: pages.clear_blocks(OUTSIDE),
    "write": lambda pages: write(pages, OUTSIDE * 4),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_changed(call) -> None:
    pages = random_pages()
    after = jax.jit(call)(pages)
    np.testing.assert_array_equal(after.k_pages, pages.k_pages)
    np.testing.assert_array_equal(after.v_pages, pages.v_pages)


def test_nothing_is_read() -> None:
    pages = random_pages()
    for gathered in jax.jit(KVPages.gather_blocks)(pages, OUTSIDE):
        assert gathered.shape[:2] == (3, 5)
        assert not gathered.any()


def attend(pages: KVPages, table: jax.Array) -> jax.Array:
    arrays = {"block_tables": table, "kv_lens": jnp.array([5]), "query_start_loc": None}
    arrays |= {"slot_mapping": jnp.array([-1]), "positions": jnp.array([4]), "ok": jnp.array([True])}
    kv = jnp.ones((1, 2, 8))
    return pages.attend(jnp.int32(0), jnp.ones((1, 4, 8)), kv, kv, AttentionMetadata(**arrays))[0]


@pytest.mark.parametrize(
    "call", [*CALLS.values(), lambda pages: pages.gather_blocks(OUTSIDE), lambda p: attend(p, jnp.array([[3, 7]]))]
)
def test_it_is_reported_in_checking_mode(call) -> None:
    with checking():
        error, _ = checkify.checkify(jax.jit(call))(random_pages())
    with pytest.raises(checkify.JaxRuntimeError, match="want -1 or 0 to"):
        error.throw()


def test_chunks_reach_the_kernel() -> None:
    """Query 4 is the first of its chunk of 4: it sees itself alone."""
    pages, rng = random_pages(), np.random.default_rng(1)
    table, q, k, v = jnp.array([[2, 5]]), *(jnp.asarray(rng.normal(size=(1, 2, 8)), jnp.float32) for _ in range(3))
    arrays = {"block_tables": table, "kv_lens": jnp.array([5]), "query_start_loc": None}
    arrays |= {"slot_mapping": jnp.array([20]), "positions": jnp.array([4]), "ok": jnp.array([True])}
    out, _ = pages.attend(jnp.int32(1), q, k, v, AttentionMetadata(**arrays), chunk_size=4)
    np.testing.assert_allclose(out, v, rtol=1e-6)
