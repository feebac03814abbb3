"""``PagedMultiHeadDotProductAttention`` is Linen's ``MultiHeadDotProductAttention`` with another cache."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import FrozenDict

from pyagent_kv_jax import ConfigError, InvalidArgumentError, OutOfBlocksError, RequestTooLongError, ShapeMismatchError
from pyagent_kv_jax.flax import linen as paged
from pyagent_kv_jax.models.rope import RopeConfig, rotary_table, rotate
from tests.flax import numpy_attention

ROWS, LONGEST, FEATURES = 4, 96, 24
SIZES: dict[str, Any] = {"num_heads": 6, "qkv_features": 48, "out_features": FEATURES, "normalize_qk": True}
OPTIONS: dict[str, Any] = {"decode": True, "bias_init": nn.initializers.normal(0.1)}
FULL = jnp.ones((ROWS, LONGEST, FEATURES))


class Model(nn.Module):
    """A user's: two layers, named by Linen. ``attention`` is all that changes."""

    attention: Any = paged.MultiHeadDotProductAttention
    options: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        for _ in range(2):
            x = x + self.attention(**SIZES, **OPTIONS, **(self.options or {}))(x, **options)
        return x


@partial(jax.jit, static_argnums=0)
def init(model: nn.Module) -> Any:
    return model.init(jax.random.key(0), FULL)


@functools.cache
def applied(model: nn.Module) -> Any:
    return jax.jit(lambda variables, x, **lengths: model.apply(variables, x, **lengths, mutable=["cache"]))


def test_prompts_and_64_decode_steps_of_rows_of_different_lengths() -> None:
    """Against theirs, one token at a time, of the same parameters: those of either load into the other."""
    ours, theirs = Model(), Model(nn.MultiHeadDotProductAttention)
    params, own = init(theirs)["params"], init(ours)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, own["params"])
    chex.assert_trees_all_close(params, own["params"])  # the same keys make them
    cache = own["cache"]
    lengths = np.array([17, 0, 1, 30])
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LONGEST, FEATURES)), jnp.float32)

    @jax.jit
    @chex.assert_max_traces(1)
    def prefill(variables: Any, x: jax.Array, lengths: jax.Array) -> Any:
        return ours.apply(variables, x, lengths=lengths, mutable=["cache"])

    @jax.jit
    @chex.assert_max_traces(1)
    def decode(variables: Any, x: jax.Array) -> Any:
        return ours.apply(variables, x, mutable=["cache"])

    out, new = prefill({"params": params, "cache": cache}, tokens[:, :30], jnp.asarray(lengths, jnp.int32))
    steps = [(lengths, out)]
    for _ in range(64):
        at = steps[-1][0]
        out, new = decode({"params": params, **new}, tokens[jnp.arange(ROWS), at][:, None])
        steps.append((at + 1, out))
        chex.assert_trees_all_equal_shapes_and_dtypes(new["cache"], cache)

    theirs_new, want = {"cache": init(theirs)["cache"]}, []
    for i in range(LONGEST):
        out, theirs_new = applied(theirs)({"params": params, **theirs_new}, tokens[:, i : i + 1])
        want.append(np.asarray(out[:, 0]))
    for row in range(ROWS):
        got = np.stack([*steps[0][1][row, : lengths[row]], *(np.asarray(out[row, 0]) for _, out in steps[1:])])
        np.testing.assert_allclose(got, np.stack(want)[: len(got), row], atol=1e-5, rtol=1e-5)
        exact = np.asarray(tokens[row, : len(got)], np.float64)
        for layer in ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"):
            exact = exact + numpy_attention.attend(params[layer], exact)
        np.testing.assert_allclose(got, exact, atol=1e-5, rtol=1e-5)


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    table = rotary_table(positions.reshape(-1), RopeConfig(10_000.0), x.shape[-1])
    return rotate(x.reshape(-1, *x.shape[2:]), table).reshape(x.shape)


def test_grouped_heads_rope_window_and_chunks() -> None:
    """A prompt in chunks, a step, against the same without a cache, masked by hand."""
    sizes = {**SIZES, "num_kv_heads": 2, "rope": rope, "sliding_window": 6, "cache_options": {"block_size": 4}}
    ours = paged.PagedMultiHeadDotProductAttention(**sizes, **OPTIONS)
    variables = init(ours)
    assert variables["params"]["key"]["kernel"].shape == (FEATURES, 2, 8)
    params, new = variables["params"], {"cache": variables["cache"]}
    x = jax.random.normal(jax.random.key(1), (ROWS, 21, FEATURES))
    step, parts = jax.jit(lambda v, x, lengths: ours.apply(v, x, lengths=lengths, mutable=["cache"])), []
    for start, end in ((0, 12), (12, 20), (20, 21)):
        chunk = jnp.pad(x[:, start:end], ((0, 0), (0, 12 - end + start), (0, 0)), constant_values=jnp.nan)
        out, new = step({"params": params, **new}, chunk, jnp.full(ROWS, end - start, jnp.int32))
        parts.append(out[:, : end - start])
    at = jnp.arange(21)
    seen = (at[:, None] >= at) & (at[:, None] - at < 6)
    want = ours.clone(decode=False).apply({"params": params}, x, mask=seen[None, None])
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-5, rtol=1e-5)
    spread = ours.clone(decode=False).apply({"params": params}, x.reshape(2, 2, 21, -1), mask=seen)
    np.testing.assert_allclose(spread.reshape(want.shape), want, atol=1e-6)
    plain = paged.PagedMultiHeadDotProductAttention(**{**SIZES, "num_kv_heads": 2, "decode": False})
    got = plain.apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0]))
    exact = np.stack([numpy_attention.attend(params, row) for row in x])
    np.testing.assert_allclose(got, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The inputs_kv")
def test_without_decode_it_is_the_same_function_and_init_gives_what_theirs_gives() -> None:
    options = {**SIZES, "dropout_rate": 0.4, "name": "attention"}
    theirs = nn.MultiHeadDotProductAttention(**options)
    x, mask = (
        jax.random.normal(jax.random.key(0), (2, 5, FEATURES)),
        jnp.ones((2, 1, 5, 5), bool).at[:, :, :, 3].set(False),
    )
    variables = theirs.init(jax.random.key(1), x, deterministic=True)
    rngs = {"dropout": jax.random.key(2)}
    for ours in (paged.PagedMultiHeadDotProductAttention, partial(paged.MultiHeadAttention, rope=lambda x, _: x)):
        for call in ({"deterministic": True}, {"deterministic": False, "rngs": rngs}):
            got = ours(**options).apply(variables, x, x * 2, x * 3, mask=mask, **call)
            np.testing.assert_array_equal(got, theirs.apply(variables, x, x * 2, x * 3, mask=mask, **call))
        call = {"deterministic": True, "sow_weights": True, "mutable": ["intermediates"]}
        for module in (ours(**options), theirs):
            _, sown = module.apply(variables, x, inputs_kv=x * 2, **call)
            chex.assert_shape(sown["intermediates"]["attention_weights"][0], (2, 6, 5, 5))
    out, _ = paged.PagedMultiHeadDotProductAttention(**SIZES, decode=True).init_with_output(jax.random.key(3), x)
    want, _ = nn.MultiHeadDotProductAttention(**SIZES, decode=True).init_with_output(jax.random.key(3), x)
    np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
def test_lifted_and_partitioned(lift: Any) -> None:
    """Linen gives them other names, and boxes the kernels; the pages are updated in place under donation."""
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "tp"))
    options = {"kernel_init": kernel_init, "cache_options": {"num_blocks": 4096}}
    ours = Model(lift(paged.MultiHeadDotProductAttention), options)
    variables = ours.init(jax.random.key(0), FULL)
    assert all(isinstance(layer["key"]["kernel"], nn.Partitioned) for layer in variables["params"].values())
    x = jax.random.normal(jax.random.key(1), (ROWS, 1, FEATURES))

    def step(params: Any, cache: Any, x: jax.Array) -> Any:
        return ours.apply({"params": params, "cache": cache}, x, mutable=["cache"])

    compiled = jax.jit(step, donate_argnums=1).lower(variables["params"], variables["cache"], x).compile()
    pages = sum(cache["paged_cache"].pages.nbytes for cache in variables["cache"].values())
    assert compiled.memory_analysis().alias_size_in_bytes >= pages
    assert compiled.memory_analysis().temp_size_in_bytes < pages / 20
    out, new = compiled(variables["params"], variables["cache"], x)
    exact = np.asarray(x, np.float64)
    for layer in nn.unbox(variables["params"]).values():
        exact = exact + np.stack([numpy_attention.attend(layer, row) for row in exact])
    np.testing.assert_allclose(out, exact, atol=1e-5, rtol=1e-5)
    assert [c["paged_cache"].table.num_tokens.tolist() for c in new["cache"].values()] == [[1] * ROWS] * 2


def test_the_collection_goes_to_bytes_and_back() -> None:
    ours = Model()
    variables = init(ours)
    x = jax.random.normal(jax.random.key(2), (ROWS, 1, FEATURES))
    _, new = applied(ours)(variables, x)
    stored = serialization.to_bytes(new)
    restored = serialization.from_bytes({"cache": variables["cache"]}, stored)
    chex.assert_trees_all_equal(restored, new)
    out, _ = applied(ours)({"params": variables["params"], **new}, x)
    again, _ = applied(ours)({"params": variables["params"], **restored}, x)
    np.testing.assert_array_equal(again, out)
    other = Model(options=FrozenDict({"cache_options": {"num_blocks": 3}}))
    with pytest.raises(
        ShapeMismatchError, match=r"pages.k_pages: got float32\[24, 6, 16, 8\], want float32\[3, 6, 16, 8\]"
    ):
        serialization.from_bytes({"cache": jax.eval_shape(lambda: init(other))["cache"]}, stored)


def test_bad_calls_name_the_module_the_cache_and_the_fix() -> None:
    ours = Model()
    variables = init(ours)
    x, one = jnp.ones((ROWS, 2, FEATURES)), "MultiHeadDotProductAttention_0"
    grouped = init(Model(options=FrozenDict({"num_kv_heads": 2})))["cache"]
    zeros = jax.tree.map(jnp.zeros_like, variables["cache"])
    shape = "4 rows x 96 tokens x 6 kv heads x head_dim 8, in blocks of 16"
    fix = r"init\(key, jnp.ones\(\(rows, most tokens, features\)\)\)\['cache'\] makes another"
    for changed, arguments, options, error, message in [
        ({"cache": {}}, (x,), {}, InvalidArgumentError, f"without a cache, want apply.*{fix}"),
        ({}, (x,), {"mutable": False}, InvalidArgumentError, "with a cache that may not change, want .*mutable="),
        (
            {"cache": grouped},
            (x,),
            {},
            ShapeMismatchError,
            f"x 2 kv heads .*want one layer of 6 kv heads x head_dim 8; {fix}",
        ),
        ({"cache": zeros}, (x,), {}, InvalidArgumentError, f"a cache of {shape} whose pool is all zeros.*{fix}"),
        (
            {"cache": {one: {"paged_cache": 3}}},
            (x,),
            {},
            InvalidArgumentError,
            f"of type int, want a PagedKVCache; {fix}",
        ),
        ({}, (x[:3],), {}, ShapeMismatchError, rf"want \[4, n, features\] each, for its cache of {shape}; {fix}"),
        ({}, (FULL,), {"lengths": [1, 97, 1, 1]}, InvalidArgumentError, r"lengths: got \[1, 97, 1, 1\], want 0 to 96"),
        (
            {},
            (jnp.ones((ROWS, 97, FEATURES)),),
            {},
            RequestTooLongError,
            f"row 0 would hold 97 .*cache of {shape}; {fix}",
        ),
        ({}, (x,), {"mask": x > 0}, InvalidArgumentError, "got mask in decode"),
        ({}, (x,), {"sow_weights": True}, InvalidArgumentError, "got sow_weights in decode"),
    ]:
        with pytest.raises(error, match=f"(?s){one}: .*{message}"):
            ours.apply({**variables, **changed}, *arguments, **{"mutable": ["cache"], **options})
    for fields, error, message in [
        ({"num_kv_heads": 4}, ConfigError, "48 features, 6 heads and 4 KV heads"),
        ({"dropout_rate": 0.1, "deterministic": False}, InvalidArgumentError, "got dropout in decode"),
        ({"attention_fn": lambda q, k, v: q}, InvalidArgumentError, "got attention_fn in decode"),
    ]:
        with pytest.raises(error, match=message):
            Model(options=FrozenDict(fields)).apply(variables, x, mutable=["cache"])
    with pytest.raises(InvalidArgumentError, match="without decode"):
        paged.PagedMultiHeadDotProductAttention(6).apply({}, x, lengths=[1, 1, 1, 1])
    with pytest.raises(InvalidArgumentError, match="beside inputs_kv"):
        ours.apply(variables, x, inputs_k=x, inputs_kv=x, mutable=["cache"])


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_step_is_a_pure_function(self) -> None:
        ours = Model()
        variables = init(ours)
        x = jax.random.normal(jax.random.key(2), (ROWS, 1, FEATURES))
        step = self.variant(lambda variables, x: ours.apply(variables, x, mutable=["cache"]))
        (out, new), (again, same) = (step(variables, x) for _ in range(2))  # the same cache twice
        chex.assert_trees_all_equal((again, same), (out, new))
        closed, _ = self.variant(lambda x: ours.apply(variables, x, mutable=["cache"]))(x)  # variables as constants
        np.testing.assert_array_equal(closed, out)
        want, want_new = applied(ours)(variables, x)
        chex.assert_trees_all_close((out, new), (want, want_new), atol=1e-6)


def test_rows_that_cannot_be_served_give_nan_under_jit() -> None:
    ours = Model(options=FrozenDict({"cache_options": {"num_blocks": 3}}))
    variables = init(ours)
    x = jax.random.normal(jax.random.key(2), (ROWS, 1, FEATURES))
    out, new = applied(ours)(variables, x)
    assert jnp.isnan(out).any(axis=(1, 2)).tolist() == [False, False, False, True]
    held = [c["paged_cache"].table.num_tokens.tolist() for c in new["cache"].values()]
    assert held[0] == [1, 1, 1, 0]
    with pytest.raises(OutOfBlocksError, match="row 3: got 1 tokens after 0, want what fits into 3 free blocks"):
        ours.apply(variables, x, mutable=["cache"])
