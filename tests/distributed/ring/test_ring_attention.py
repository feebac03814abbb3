"""Ring attention against float64 numpy; what it sends; that no rank idles."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.distributed.ring import tiles
from pyagent_kv_jax.distributed.ring.ring_attention import ring_attention, ring_attention_on_rank
from pyagent_kv_jax.distributed.ring.zigzag import chunk_pairs, zigzag_positions, zigzag_shard, zigzag_unshard
from pyagent_kv_jax.errors import InvalidArgumentError, ShapeMismatchError
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh

BATCH, Q_HEADS, KV_HEADS, DIM, V_DIM = 3, 4, 2, 8, 6


def inputs(seed: int, seq: int, lens: Any = None) -> tuple[np.ndarray, ...]:
    """q, k, v in the order of the sequence; NaN in the padding."""
    rng = np.random.default_rng(seed)
    shapes = (Q_HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM)
    arrays = tuple(rng.normal(size=(BATCH, seq, *shape)).astype(np.float32) for shape in shapes)
    if lens is not None:
        for array in arrays:
            for row, length in enumerate(lens):
                array[row, length:] = np.nan
    return arrays


def attention(
    q: Any,
    k: Any,
    v: Any,
    lens: Any = None,
    *,
    scale: Any = None,
    window: Any = None,
    cap: Any = None,
    sinks: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention in float64, one query and head at a time."""
    batch, seq, heads, d = q.shape
    out, lse = np.zeros((batch, seq, heads, v.shape[-1])), np.full((batch, seq, heads), -np.inf)
    for row in range(batch):
        for at in range(seq if lens is None else lens[row]):
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(heads):
                of = head // (heads // k.shape[2])
                logits = k[row, first : at + 1, of].astype(np.float64) @ q[row, at, head].astype(np.float64)
                logits *= 1 / np.sqrt(d) if scale is None else scale
                logits = logits if cap is None else cap * np.tanh(logits / cap)
                total = np.exp(logits).sum() + (0 if sinks is None else np.exp(np.float64(sinks[head])))
                out[row, at, head] = np.exp(logits) @ v[row, first : at + 1, of] / total
                lse[row, at, head] = np.log(total)
    return out, lse


def in_ring(size: int, q: Any, k: Any, v: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Arrays in the order of the sequence, and results too."""
    q, k, v = (zigzag_shard(x, size) for x in (q, k, v))
    results = ring_attention(q, k, v, mesh=cpu_mesh(ring=size), axis="ring", return_lse=True, **options)
    return tuple(zigzag_unshard(x, size) for x in results)


def assert_close(got: Any, want: Any) -> None:
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(mine), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_against_float64(size: int) -> None:
    """Whole sequences; padded ones, shorter than there are ranks; and everything at once, in one program."""
    seq, sinks = 2 * size * 3, np.random.default_rng(size).normal(size=Q_HEADS).astype(np.float32)
    run = jax.jit(partial(in_ring, size))
    for seed, lens, window in ((0, [seq] * BATCH, seq), (1, [seq - 1, 1, 0], 4), (2, [2, seq, seq // 2 + 1], 3)):
        arrays = inputs(seed, seq, lens)
        numbers = {"scale": np.float32(0.5), "logits_soft_cap": np.float32(3)}
        got = run(*arrays, kv_lens=np.array(lens, np.int32), sliding_window=np.int32(window), sinks=sinks, **numbers)
        assert_close(got, attention(*arrays, lens, scale=0.5, cap=3, window=window, sinks=sinks))
        for row, length in enumerate(lens):
            assert not np.asarray(got[0])[row, length:].any()
            assert (np.asarray(got[1])[row, length:] == -np.inf).all()


def test_defaults_and_tiles_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of seven tokens in tiles of three: the last tile of queries is padded, that of keys reaches back."""
    monkeypatch.setattr(tiles, "_TILE", 3)
    arrays = inputs(5, 28)
    assert_close(jax.jit(partial(in_ring, 2))(*arrays), attention(*arrays))
    assert_close(jax.jit(partial(in_ring, 2))(*arrays, sliding_window=5), attention(*arrays, window=5))


def test_heads_and_sequences_on_other_axes_and_half_precision() -> None:
    mesh, arrays = cpu_mesh(data=2, ring=2, tp=2), inputs(6, 8)
    arrays = tuple(np.asarray(jnp.asarray(np.concatenate([x, x[:1]]), jnp.bfloat16)) for x in arrays)
    sinks = np.arange(Q_HEADS, dtype=np.float32) / 2
    run = partial(ring_attention, mesh=mesh, axis="ring", tensor_axis="tp", batch_axis="data", return_lse=True)
    out, lse = jax.jit(run)(*(zigzag_shard(x, 2) for x in arrays), sinks=sinks)
    assert out.dtype == jnp.bfloat16
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "ring", "tp")), 4)
    want = attention(*(x.astype(np.float32) for x in arrays), sinks=sinks)
    got = np.asarray(zigzag_unshard(out, 2), np.float32), zigzag_unshard(lse, 2)
    np.testing.assert_allclose(got[0], want[0], rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(np.asarray(got[1]), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_only_keys_and_values_travel(size: int) -> None:
    """Each of K and V is sent C - 1 times, as the rank's own part is; nothing is gathered or reduced."""
    seq, mesh = 4 * size, cpu_mesh(ring=size)
    place = NamedSharding(mesh, P(None, "ring"))
    shapes = ((heads, dim) for heads, dim in ((Q_HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM)))
    arrays = [jax.ShapeDtypeStruct((BATCH, seq, *shape), jnp.float32, sharding=place) for shape in shapes]
    program = jax.jit(partial(ring_attention, mesh=mesh, axis="ring")).lower(*arrays).compile()
    sent = [("collective-permute", 4 * BATCH * 4 * KV_HEADS * dim) for dim in (DIM, V_DIM)]
    assert collectives(program) == sorted(sent * (size - 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_no_rank_idles(size: int) -> None:
    """Every pair of chunks that can matter is computed once, in every step as many by one rank as by another."""
    chunks = [(rank, 2 * size - 1 - rank) for rank in range(size)]
    done = []
    for step in range(size):
        of_step = [chunk_pairs(rank, (rank - step) % size) for rank in range(size)]
        assert {len(pairs) for pairs in of_step} == {2 if step else 3}
        for rank, pairs in enumerate(of_step):
            done += [(chunks[rank][mine], chunks[(rank - step) % size][theirs]) for mine, theirs in pairs]
    assert sorted(done) == [(query, key) for query in range(2 * size) for key in range(query + 1)]
    for rank, source in ((0, 1), (1, 0)):  # as a traced rank has it
        assert [tuple(map(int, pair)) for pair in chunk_pairs(jnp.int32(rank), jnp.int32(source))] == chunk_pairs(
            rank, source
        )


def test_zigzag_order() -> None:
    assert zigzag_positions(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert jax.jit(lambda rank: zigzag_positions(12, 3, rank))(1).tolist() == [2, 3, 8, 9]
    x = np.random.default_rng(0).normal(size=(2, 12, 3))
    moved = np.asarray(zigzag_shard(x, 3))
    np.testing.assert_array_equal(moved, x.astype(moved.dtype)[:, np.asarray(zigzag_positions(12, 3))])
    np.testing.assert_array_equal(zigzag_unshard(moved, 3), x.astype(moved.dtype))
    np.testing.assert_array_equal(zigzag_shard(np.arange(8), 2, dim=0), zigzag_positions(8, 2))


def test_bad_input_is_refused() -> None:
    mesh = cpu_mesh(ring=2, tp=3)
    q, k, v = inputs(0, 8)

    def call(*arrays: Any, axis: str = "ring", **options: Any) -> Any:
        return jax.eval_shape(partial(ring_attention, mesh=mesh, axis=axis, **options), *arrays)

    call(q, k, v)
    with pytest.raises(ShapeMismatchError, match=r"seq: got length 7, want a multiple of 4, .* 2 ranks: pad it to 8"):
        call(q[:, :7], k[:, :7], v[:, :7])
    with pytest.raises(InvalidArgumentError, match=r"axes: got \['rows'\], want different ones of the mesh's \('ring'"):
        call(q, k, v, axis="rows")
    with pytest.raises(InvalidArgumentError, match=r"axes: got \['ring', 'ring'\]"):
        call(q, k, v, tensor_axis="ring")
    with pytest.raises(ShapeMismatchError, match="kv_heads: got 2, want a multiple of 3, the ranks of 'tp'"):
        call(q, k, v, tensor_axis="tp")
    with pytest.raises(ShapeMismatchError, match=r"k: got shape \[3, 8, 3, 8\], want \[3, 8, a divisor of 4, 8\]"):
        call(q, np.ones((3, 8, 3, 8), np.float32), v)
    with pytest.raises(ShapeMismatchError, match=r"v: got shape \[3, 8, 1, 6\], want \[3, 8, 2, v_head_dim\]"):
        call(q, k, v[:, :, :1])
    with pytest.raises(ShapeMismatchError, match=r"q: got int32\[3, 8, 4, 8\], want floating"):
        call(q.astype(np.int32), k, v)
    with pytest.raises(InvalidArgumentError, match=r"kv_lens: got \[9, 0, 1\], want 0 to 8 each"):
        call(q, k, v, kv_lens=[9, 0, 1])
    with pytest.raises(ShapeMismatchError, match=r"kv_lens: got shape \[2\], want \[3\]"):
        call(q, k, v, kv_lens=[1, 2])
    with pytest.raises(ShapeMismatchError, match=r"sinks: got shape \[3\], want \[4\]"):
        call(q, k, v, sinks=np.ones(3, np.float32))
    with pytest.raises(InvalidArgumentError, match="sliding_window: got 0, want at least 1"):
        call(q, k, v, sliding_window=0)
    with pytest.raises(InvalidArgumentError, match=r"chunk_size: got float64\[\], want one integer"):
        call(q, k, v, chunk_size=2.0)
    with pytest.raises(InvalidArgumentError, match=r"logits_soft_cap: got -1\.0, want more than 0"):
        call(q, k, v, logits_soft_cap=-1.0)
    inner = partial(ring_attention_on_rank, axis_name="tp", axis_size=2)
    with pytest.raises(InvalidArgumentError, match="axis_size: got 2, want 3, the size of axis 'tp'"):
        jax.eval_shape(jax.shard_map(inner, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False), q, k, v)
