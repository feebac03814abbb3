"""Attention modules whose kernels and pages lie on a mesh give what those on one device give."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax import CacheSharding, ConfigError
from pyagent_kv_jax.flax import PagedMultiHeadAttention
from pyagent_kv_jax.flax.linen import PagedMultiHeadDotProductAttention
from tests.flax import numpy_attention

ROWS, LONGEST, FEATURES = 3, 20, 16
SIZES: dict[str, Any] = {"num_heads": 8, "qkv_features": 32, "num_kv_heads": 2}
LENGTHS = jnp.array([5, 0, 2], jnp.int32)


def mesh(axis_type: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    devices = np.array(jax.devices()[: np.prod(list(axes.values()))])
    return Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (ROWS, 6, FEATURES))


def check(params: Any, tokens: jax.Array, prompts: Any, following: Any) -> None:
    """``prompts`` [rows, 5, features] of ``LENGTHS``, ``following`` one token more each."""
    for row, length in enumerate(LENGTHS):
        x = jnp.concatenate([tokens[row, :length], tokens[row, 5:]])
        got = np.concatenate([prompts[row, :length], following[row]])
        np.testing.assert_allclose(got, numpy_attention.attend(jax.device_get(params), x), atol=1e-5, rtol=1e-5)


def nnx_attention(on: Any, **options: Any) -> PagedMultiHeadAttention:
    options |= {"cache_options": {"block_size": 4, "num_blocks": 17}, "cache_sharding": on}
    return PagedMultiHeadAttention(in_features=FEATURES, **SIZES, decode=True, **options, rngs=nnx.Rngs(0))


def test_nnx_heads_over_one_axis_and_tokens_over_another(tokens: jax.Array) -> None:
    on = mesh(tp=2, dcp=2)
    init = nnx.initializers.lecun_normal()
    with jax.set_mesh(on):
        attention = nnx_attention(
            on,
            kernel_init=nnx.with_partitioning(init, (None, "tp", None)),
            out_kernel_init=nnx.with_partitioning(init, ("tp", None, None)),
        )
    attention.init_cache((ROWS, LONGEST, FEATURES))
    pages = attention.paged_cache.get_value().pages
    assert attention.query.kernel.get_value().sharding.is_equivalent_to(NamedSharding(on, P(None, "tp")), 3)
    place = NamedSharding(on, P(None, "tp", "dcp", None))
    assert pages.k_pages.sharding.is_equivalent_to(place, 4)

    graph, params, cache = nnx.split(attention, nnx.Param, ...)

    def step(params: Any, cache: Any, x: jax.Array, lengths: jax.Array | None) -> Any:
        module = nnx.merge(graph, params, cache)
        out = module(x, lengths=lengths)
        return out, nnx.state(module, nnx.Not(nnx.Param))

    prefill = jax.jit(step, donate_argnums=1).lower(params, cache, tokens[:, :5], LENGTHS).compile()
    memory, on_device = prefill.memory_analysis(), pages.nbytes / 4
    assert memory.alias_size_in_bytes >= on_device
    gathers = [line for line in prefill.as_text().splitlines() if " all-gather(" in line]
    assert gathers  # of queries, over the context axis
    assert not any("f32[17," in line for line in gathers)  # no rank is sent another's pages
    prompts, cache = prefill(params, cache, tokens[:, :5], LENGTHS)
    assert cache["paged_cache"].get_value().pages.k_pages.sharding.is_equivalent_to(place, 4)
    following, cache = jax.jit(step)(params, cache, tokens[:, 5:], None)
    check(nnx.to_pure_dict(params), tokens, prompts, following)


def test_linen_heads_over_an_axis_of_another_name(tokens: jax.Array) -> None:
    """Kernels boxed by Linen and laid out by ``nn.get_sharding``; the cache is made within ``jit``."""
    on = mesh(model=2)
    init = nn.initializers.lecun_normal()
    attention = PagedMultiHeadDotProductAttention(
        **SIZES,
        decode=True,
        kernel_init=nn.with_partitioning(init, (None, "model", None)),
        out_kernel_init=nn.with_partitioning(init, ("model", None, None)),
        cache_sharding=CacheSharding(on, tensor_axis="model"),
    )

    def make() -> Any:
        return attention.init(jax.random.key(0), jnp.ones((ROWS, LONGEST, FEATURES)))

    variables = jax.jit(make)()
    params = jax.device_put(variables["params"], nn.get_sharding(variables["params"], on))
    assert nn.unbox(params)["query"]["kernel"].sharding.spec == P(None, "model", None)
    cache = variables["cache"]
    assert cache["paged_cache"].pages.k_pages.sharding.spec[1] == "model"
    step = jax.jit(lambda variables, x, **lengths: attention.apply(variables, x, **lengths, mutable=["cache"]))
    prompts, new = step({"params": params, "cache": cache}, tokens[:, :5], lengths=LENGTHS)
    following, new = step({"params": params, **new}, tokens[:, 5:])
    assert new["cache"]["paged_cache"].pages.k_pages.sharding.spec[1] == "model"
    check(nn.unbox(params), tokens, prompts, following)


def test_meshes_that_will_not_do_are_refused() -> None:
    with pytest.raises(ConfigError, match="want axes 'dcp' and 'tp'"):
        nnx_attention(mesh(model=2))
    explicit = mesh(AxisType.Explicit, tp=2)
    with jax.set_mesh(explicit):
        attention = nnx_attention(explicit)
        with pytest.raises(ConfigError, match=r"PagedMultiHeadAttention: got a mesh .*=\(AxisType.Auto,\) \* 1"):
            attention.init_cache((ROWS, LONGEST, FEATURES))
    with pytest.raises(ConfigError, match="num_heads: got 2 KV heads over 3 ranks"):
        nnx_attention(dataclasses.replace(CacheSharding.of(mesh(tp=3)))).init_cache((ROWS, LONGEST, FEATURES))
