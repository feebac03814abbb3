"""Batches of attention at real shapes: working sets of 256 MiB and more on an accelerator, tiny ones on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.shapes import SHAPES, AttentionShape

BLOCK_SIZE = 16


def stored_head_dim(shape: AttentionShape) -> int:
    """head_dim in the pages: on a TPU in whole lanes, as its kernels want it and the cache keeps it."""
    return -(-shape.head_dim // 128) * 128 if jax.default_backend() == "tpu" else shape.head_dim


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Arguments of ``paged_attention``: pages in random order; every sequence of one length, its queries the last."""

    what: str
    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    tables: jax.Array
    kv_lens: jax.Array
    query_start_loc: jax.Array | None
    query_lens: tuple[int, ...]
    kv_dtype: Any = None

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    def bytes_read(self, window: int | None) -> int:
        """K and V once, but for what a window hides from all queries; q and the output once."""
        _, kv_heads, _, head_dim = self.k_pages.shape
        held = zip(np.asarray(self.kv_lens).tolist(), self.query_lens, strict=True)
        keys = sum(min(n, (window or n) + queries - 1) for n, queries in held)
        return keys * kv_heads * head_dim * 2 * self.k_pages.dtype.itemsize + 2 * self.q.nbytes

    def flops(self, window: int | None) -> float:
        """Of the two matrix products, for the pairs of query and key that are seen."""
        pairs = 0.0
        for n, queries in zip(np.asarray(self.kv_lens).tolist(), self.query_lens, strict=True):
            seen = np.arange(n - queries, n) + 1
            pairs += float(np.minimum(seen, window or n).sum())
        return 4 * pairs * self.q.shape[1] * self.q.shape[2]


def batch(
    shape: AttentionShape, what: str, kv_lens: list[int], query_lens: list[int] | None, stored: Any, kv_dtype: Any
) -> AttentionInputs:
    """Random numbers for a batch; ``query_lens`` None: decode."""
    rng = np.random.default_rng(0)
    counts = -(-np.array(kv_lens) // BLOCK_SIZE)
    order = rng.permutation(counts.sum()).astype(np.int32)
    tables = np.full((len(kv_lens), counts.max()), -1, np.int32)
    for row, ids in zip(tables, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        row[: len(ids)] = ids
    queries = query_lens or [1] * len(kv_lens)
    pages_shape = (int(counts.sum()), shape.kv_heads, BLOCK_SIZE, stored_head_dim(shape))
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def pages(key: jax.Array) -> jax.Array:
        if kv_dtype is None:
            return jax.random.normal(key, pages_shape, stored)
        numbers = jax.random.normal(key, pages_shape, jnp.bfloat16) * 50
        return jax.lax.bitcast_convert_type(numbers.astype(kv_dtype), stored)

    loc = None if query_lens is None else jnp.asarray(np.concatenate([[0], np.cumsum(queries)]), jnp.int32)
    return AttentionInputs(
        what,
        jax.random.normal(keys[0], (sum(queries), shape.q_heads, shape.head_dim), jnp.bfloat16),
        pages(keys[1]),
        pages(keys[2]),
        jnp.asarray(tables),
        jnp.asarray(kv_lens, jnp.int32),
        loc,
        tuple(queries),
        kv_dtype,
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        moved_bytes: a working set of gather, copy and merge.
        written_tokens: of a write.
        matmul: side of the square matrices that give the arithmetic limit.
        decodes: (sequences, context) of the decode batches of Llama-3-8B.
        named_decode: (sequences, context) of every other named shape.
        prefills: tokens of a prefill.
        names: the named shapes.
    """

    moved_bytes: int
    written_tokens: tuple[int, ...]
    matmul: int
    decodes: tuple[tuple[int, int], ...]
    named_decode: tuple[int, int]
    prefills: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def for_platform(cls, platform: str) -> Sizes:
        """Real on an accelerator; on a CPU just enough to run."""
        if platform == "cpu":
            return cls(1 << 20, (64,), 128, ((2, 64),), (2, 64), (32,), ("Llama-3-8B", "gpt-oss-20b"))
        decodes = ((64, 4096), (64, 32768), (1, 131072), (8, 8192))
        return cls(1 << 28, (8192, 65536), 8192, decodes, (64, 4096), (8192,), tuple(SHAPES))

    def attention_cases(self) -> Iterator[tuple[str, Callable[[AttentionShape], AttentionInputs]]]:
        """(name of a shape, what makes a batch of it)."""
        for seqs, context in self.decodes:
            yield "Llama-3-8B", _named(decode, seqs=seqs, context=context)
            yield "Llama-3-8B", _named(decode, seqs=seqs, context=context, fp8=True)
        for tokens in self.prefills:
            yield "Llama-3-8B", _named(prefill, tokens=tokens)
            yield "Llama-3-8B", _named(mixed, tokens=tokens)
        for name in self.names:
            if name != "Llama-3-8B":
                yield name, _named(decode, seqs=self.named_decode[0], context=self.named_decode[1])
                yield name, _named(prefill, tokens=self.prefills[0])


def pages_to_move(sizes: Sizes, shape: AttentionShape) -> tuple[jax.Array, jax.Array]:
    """(a pool of two working sets, its pages in random order)."""
    page = (shape.kv_heads, BLOCK_SIZE, stored_head_dim(shape))
    count = 2 * (sizes.moved_bytes // (2 * int(np.prod(page))))
    pages = jax.random.normal(jax.random.key(0), (count, *page), jnp.bfloat16)
    return pages, jax.random.permutation(jax.random.key(0), count).astype(jnp.int32)


def states_to_merge(sizes: Sizes, states: int) -> tuple[jax.Array, jax.Array]:
    """A working set of (outs, lses), 32 heads of 128."""
    tokens = max(sizes.moved_bytes // (states * 32 * 128 * 4), 1)
    outs = jax.random.normal(jax.random.key(0), (states, tokens, 32, 128))
    return outs, jax.random.normal(jax.random.key(1), (states, tokens, 32))


def decode(shape: AttentionShape, *, seqs: int, context: int, fp8: bool = False) -> AttentionInputs:
    """One query for each of ``seqs`` sequences of one length."""
    stored, kv_dtype = (jnp.uint8, jnp.float8_e4m3fn) if fp8 else (jnp.bfloat16, None)
    what = f"decode {seqs} x {context}, {'e4m3' if fp8 else 'bfloat16'}"
    return batch(shape, what, [context] * seqs, None, stored, kv_dtype)


def prefill(shape: AttentionShape, *, tokens: int) -> AttentionInputs:
    """One prompt."""
    return batch(shape, f"prefill {tokens}, bfloat16", [tokens], [tokens], jnp.bfloat16, None)


def mixed(shape: AttentionShape, *, tokens: int) -> AttentionInputs:
    """A prompt of a quarter of ``tokens`` among 63 sequences that decode, each of half as many tokens."""
    kv_lens, query_lens = [tokens // 4] + [tokens // 2] * 63, [tokens // 4] + [1] * 63
    return batch(shape, f"mixed {tokens // 4} + 63 x {tokens // 2}, bfloat16", kv_lens, query_lens, jnp.bfloat16, None)


def _named(make: Callable[..., AttentionInputs], **sizes: Any) -> Callable[[AttentionShape], AttentionInputs]:
    return update_wrapper(partial(make, **sizes), make)
