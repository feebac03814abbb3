"""Every strategy against a float64 merge, bit by bit between ranks, and against what its program may contain."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.merge_attention_states import reference as merge_reference
from pyagent_kv_jax.distributed import all_reduce
from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy, all_reduce_states
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError
from tests.distributed.hlo import collectives

TOKENS, HEADS, DIM = 5, 3, 4  # 15 rows: few sizes divide them
ROWS = TOKENS * HEADS
SIZES = range(1, 9)


def mesh_of(size: int, name: str = "ranks") -> Mesh:
    return jax.make_mesh((size,), (name,), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:size])


def on_ranks(size: int, strategy: str, reduce: Callable[..., tuple[jax.Array, jax.Array]]) -> jax.stages.Wrapped:
    """Of out [ranks, T, H, D] and lse [ranks, T, H], every rank's result."""
    one_each = partial(jax.shard_map, mesh=mesh_of(size), in_specs=P("ranks"), out_specs=P("ranks"), check_vma=False)
    return jax.jit(one_each(lambda out, lse: reduce(out, lse, "ranks", size, strategy)))


@cache
def compiled(size: int, strategy: AllReduceStrategy) -> jax.stages.Compiled:
    shapes = jax.ShapeDtypeStruct((size, TOKENS, HEADS, DIM), jnp.float32)
    lses = jax.ShapeDtypeStruct((size, TOKENS, HEADS), jnp.float32)
    return on_ranks(size, strategy, all_reduce_states).lower(shapes, lses).compile()


def merged(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The merge over the first axis in float64, one head of one token after another."""
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for at in np.ndindex(lse.shape):
        seen = [rank for rank in range(len(outs)) if np.isfinite(lses[(rank, *at)])]
        if seen:
            weights = np.array([lses[(rank, *at)] for rank in seen], np.float64)
            top = weights.max()
            lse[at] = top + np.log(np.exp(weights - top).sum())
            out[at] = sum(
                np.exp(w - lse[at]) * outs[(r, *at)].astype(np.float64) for r, w in zip(seen, weights, strict=True)
            )
    return out, lse


def random_states(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """States of which many saw nothing, with NaN in them; some rows that nobody saw; LSEs far apart."""
    rng = np.random.default_rng(seed)
    outs = rng.normal(size=(size, TOKENS, HEADS, DIM)).astype(np.float32)
    lses = rng.normal(scale=[1, 30, 3][seed % 3], size=(size, TOKENS, HEADS)).astype(np.float32)
    empty = rng.random(lses.shape) < 0.3
    empty[:, 1] = True
    lses[empty] = rng.choice([-np.inf, -np.inf, np.nan, np.inf], size=int(empty.sum()))
    outs[empty] = np.nan
    return outs, lses


def assert_states_close(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    for rank in range(len(got[0])):
        np.testing.assert_allclose(got[0][rank], want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1][rank], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", AllReduceStrategy)
def test_every_rank_gets_the_merge_of_all(strategy: AllReduceStrategy, size: int) -> None:
    for seed in range(6):
        outs, lses = random_states(seed, size)
        got = jax.device_get(compiled(size, strategy)(outs, lses))
        chex.assert_tree_all_finite(got[0])
        assert_states_close(got, merged(outs, lses))
        for part in got:  # the very same bits on all ranks
            assert {rank.tobytes() for rank in part} == {part[0].tobytes()}


def test_one_rank_keeps_its_state_to_the_bit() -> None:
    outs, lses = random_states(3, 1)
    for strategy in AllReduceStrategy:
        out, lse = jax.device_get(compiled(1, strategy)(outs, lses))
        seen = np.isfinite(lses)
        np.testing.assert_array_equal(lse, np.where(seen, lses, -np.inf))
        np.testing.assert_array_equal(out, np.where(seen[..., None], outs, 0))


@pytest.mark.parametrize("size", SIZES)
def test_programs_hold_the_collectives_they_name(size: int) -> None:
    state = 4 * ROWS * (DIM + 1)
    power = 1 << (size.bit_length() - 1)
    steps, folds = power.bit_length() - 1, [state] if size > power else []
    piece = 4 * -(-ROWS // size) * (DIM + 1)
    padded = 4 * -(-ROWS // power) * power * (DIM + 1)
    halves = [padded >> k for k in range(1, steps + 1)]
    folds_of_pieces = [padded] if folds else []
    sent = {
        AllReduceStrategy.RING: [piece] * (2 * (size - 1)),
        AllReduceStrategy.TREE: folds + [state] * steps + folds,
        AllReduceStrategy.RECURSIVE: folds_of_pieces + halves + halves[::-1] + folds_of_pieces,
    }
    want = {strategy: [("collective-permute", count) for count in counts] for strategy, counts in sent.items()}
    want[AllReduceStrategy.NCCL] = [("all-reduce", 4 * ROWS), ("all-reduce", state)]
    for strategy in AllReduceStrategy:
        expected = [] if size == 1 else sorted(want[strategy])
        assert collectives(compiled(size, strategy)) == expected, strategy


@pytest.mark.parametrize("strategy", AllReduceStrategy)
def test_half_precision_is_merged_in_float32(strategy: AllReduceStrategy) -> None:
    outs, lses = random_states(0, 3)
    rounded = jnp.asarray(outs, jnp.bfloat16)
    got, lse = on_ranks(3, strategy, all_reduce_states)(rounded, lses)
    assert got.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    want, _ = merged(np.asarray(rounded, np.float32), lses)
    chex.assert_trees_all_close(np.asarray(got[2], np.float32), want.astype(np.float32), rtol=2**-8, atol=1e-6)


def in_base_two(module: types.ModuleType, **replaced: object) -> types.ModuleType:
    """A copy of ``module`` that takes 2 for e."""
    assert module.__file__
    source = pathlib.Path(module.__file__).read_text()
    wrong = source.replace("jnp.exp(", "jnp.exp2(").replace("jnp.log(", "jnp.log2(")
    assert wrong != source
    copy = types.ModuleType(module.__name__)
    exec(compile(wrong, module.__file__, "exec"), copy.__dict__)
    copy.__dict__.update(replaced)
    return copy


@pytest.mark.parametrize("strategy", AllReduceStrategy)
def test_a_merge_in_base_two_turns_the_comparison_red(strategy: AllReduceStrategy) -> None:
    outs, lses = random_states(0, 2)
    want = merged(outs, lses)
    assert_states_close(jax.device_get(compiled(2, strategy)(outs, lses)), want)
    wrong_merge = in_base_two(merge_reference).merge_attention_states
    wrong = in_base_two(all_reduce, merge_attention_states=lambda outs, lses, implementation: wrong_merge(outs, lses))
    got = jax.device_get(on_ranks(2, strategy, wrong.all_reduce_states)(outs, lses))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_states_close(got, want)


def test_other_axes_of_the_mesh_are_left_alone() -> None:
    devices = jax.devices("cpu")[:6]
    mesh = jax.make_mesh((2, 3), ("rows", "context"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    outs, lses = random_states(1, 6)
    for strategy in AllReduceStrategy:
        reduce = partial(all_reduce_states, axis_name="context", axis_size=3, strategy=strategy)
        specs = P(("rows", "context"))
        run = jax.shard_map(reduce, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        got = jax.device_get(jax.jit(run)(outs, lses))
        for row in (0, 3):
            mine = tuple(part[row : row + 3] for part in got)
            assert_states_close(mine, merged(outs[row : row + 3], lses[row : row + 3]))


def call(out: jax.Array, lse: jax.Array, *, axis: str = "ranks", size: int = 2, strategy: str = "ring") -> None:
    run = partial(all_reduce_states, axis_name=axis, axis_size=size, strategy=strategy)
    jax.eval_shape(jax.shard_map(run, mesh=mesh_of(2), in_specs=P(), out_specs=P(), check_vma=False), out, lse)


def test_bad_arguments_are_refused() -> None:
    out, lse = jnp.ones((5, 3, 4)), jnp.ones((5, 3))
    call(out, lse)
    with pytest.raises(InvalidArgumentError, match=r"strategy: got 'star', want one of \['nccl', 'ring', 'tree'"):
        call(out, lse, strategy="star")
    with pytest.raises(InvalidArgumentError, match="axis_name: got 'columns', want an axis of the mesh"):
        call(out, lse, axis="columns")
    with pytest.raises(InvalidArgumentError, match="axis_size: got 3, want 2, the size of axis 'ranks'"):
        call(out, lse, size=3)
    with pytest.raises(ShapeMismatchError, match=r"lse: got float32\[5, 4\], want float32\[5, 3\]"):
        call(out, jnp.ones((5, 4)))
    with pytest.raises(ShapeMismatchError, match=r"lse: got bfloat16\[5, 3\], want float32"):
        call(out, lse.astype(jnp.bfloat16))
    with pytest.raises(ShapeMismatchError, match=r"out: got int32\[5, 3, 4\], want floating"):
        call(out.astype(jnp.int32), lse)
