"""The shared cache of Linen models, in the ``cache`` collection, through each transformation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from pyagent_kv_jax import InvalidArgumentError, PagedKVCache, ShapeMismatchError
from pyagent_kv_jax.flax.linen import apply_with_cache, attend, cache_collection, cache_of, has_cache
from tests.flax.test_shared_kv_cache import (
    CONFIG,
    DIM,
    FEATURES,
    HEADS,
    KV_HEADS,
    LAYERS,
    LENS,
    ROWS,
    TOKENS,
    WINDOWS,
    Block,
    poisoned,
    sequences,
    steps,
    windows,
)


class Layer(nn.Module):
    """``Block`` in Linen, which finds the cache by itself, or is handed ``attend``."""

    def setup(self) -> None:
        self.qkv = nn.Dense((HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Dense(FEATURES)

    def __call__(self, x: jax.Array, layer: Any, window: Any, paged: Callable[..., Any] | None = None) -> jax.Array:
        heads = self.qkv(x).reshape(*x.shape[:-1], -1, DIM)
        q, k, v = jnp.split(heads, (HEADS, HEADS + KV_HEADS), axis=-2)
        out = (paged or partial(attend, self))(layer, q, k, v, sliding_window=window)
        return x + self.out(out.reshape(*x.shape[:-1], -1))


class Model(nn.Module):
    """Layers in a list."""

    def setup(self) -> None:
        self.layers = [Layer() for _ in range(LAYERS)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, layer in enumerate(self.layers):
            x = layer(x, index, WINDOWS[index])
        return x


class JittedModel(Model):
    """With ``nn.jit`` on the call, as models from elsewhere have it."""

    __call__ = nn.jit(Model.__call__)


class CarryingLayer(nn.Module):
    """A layer for ``nn.scan`` and ``nn.remat``: the plain cache comes and goes with ``x``."""

    @nn.compact
    def __call__(self, carry: Any, layer: Any, window: Any, meta: Any) -> Any:
        x, cache = carry

        def paged(layer: Any, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
            nonlocal cache
            out, cache = cache.attend(
                layer, *(each.reshape(-1, *each.shape[-2:]) for each in (q, k, v)), meta, **options
            )
            return out.reshape(q.shape)

        return (Layer(name="block")(x, layer, window, paged), cache), None


class ScannedCarry(nn.Module):
    """``nn.scan`` of ``nn.remat``, the cache a part of the carry."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, meta: Any) -> Any:
        scan = nn.scan(
            nn.remat(CarryingLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=LAYERS,
        )
        (x, cache), _ = scan(name="layers")((x, cache), jnp.arange(LAYERS), windows(), meta)
        return x, cache


class FindingLayer(nn.Module):
    """A layer for ``variable_carry``."""

    @nn.compact
    def __call__(self, x: jax.Array, layer: Any, window: Any) -> Any:
        return Layer(name="block")(x, layer, window), None


class ScannedCollection(nn.Module):
    """``nn.scan`` with the collection, which stands where the layers do, as the carry."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            FindingLayer,
            variable_axes={"params": 0},
            variable_carry="cache",
            split_rngs={"params": True},
            in_axes=0,
            length=LAYERS,
        )
        return scan(name="layers")(x, jnp.arange(LAYERS), windows())[0]


def params_of(block: Block) -> dict[str, Any]:
    linear = {"qkv": block.qkv, "out": block.out}
    return {name: {"kernel": each.kernel[...], "bias": each.bias[...]} for name, each in linear.items()}


def listed() -> dict[str, Any]:
    return {f"layers_{layer}": params_of(Block(nnx.Rngs(layer))) for layer in range(LAYERS)}


def stacked() -> dict[str, Any]:
    layers = [params_of(Block(nnx.Rngs(layer))) for layer in range(LAYERS)]
    return {"layers": {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


def by_collection(model: nn.Module, params: Any, x: jax.Array, cache: Any, meta: Any) -> Any:
    return apply_with_cache(model, {"params": params}, cache, meta, x)


def by_collection_of_layers(model: nn.Module, params: Any, x: jax.Array, cache: Any, meta: Any) -> Any:
    variables = {"params": params, "cache": {"layers": cache_collection(cache, meta)}}
    out, changed = model.apply(variables, x, mutable=["cache"])
    return out, cache_of(changed["cache"]["layers"])


def by_carry(model: nn.Module, params: Any, x: jax.Array, cache: Any, meta: Any) -> Any:
    return model.apply({"params": params}, x, cache, meta)


FORMS: dict[str, tuple[Any, Any, Any]] = {
    "nn.jit": (JittedModel, listed, by_collection),
    "nn.scan and nn.remat, carried": (ScannedCarry, stacked, by_carry),
    "nn.scan, variable_carry": (ScannedCollection, stacked, by_collection_of_layers),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_decode_as_dense_and_in_place(form: str) -> None:
    create, params_in, run = FORMS[form]
    model, params = create(), params_in()

    def step(params: Any, cache: PagedKVCache, x: jax.Array, lens: jax.Array) -> Any:
        cache, meta = cache.extend(lens, num_tokens=TOKENS)
        return run(model, params, x, cache, meta)

    cache, (_, wanted) = poisoned(), sequences()
    arguments = (params, cache, jnp.ones((1, TOKENS, FEATURES)), jnp.ones(ROWS, int))
    compiled = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes / 20
    for tokens, lens, at in steps():
        out, cache = compiled(params, cache, jnp.asarray(tokens), jnp.asarray(lens))
        want = [wanted[row][position] for row, position in at]
        np.testing.assert_allclose(out[0, : len(at)], want, atol=1e-5, rtol=1e-5)
    assert cache.table.num_tokens.tolist() == (LENS + 3).tolist()


def test_parameters_are_made_without_a_cache() -> None:
    made = jax.eval_shape(JittedModel().init, jax.random.key(0), jnp.ones((1, 4, FEATURES)))
    assert made.keys() == {"params"}
    chex.assert_trees_all_equal_shapes_and_dtypes(made["params"], listed())


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, params, x = Model(), listed(), jnp.ones((ROWS, 1, FEATURES))
    cache, meta = PagedKVCache.create(CONFIG).extend(jnp.ones(ROWS, int))
    collection = cache_collection(cache, meta)
    with pytest.raises(InvalidArgumentError, match=r"Layer layers_0: .* without a paged cache, want apply_with_cache"):
        model.apply({"params": params}, x)
    with pytest.raises(InvalidArgumentError, match=r'Layer layers_0: .* cannot be written, want .*mutable=\["cache"\]'):
        model.apply({"params": params, "cache": collection}, x)
    with pytest.raises(
        ShapeMismatchError, match=r"Layer layers_0, layer 0: .*\[2, 1, 4, 8\].* 3 tokens in all.* 3 rows of 32"
    ):
        model.apply({"params": params, "cache": collection}, x[:2], mutable=["cache"])
    with pytest.raises(
        InvalidArgumentError, match=r"Layer layers/block: .*under nn.scan, nn.remat or nn.jit of a part"
    ):
        ScannedCollection().apply({"params": stacked(), "cache": collection}, x, mutable=["cache"])
    with pytest.raises(InvalidArgumentError, match=r"Model: got attend\(\) without a paged cache"):
        attend(model, 0, x, x, x)
    with pytest.raises(InvalidArgumentError, match=r"cache_of: got a collection of \['layers'\]"):
        cache_of({"layers": collection})
    with pytest.raises(InvalidArgumentError, match=r"Model: got variables with a collection 'cache'"):
        apply_with_cache(model, {"params": params, "cache": collection}, cache, meta, x)
    assert not has_cache(model)
    assert has_cache(model.bind({"params": params, "cache": collection}))
    assert not has_cache(model.bind({"params": params}))
