"""Every way to change a ``KVCacheManager``, in any order, against plain dictionaries and the content of the pages.

The content of a token's slot depends on all tokens before it, as in a model. So a block shared with the wrong request,
copied too late, moved without its table or brought back to the wrong place shows as a wrong number.
"""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, OutOfBlocksError
from pyagent_kv_jax.config import LayerGroup
from pyagent_kv_jax.manager import ManagerOptions

BLOCK, BLOCKS, HOST_BLOCKS, ROWS, LONGEST, WINDOW = 4, 22, 12, 5, 40, 6
ONE_GROUP: tuple[LayerGroup, ...] = ()
TWO_GROUPS = (LayerGroup((0,), sliding_window=WINDOW), LayerGroup((1,)))
CHUNKED = (LayerGroup((0,)), LayerGroup((1,), chunk_size=2 * BLOCK))
LAYOUTS = [(ONE_GROUP, 0), (ONE_GROUP, 7), (TWO_GROUPS, 3), (CHUNKED, 0)]  # groups, decode steps to reserve for
NAMES = [f"r{i}" for i in range(8)]
PREFIXES = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8], [7, 7, 7, 7, 7], [3]]
LONG = os.environ.get("PYAGENT_KV_LONG_TESTS") == "1"


def weak_hash(data: bytes) -> bytes:
    """Collides all the time."""
    return bytes([sum(data) % 5])


def content(tokens: list[int], layer: int) -> list[float]:
    """What a model would store for each token: a number that depends on all tokens up to it."""
    values, value = [], layer + 1
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
        values.append(float(value))
    return values


@dataclasses.dataclass
class Known:
    """What the model knows of a request: all its tokens, how many are computed, and where it is.

    Attributes:
        reserved: drafts that blocks were set aside for; None: none were.
    """

    tokens: list[int]
    computed: int = 0
    place: str = "waiting"  # or "device" or "swapped"
    reserved: int | None = None


class ManagerMachine(RuleBasedStateMachine):
    page_size: int | None = None  # the kernel block size

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        algorithm=st.sampled_from(["sha256", weak_hash]),
        zero=st.booleans(),
    )
    def start(self, layout: tuple[tuple[LayerGroup, ...], int], algorithm: object, zero: bool) -> None:
        groups, horizon = layout
        config = KVCacheConfig(
            num_layers=2,
            num_heads=1,
            head_dim=1,
            num_blocks=BLOCKS,
            block_size=BLOCK,
            max_num_reqs=ROWS,
            max_model_len=LONGEST,
            layer_groups=groups,
            kernel_block_size=self.page_size,
        )
        options = ManagerOptions(
            num_host_blocks=HOST_BLOCKS, hash_algorithm=algorithm, zero_on_free=zero, prediction_horizon=horizon
        )
        self.groups, self.manager = config.groups, KVCacheManager(config, options)
        assert self.manager.pages is not None
        self.requests: dict[str, Known] = {}

    @property
    def num_blocks(self) -> int:
        return self.manager.config.pool_blocks

    def at(self, place: str) -> list[str]:
        return [name for name, known in self.requests.items() if known.place == place]

    @precondition(lambda self: len(self.requests) < len(NAMES))
    @rule(prefix=st.sampled_from(PREFIXES), more=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def add(self, prefix: list[int], more: list[int]) -> None:
        name = next(name for name in NAMES if name not in self.requests)
        self.requests[name] = Known(prefix + more)
        self.manager.add_request(name, prefix + more)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        free = [name for name in self.requests if data.draw(st.integers(0, 9)) == 0]
        rest = [name for name in self.requests if name not in free]
        chosen = data.draw(st.permutations(rest))[: data.draw(st.integers(0, ROWS))]
        room = ROWS - sum(self.requests[name].place == "device" for name in rest)
        ids = []
        for name in chosen:
            if self.requests[name].place != "device":
                if room == 0:
                    continue
                room -= 1
            ids.append(name)
        for name in free:
            del self.requests[name]
        counts = []
        for name in ids:
            known = self.requests[name]
            if known.place != "waiting" and known.computed == len(known.tokens) and len(known.tokens) < LONGEST:
                known.tokens.append(data.draw(st.integers(0, 2)))
                if known.place == "device":
                    self.manager.record_tokens([name], [known.tokens[-1]])
            most = len(known.tokens) - known.computed
            counts.append(data.draw(st.integers(0, most)))
        plan = self.manager.step(ids, counts, free=free, num_rows=ROWS, num_tokens=ROWS * LONGEST)
        free_blocks = self.manager.get_num_free_blocks()
        for i, name in enumerate(ids):
            known, granted, cached = self.requests[name], int(plan.num_tokens[i]), int(plan.num_cached_tokens[i])
            if not plan.ok[i]:
                assert free_blocks < self.num_blocks
                assert known.reserved is None or counts[i] > known.reserved + 1
                assert granted == cached == 0
                continue
            if known.place == "waiting":
                assert cached % self.manager.config.block_size == 0
                assert cached < len(known.tokens)
                assert granted == min(counts[i], len(known.tokens) - cached)
                known.computed = cached
            elif known.place == "swapped":
                assert (cached, granted) == (known.computed, counts[i])
            else:
                assert (cached, granted) == (0, counts[i])
            known.place = "device"
            self.write(plan.metadata, i, known.tokens, known.computed, granted)
            known.computed += granted
            self.record_the_missing(name, known)
            if granted and known.reserved is not None:
                if drafts := min(granted - 1, known.reserved):
                    self.manager.commit(name, drafts)  # they were its tokens all along
                known.reserved = None

    @rule(data=st.data(), steps=st.integers(1, 8))
    def decode(self, data: st.DataObject, steps: int) -> None:
        """Decode steps one after another with nothing looked at in between; now and then somebody leaves."""
        for _ in range(steps):
            ready = [n for n in self.at("device") if 0 < self.requests[n].computed < LONGEST]
            ready = [n for n in ready if self.requests[n].reserved is None]
            free = [n for n in ready if data.draw(st.integers(0, 11)) == 0]
            for name in free:
                del self.requests[name]
            ids = [n for n in ready if n not in free and data.draw(st.integers(0, 7))]
            for name in ids:
                known = self.requests[name]
                if known.computed == len(known.tokens):
                    known.tokens.append(data.draw(st.integers(0, 2)))
                    self.manager.record_tokens([name], [known.tokens[-1]])
            counts = [int(data.draw(st.integers(0, 9)) > 0) for _ in ids]
            plan = self.manager.step(ids, counts, free=free, num_rows=ROWS)
            free_blocks = self.manager.get_num_free_blocks()
            for i, name in enumerate(ids):
                known = self.requests[name]
                if plan.ok[i]:
                    assert plan.num_tokens[i] == counts[i]
                    self.write(plan.metadata, i, known.tokens, known.computed, counts[i])
                    known.computed += counts[i]
                else:
                    assert free_blocks < len(self.groups)  # one block a group is all it can have wanted

    def record_the_missing(self, name: str, known: Known) -> None:
        """A request that came back from the host may have chosen a token there."""
        row = self.manager._state.rows.row_of(name)
        record = self.manager._state.tokens.record_of(row)
        if record is not None and record.num_tokens < len(known.tokens):
            self.manager.record_tokens(name, known.tokens[record.num_tokens :])

    def write(self, meta: object, row: int, tokens: list[int], first: int, count: int) -> None:
        """What the model would do: K and V of the new tokens go to their slots, in every layer."""
        start = row
        if meta.query_start_loc is not None:
            start = int(meta.query_start_loc[row])
            assert int(meta.query_start_loc[row + 1]) - start == count
        if not count:
            return
        assert meta.positions[start : start + count].tolist() == list(range(first, first + count))
        pages = self.manager.pages
        for layer in range(2):
            values = jnp.array(content(tokens, layer)[first : first + count])[:, None, None]
            slots = meta.slot_mapping if meta.slot_mapping.ndim == 1 else meta.slot_mapping[self.group_of(layer)]
            assert int(meta.kv_lens[row]) == first + count
            own = np.full(64, -1, np.int32)
            own[:count] = slots[start : start + count]
            assert (own[:count] >= 0).all()
            padded = jnp.zeros((64, 1, 1)).at[:count].set(values)
            pages = pages.write(layer, padded, -padded, own)
        self.manager.pages = pages

    def group_of(self, layer: int) -> int:
        return next(g for g, group in enumerate(self.groups) if layer in group.layers)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parents = self.at("device")
        child = next((name for name in NAMES if name not in self.requests), None)
        if not parents or child is None or len(parents) == ROWS:
            return
        parent = data.draw(st.sampled_from(parents))
        self.manager.fork(parent, child)
        self.requests[parent].reserved = None
        self.requests[child] = dataclasses.replace(self.requests[parent], tokens=list(self.requests[parent].tokens))

    @rule(data=st.data(), mode=st.sampled_from(["auto", "swap", "recompute"]))
    def preempt(self, data: st.DataObject, mode: str) -> None:
        names = [name for name in self.at("device") if data.draw(st.booleans())]
        try:
            done = self.manager.preempt(names, mode)
        except OutOfBlocksError:
            assert mode == "swap"
            return
        for name in names:
            known = self.requests[name]
            known.reserved = None
            if done[name] == "swap":
                known.place = "swapped"
            else:
                known.place, known.computed = "waiting", 0

    @rule(data=st.data(), drafts=st.integers(0, 6))
    def reserve(self, data: st.DataObject, drafts: int) -> None:
        """For a step that may come late, or never."""
        names = [n for n in self.at("device") if self.requests[n].computed + drafts < LONGEST]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        try:
            self.manager.reserve(name, drafts)
        except OutOfBlocksError:
            return
        self.requests[name].reserved = drafts

    @rule(data=st.data(), drafts=st.integers(0, 6))
    def speculate(self, data: st.DataObject, drafts: int) -> None:
        """One token and drafts after it; some are accepted, the others were other tokens all along."""
        ready = [n for n in self.at("device") if 0 < self.requests[n].computed < LONGEST - 8]
        if not ready:
            return
        name = data.draw(st.sampled_from(ready))
        known = self.requests[name]
        if known.computed == len(known.tokens):
            known.tokens.append(data.draw(st.integers(0, 2)))
            self.manager.record_tokens([name], [known.tokens[-1]])
        guesses = [data.draw(st.integers(0, 2)) for _ in range(drafts)]
        try:
            self.manager.reserve(name, drafts)
        except OutOfBlocksError:
            return
        plan = self.manager.step([name], [1 + drafts], num_rows=ROWS, num_tokens=ROWS * LONGEST)
        assert plan.ok.all()
        right, later = known.tokens[: known.computed + 1], known.tokens[known.computed + 1 :]
        self.write(plan.metadata, 0, right + guesses, known.computed, 1 + drafts)
        wrong = [guess != token for guess, token in zip(guesses, later, strict=False)]  # where its tokens are known
        accepted = data.draw(st.integers(0, wrong.index(True) if any(wrong) else drafts))
        self.manager.commit(name, accepted)
        known.computed, known.reserved = known.computed + 1 + accepted, None
        if new := guesses[len(later) : accepted]:
            known.tokens += new
            self.manager.record_tokens(name, new)

    @rule(runs=st.booleans())
    def defragment(self, runs: bool) -> None:
        report = self.manager.defragment(runs=runs)
        blocks = np.asarray(self.manager._state.control.state.table.blocks)
        assert blocks.max(initial=-1) == report.num_in_use - 1

    @rule(which=st.sampled_from(PREFIXES))
    def evict(self, which: list[int]) -> None:
        self.manager.evict_prefix(which)

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.stats().num_cached_blocks == 0

    @invariant()
    def parts_agree(self) -> None:
        self.manager.check_invariants()
        state = self.manager._state
        cached = np.asarray(state.control.state.pool.cached)
        assert sorted(state.prefixes.cached_ids().tolist()) == np.flatnonzero(cached).tolist()
        assert sorted(self.manager.request_ids()) == sorted(self.at("device"))
        assert sorted(self.manager.swapped_ids()) == sorted(self.at("swapped"))
        stats = self.manager.stats()
        held = sum(int((r.host_blocks >= 0).sum()) for r in state.swap.requests.values())
        assert stats.num_free_host_blocks == stats.num_host_blocks - held

    @invariant()
    def every_live_token_is_what_was_written(self) -> None:
        pages, config = self.manager.pages, self.manager.config
        for name in self.at("device"):
            known = self.requests[name]
            assert self.manager.num_tokens(name) == known.computed
            for layer in range(2):
                group = self.groups[self.group_of(layer)]
                table = np.array(self.manager.get_block_table(name, layer), np.int32)
                first = 0 if group.sliding_window is None else max(known.computed - group.sliding_window + 1, 0)
                if group.chunk_size is not None:
                    first = known.computed // group.chunk_size * group.chunk_size
                positions = np.arange(first, known.computed)
                block = table[positions // config.block_size]
                assert (block >= 0).all()
                slots = block * config.block_size + positions % config.block_size
                page = group.layers.index(layer) * config.pages_per_layer + slots // config.page_size
                want = np.array(content(known.tokens, layer))[first : known.computed]
                for stored, sign in ((pages.k_pages, 1), (pages.v_pages, -1)):
                    got = np.asarray(stored)[page, 0, slots % config.page_size, 0]
                    np.testing.assert_array_equal(got, sign * want)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for name in list(self.requests):
            self.manager.free(name)
        assert self.manager.get_num_free_blocks() == self.num_blocks
        stats = self.manager.stats()
        assert stats.num_free_host_blocks == stats.num_host_blocks


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(
    max_examples=2000 if LONG else 50,
    stateful_step_count=200 if LONG else 100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
