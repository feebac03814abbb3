"""How a pool shows itself. Reads its seven counters only, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pyagent_kv_jax.notebook_display import (
    KEPT_COLOR,
    USED_COLOR,
    Part,
    attempt,
    card,
    counted,
    fields_html,
    fields_line,
    values_of,
)
from pyagent_kv_jax.pool.queues import Counters

_FIELDS = ("ref_counts", "cached", "position", "queue", "counters")


class PoolCounts(NamedTuple):
    """Blocks: in use, free with cached content, free without."""

    held: int
    cached_free: int
    free: int

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.held:,} held, {self.cached_free:,} cached and free, {self.free:,} free"

    def bar(self) -> Sequence[Part]:
        """For a notebook."""
        return (
            Part("held", self.held, USED_COLOR),
            Part("cached and free", self.cached_free, KEPT_COLOR, True),
            Part("free", self.free, None),
        )


def pool_counts(pool: Any) -> PoolCounts | None:
    """Of a ``BlockPool``; None where they have no values now, or are those of a whole batch of pools."""
    read = values_of(pool.counters)
    if read is None or read[0].shape != (len(Counters._fields),):
        return None
    at = dict(zip(Counters._fields, read[0].tolist(), strict=True))
    cached, free = at["num_cached"], at["num_uncached"]
    return PoolCounts(pool.num_blocks - cached - free, cached, free)


def pool_line(pool: Any) -> str:
    """A ``BlockPool`` in one line."""

    def line() -> str:
        counts = pool_counts(pool)
        if counts is None:
            return fields_line(pool, _FIELDS)
        return f"BlockPool({counted(pool.num_blocks, 'block')}: {counts.text})"

    return attempt(line, lambda: fields_line(pool, _FIELDS))


def pool_html(pool: Any) -> str:
    """A ``BlockPool`` for a notebook."""

    def html() -> str:
        counts = pool_counts(pool)
        if counts is None:
            return fields_html(pool, _FIELDS)
        return card("BlockPool", counted(pool.num_blocks, "block"), bar=counts.bar())

    return attempt(html, lambda: fields_html(pool, _FIELDS))
