"""Hit rates by tokens, over all time and over a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.manager.prefix.prefix_statistics import PrefixStatistics


@given(st.lists(st.integers(0, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))), st.integers(1, 5))
def test_rates_are_by_tokens(records: list[tuple[int, int]], window: int) -> None:
    statistics = PrefixStatistics(window)
    assert statistics.hit_rate == statistics.recent_hit_rate == 0.0
    for count, record in enumerate(records, start=1):
        statistics.record(*record)
        recent = records[max(0, count - window) : count]
        assert statistics.num_requests == count
        assert statistics.num_recent_requests == len(recent)
        assert statistics.queried_tokens == sum(queried for queried, _ in records[:count])
        assert statistics.hit_tokens == sum(hit for _, hit in records[:count])
        for rate, part in [(statistics.hit_rate, records[:count]), (statistics.recent_hit_rate, recent)]:
            queried = sum(queried for queried, _ in part)
            assert rate == (sum(hit for _, hit in part) / queried if queried else 0.0)


def test_reset() -> None:
    statistics = PrefixStatistics(window=2)
    statistics.record(10, 5)
    statistics.reset()
    statistics.record(8, 2)
    assert (statistics.num_requests, statistics.hit_rate, statistics.recent_hit_rate) == (1, 0.25, 0.25)
    assert statistics.window == 2


@pytest.mark.parametrize("record", [(-1, 0), (5, -1), (5, 6)])
def test_counts_that_make_no_sense_change_nothing(record: tuple[int, int]) -> None:
    statistics = PrefixStatistics()
    statistics.record(4, 1)
    with pytest.raises(InvalidArgumentError, match="want 0 <= hit <= queried"):
        statistics.record(*record)
    assert (statistics.num_requests, statistics.hit_rate, statistics.recent_hit_rate) == (1, 0.25, 0.25)


@pytest.mark.parametrize("window", [0, -1, 2.0])
def test_windows_that_cannot_work(window) -> None:
    with pytest.raises(InvalidArgumentError, match="window"):
        PrefixStatistics(window)
