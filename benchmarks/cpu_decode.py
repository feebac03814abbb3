"""Paged decode attention on a CPU, beside torch on a contiguous cache and beside the memory's read bandwidth.

    python -m benchmarks.cpu_decode --json FILE

The baselines are several ways to say the same in torch (``scaled_dot_product_attention``), a row each; without
torch, gather-then-attend in JAX. The limit is the bytes of K and V that must be read, over the fastest of several
ways to read as many bytes, in the same run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Row, argument_parser, fastest, medians_us, publish
from pallas_kernels import paged_attention

Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
UNIFORM = np.full(32, 2048)
RAGGED = np.random.default_rng(0).permutation(np.geomspace(64, 4096, 32).astype(int))

Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Decode:
    """One decode step: q [seqs, q_heads, head_dim], pages in random order, tables with -1 tails."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    tables: jax.Array
    kv_lens: jax.Array

    @classmethod
    def create(cls, kv_lens: NDArray[Any]) -> Decode:
        """Random numbers for sequences of these lengths, blocks scattered over the whole pool."""
        counts = -(-kv_lens // BLOCK_SIZE)
        pages = np.random.default_rng(1).permutation(counts.sum()).astype(np.int32)
        tables = np.full((len(kv_lens), counts.max()), -1, np.int32)
        for row, ids in zip(tables, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
            row[: len(ids)] = ids
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (len(pages), KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        return cls(
            jax.random.normal(keys[0], (len(kv_lens), Q_HEADS, HEAD_DIM)),
            jax.random.normal(keys[1], shape),
            jax.random.normal(keys[2], shape),
            jnp.asarray(tables),
            jnp.asarray(kv_lens, jnp.int32),
        )

    def contiguous(self, pages: jax.Array) -> jax.Array:
        """[seqs, kv_heads, longest, head_dim]: what a cache without pages holds."""
        gathered = jnp.moveaxis(pages[jnp.maximum(self.tables, 0)], 2, 1)
        return gathered.reshape(len(self.kv_lens), KV_HEADS, -1, HEAD_DIM)

    @property
    def bytes_read(self) -> int:
        """K and V of every token, once."""
        return int(self.kv_lens.sum()) * KV_HEADS * HEAD_DIM * 4 * 2


def ours(decode: Decode) -> Callable[[], Any]:
    """The public function, jitted as a model would."""
    attend = jax.jit(paged_attention)
    return lambda: attend(decode.q, decode.k_pages, decode.v_pages, decode.tables, decode.kv_lens)


def gather_then_attend(decode: Decode) -> Callable[[], Any]:
    """The plain way in JAX: make the cache contiguous, mask, softmax."""

    @jax.jit
    def attend(decode_arrays: tuple[Any, ...]) -> jax.Array:
        one = Decode(*decode_arrays)
        k, v = one.contiguous(one.k_pages), one.contiguous(one.v_pages)
        q = one.q.reshape(-1, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM) * HEAD_DIM**-0.5
        logits = jnp.einsum("shgd,shnd->shgn", q, k)
        seen = jnp.arange(k.shape[2]) < one.kv_lens[:, None, None, None]
        return jnp.einsum("shgn,shnd->shgd", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)

    arrays = tuple(getattr(decode, field.name) for field in dataclasses.fields(decode))
    return lambda: attend(arrays)


def torch_calls(decode: Decode) -> Calls:
    """``scaled_dot_product_attention`` on a contiguous cache: its own grouped heads, query heads of a group as rows,
    and, for ragged lengths, one call a sequence or all at once under a mask."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (
        torch.from_numpy(np.array(x))
        for x in (decode.q, decode.contiguous(decode.k_pages), decode.contiguous(decode.v_pages))
    )
    lens = np.array(decode.kv_lens)
    rows, heads = q.view(len(lens), KV_HEADS, -1, HEAD_DIM), q.unsqueeze(2)
    mask = (torch.arange(k.shape[2]) < torch.from_numpy(lens)[:, None])[:, None, None]
    if (lens == k.shape[2]).all():
        return {
            "torch SDPA, enable_gqa": lambda: attend(heads, k, v, enable_gqa=True),
            "torch SDPA, group as rows": lambda: attend(rows, k, v),
        }

    def one_by_one() -> Any:
        return torch.cat(
            [attend(rows[s : s + 1], k[s : s + 1, :, :n], v[s : s + 1, :, :n]) for s, n in enumerate(lens)]
        )

    return {
        "torch SDPA, padded and masked": lambda: attend(rows, k, v, attn_mask=mask),
        "torch SDPA, a call a sequence": one_by_one,
    }


def baselines(decode: Decode) -> Calls:
    """What there is to compare with on this machine."""
    try:
        return torch_calls(decode)
    except ImportError:
        return {"JAX, gather then attend": gather_then_attend(decode)}


def reads(decode: Decode) -> Calls:
    """Ways to read all pages once and do next to nothing with them."""
    arrays = decode.k_pages, decode.v_pages
    cores = os.cpu_count() or 1
    parts = [part for x in arrays for part in np.array_split(np.asarray(x).reshape(-1), cores)]
    pool = concurrent.futures.ThreadPoolExecutor(cores)
    total = jax.jit(lambda k, v: k.sum() + v.sum())
    return {
        "read: XLA sum": lambda: total(*arrays),
        "read: numpy dot in threads": lambda: list(pool.map(lambda part: part @ part, parts)),
        "read: numpy max in threads": lambda: list(pool.map(np.max, parts)),
    }


def check(decode: Decode, call: Callable[[], Any], others: Calls) -> None:
    """All of them compute the same."""
    out = np.asarray(call()).reshape(-1)
    for name, other in others.items():
        np.testing.assert_allclose(np.asarray(other()).reshape(-1), out, atol=1e-4, err_msg=name)


def measure(case: str, kv_lens: NDArray[Any]) -> tuple[list[Row], dict[str, float]]:
    """A row for each baseline, and all the times they were made from."""
    decode = Decode.create(kv_lens)
    call, others, read = ours(decode), baselines(decode), reads(decode)
    check(decode, call, others)
    times = medians_us({"ours": call, **others, **read})
    pages_bytes = decode.k_pages.nbytes + decode.v_pages.nbytes
    limit_us = fastest(times, read)[1] * decode.bytes_read / pages_bytes
    return [Row(case, times["ours"], name, times[name], limit_us) for name in others], times


def main() -> None:
    """Measure, print, write."""
    arguments = argument_parser(__doc__).parse_args()
    rows, all_times = [], {}
    for case, kv_lens in (("decode 32 x 2048", UNIFORM), ("decode 32 ragged, 64 to 4096", RAGGED)):
        name = f"{case}, {Q_HEADS}/{KV_HEADS} heads of {HEAD_DIM}, float32"
        measured, times = measure(name, kv_lens)
        rows += measured
        all_times[name] = {call: round(us) for call, us in times.items()}
    publish(rows, arguments.json, all_times_us=all_times)


if __name__ == "__main__":
    main()
