"""Slot mappings in few words: one for a full block, two for a run of slots that follow one another.

A stream of int32 words, in the order of the tokens, from which lengths and first tokens follow:

- ``b >= 0``: a full block; the next ``block_size`` tokens go to the slots of block b.
- ``-n < 0``, a header, and then its payload: the next n tokens go to ``payload - 1`` and on; nowhere where it is 0.
- ``-2**31``: padding, at the end only.

No payload is negative, so whether a word is one shows in the word before it, and every word is decoded by itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.arguments import require_int32, require_positive_int
from pallas_kernels.checking import check

PADDING = -(2**31)
_MAX = 2**31 - 1
_MANY = 2**30  # tokens


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["block_size"])
@dataclasses.dataclass(frozen=True)
class CompressedSlotMapping:
    """Where tokens go, in C words; ``paged_write`` takes it as it is.

    Attributes:
        words: i32[C], see above.
        block_size: tokens of a full block, static.
    """

    words: jax.Array
    block_size: int

    @property
    def capacity(self) -> int:
        """C."""
        return self.words.shape[0]

    @property
    @jax.jit
    def num_words(self) -> jax.Array:
        """i32[]: words that are not padding."""
        return jnp.sum(self.words != PADDING, dtype=jnp.int32)

    @property
    @jax.jit
    def num_tokens(self) -> jax.Array:
        """i32[]: tokens that the words speak of, those that go nowhere included."""
        return jnp.sum(self._segments()[1])

    @partial(jax.jit, static_argnums=1)
    def expand(self, num_tokens: int) -> jax.Array:
        """i32[T]: the slot of each of T = ``num_tokens`` (static) tokens; -1: nowhere, or past the last one.

        Words of more than T tokens are an error in ``checking()``; outside it what is past T is not there (and words of
        more than 2**30 are taken for none).

        Raises:
            ArgumentError: T is no integer of 0 or more.
        """
        require_positive_int("num_tokens", num_tokens, minimum=0)
        self._report_errors(num_tokens)
        if not self.capacity:
            return jnp.full(num_tokens, -1, jnp.int32)
        first_slot, length = self._segments()
        ends = jnp.cumsum(length)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        # As many words as end before a token.
        word = jnp.cumsum(jnp.zeros(num_tokens, jnp.int32).at[ends].add(1, mode="drop"), dtype=jnp.int32)
        first = first_slot.at[word].get(mode="fill", fill_value=-1)
        step = token - (ends - length).at[word].get(mode="fill", fill_value=0)
        # No int32 overflow: what is past the last slot there can be is outside every pool.
        return jnp.where(first < 0, -1, jnp.minimum(first, _MAX - step) + step)

    @jax.jit
    def as_runs(self) -> jax.Array:
        """i32[C, 3] of (first_slot, first_token, length), as ``paged_write`` takes them; length 0 is padding."""
        first_slot, length = self._segments()
        return jnp.stack([first_slot, jnp.cumsum(length) - length, length], axis=1)

    @partial(jax.jit, static_argnames="within")
    def shifted(self, num_blocks: ArrayLike, *, within: int | None = None) -> Self:
        """The same tokens, each ``num_blocks`` i32[] (may be traced) blocks further on; -1 stays -1.

        Args:
            num_blocks: to slots of layer l, ``l * blocks_of_a_layer``.
            within: static; blocks that there are before the shift. A word with a slot outside them then names slots
                outside every pool, for all of its tokens: dropped by ``paged_write``, and an error in ``checking()``.
                Unchecked, it would name something of the next layer.
        """
        first_slot, length = self._segments()
        most = _MAX // self.block_size
        limit = _MAX if within is None else min(within, most) * self.block_size
        blocks = jnp.clip(jnp.asarray(num_blocks, jnp.int32), -most, most)
        inside = (first_slot <= limit - length) & (blocks == num_blocks)
        is_payload = self._is_payload()
        moved = _plus(self.words, jnp.where(is_payload, blocks * self.block_size, blocks))
        moved = jnp.where(inside & (moved >= is_payload), moved, _MAX)
        return dataclasses.replace(self, words=jnp.where((first_slot >= 0) & (length > 0), moved, self.words))

    def _is_payload(self) -> jax.Array:
        header = (self.words < 0) & (self.words != PADDING)
        return jnp.concatenate([jnp.zeros(1, bool), header])[: self.capacity]

    def _segments(self) -> tuple[jax.Array, jax.Array]:
        """(first slot i32[C], tokens i32[C]) of each word: a run counts at its payload; 0 tokens elsewhere."""
        words, is_payload, length = self.words, self._is_payload(), self._lengths()
        block_slot = jnp.where(words > _MAX // self.block_size, _MAX, words * self.block_size)
        first_slot = jnp.where(is_payload, jnp.maximum(words - 1, -1), jnp.where(words >= 0, block_slot, -1))
        # So that sums fit int32: nobody means as many.
        return first_slot, jnp.where(_total(length) <= _MANY, length, 0)

    def _lengths(self) -> jax.Array:
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), self.words])[: self.capacity]
        return jnp.where(self._is_payload(), -before, jnp.where(self.words >= 0, self.block_size, 0))

    def _report_errors(self, num_tokens: int) -> None:
        total = _total(self._lengths())
        message = f"slot_mapping: got words of {{total:.0f}} tokens, want {num_tokens} at most"
        check(total <= num_tokens, message, total=total)
        is_payload, padding = self._is_payload(), self.words == PADDING
        broken = jnp.any(is_payload & (self.words < 0)) | jnp.any(padding[:-1] & ~padding[1:])
        broken |= jnp.any((self.words < 0)[-1:] & ~padding[-1:])
        message = "slot_mapping: got a header with no payload or words after padding, want a payload of 0 or more"
        check(~broken, message)


def _total(length: jax.Array) -> jax.Array:
    return jnp.sum(length.astype(jnp.float32))  # exact as far as 2**24, and never wraps round


def _plus(words: jax.Array, shift: jax.Array) -> jax.Array:
    """``words + shift`` where words are 0 or more; no overflow."""
    return jnp.where(words > _MAX - jnp.maximum(shift, 0), _MAX, words + shift)


def compress_slots(
    slots: jax.Array, block_size: int, capacity: int
) -> tuple[CompressedSlotMapping, jax.Array, jax.Array]:
    """Slots i32[T] in the fewest words, in ``capacity`` (static) of them; ``expand(T)`` gives them back.

    Each stretch of slots that follow one another, and each of -1, is a run: one word if it is a full block, else two.
    What is -1 at the end takes none.

    Returns:
        (mapping, ok bool[], words wanted i32[]). Not ok, and no word but padding (nothing is written rather than
        something wrong): more words than ``capacity``, or a slot that is not in [-1, 2**31 - 2].

    Raises:
        ArgumentError: slots of another dtype or shape; a block size or capacity that is no static count.
    """
    require_int32("slots", slots, "int32[tokens]", 1)
    require_positive_int("block_size", block_size)
    require_positive_int("capacity", capacity, minimum=0)
    kinds, length = _runs(slots, block_size)
    num_words = jnp.cumsum(kinds, dtype=jnp.int32)
    wanted = jnp.max(num_words, initial=0)
    ok = (wanted <= capacity) & jnp.all((slots >= -1) & (slots < _MAX))
    first = num_words - kinds
    words = jnp.full(capacity, PADDING, jnp.int32)
    at = jnp.where(kinds > 0, first, capacity)
    words = words.at[at].set(jnp.where(kinds == 1, slots // block_size, -length), mode="drop")
    words = words.at[jnp.where(kinds == 2, first + 1, capacity)].set(slots + 1, mode="drop")
    return CompressedSlotMapping(jnp.where(ok, words, PADDING), block_size), ok, wanted


def _runs(slots: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """(words i32[T] of the run that begins at each token: 0 where none does; its length i32[T])."""
    num_tokens = slots.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    end = jnp.max(jnp.where(slots == -1, 0, token + 1), initial=0)
    follows = jnp.where(slots[:-1] < 0, slots[1:] == slots[:-1], slots[1:] - 1 == slots[:-1])
    begins = (token < end) & jnp.concatenate([jnp.ones(1, bool), ~follows])[:num_tokens]
    next_begin = lax.cummin(jnp.where(begins, token, end), reverse=True)
    next_begin = jnp.concatenate([next_begin[1:], end[None]])[:num_tokens]
    length = jnp.where(begins, next_begin - token, 0)
    is_block = (slots >= 0) & (slots % block_size == 0) & (length == block_size)
    return jnp.where(begins, jnp.where(is_block, 1, 2), 0).astype(jnp.int32), length
