"""Random histories against a plain-Python model of the rule; what callers see of errors; the collectives."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.distributed.owned.distributed_block_table import DistributedBlockTable
from pyagent_kv_jax.distributed.replicas import check_replicas
from pyagent_kv_jax.errors import (
    ConfigError,
    InvalidArgumentError,
    InvalidBlockError,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    UnknownRequestError,
)
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh

ROWS, WIDTH, BATCH, CAPACITY = 7, 6, 4, 20
CONFIG = BlockTableConfig(block_size=4, max_num_reqs=ROWS, max_num_blocks_per_req=WIDTH)


class Model:
    """The rule, one block after another."""

    def __init__(self, num_devices: int, per_device: int) -> None:
        self.free = [deque(range(d * per_device, (d + 1) * per_device)) for d in range(num_devices)]
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.tokens = [0] * ROWS
        self.per_device = per_device

    def allocate(self, rows: Any, counts: Any, tokens: Any, devices: Any) -> tuple[list[list[int]], list[bool]]:
        ok = [self._possible(list(rows), i, int(counts[i]), int(tokens[i]), devices[i]) for i in range(BATCH)]
        left, room, refused = sum(map(len, self.free)), CAPACITY, False
        for i, count in enumerate(map(int, counts)):
            if ok[i] and rows[i] >= 0 and count:
                refused |= count > min(left, room)
                ok[i] = not refused
                left, room = (left - count, room - count) if ok[i] else (left, room)
        wanted = [int(counts[i]) if ok[i] and rows[i] >= 0 else 0 for i in range(BATCH)]
        given: list[list[int]] = [[-1] * n for n in wanted]
        unspent = [len(queue) for queue in self.free]
        owners: list[list[int]] = [[] for _ in range(BATCH)]
        for i, n in enumerate(wanted):
            while devices[i] >= 0 and len(owners[i]) < n and unspent[devices[i]]:
                owners[i].append(devices[i])
                unspent[devices[i]] -= 1
        richest = deque(sorted(range(len(unspent)), key=lambda d: (-unspent[d], d)))
        for i, n in enumerate(wanted):
            while len(owners[i]) < n:
                while not unspent[richest[0]]:
                    richest.popleft()
                owners[i].append(richest[0])
                unspent[richest[0]] -= 1
        for i in range(BATCH):
            given[i] = [self.free[owner].popleft() for owner in owners[i]]
            if ok[i] and rows[i] >= 0:
                self.rows[rows[i]] += given[i]
                self.tokens[rows[i]] += int(tokens[i])
        return given, ok

    def _possible(self, rows: list[int], i: int, count: int, tokens: int, device: int) -> bool:
        row = rows[i]
        if row == -1:
            return True
        if not 0 <= row < ROWS or rows.count(row) > 1 or not -1 <= device < len(self.free) or count < 0 or tokens < 0:
            return False
        held = len(self.rows[row]) + count
        return held <= WIDTH and self.tokens[row] + tokens <= 4 * held

    def release(self, rows: Any) -> list[bool]:
        ok = [row == -1 or (0 <= row < ROWS and list(rows).count(row) == 1 and bool(self.rows[row])) for row in rows]
        for row in sorted(row for row, good in zip(rows, ok, strict=True) if good and row >= 0):
            for block in reversed(self.rows[row]):
                self.free[block // self.per_device].append(block)
            self.rows[row], self.tokens[row] = [], 0
        return ok


def random_batch(rng: np.random.Generator, num_devices: int) -> tuple[np.ndarray, ...]:
    rows = rng.permutation(ROWS)[:BATCH]
    rows[rng.random(BATCH) < 0.1] = rng.choice([-1, ROWS, -3])
    if rng.random() < 0.1:
        rows[1] = rows[0]
    counts = rng.integers(0, 5, BATCH)
    counts[rng.random(BATCH) < 0.05] = rng.choice([-1, 7, 2**31 - 1])
    tokens = np.minimum(np.maximum(counts, 0), 6) * 4 - rng.integers(0, 4, BATCH) * (counts > 0)
    tokens[rng.random(BATCH) < 0.05] = rng.choice([-1, 100])
    devices = rng.integers(-1, num_devices, BATCH)
    devices[rng.random(BATCH) < 0.03] = rng.choice([num_devices, -2])
    return tuple(x.astype(np.int32) for x in (rows, counts, tokens, devices))


@pytest.mark.parametrize("shape", [{"own": 2}, {"own": 3, "copy": 2}, {"own": 8}], ids=str)
def test_histories_are_those_of_the_model(shape: dict[str, int]) -> None:
    size, per_device = shape["own"], {2: 9, 3: 6, 8: 2}[shape["own"]]
    mesh, rng = cpu_mesh(**shape), np.random.default_rng(size)
    chex.clear_trace_counter()
    table = DistributedBlockTable.create(CONFIG, size, num_blocks=size * per_device, mesh=mesh, axis="own")
    model = Model(size, per_device)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(table: Any, rows: Any, counts: Any, tokens: Any, devices: Any, freed: Any) -> Any:
        table, ok = table.free(freed)
        table, given = table.allocate_blocks(rows, counts, num_tokens=tokens, devices=devices, capacity=CAPACITY)
        return table, given, ok, table.num_free

    served, refused, spilled = 0, 0, 0
    for turn in range(60):
        rows, counts, tokens, devices = random_batch(rng, size)
        freed = np.where(rng.random(3) < 0.5, rng.integers(-1, ROWS + 1, 3), -1).astype(np.int32)
        table, given, ok, num_free = step(table, rows, counts, tokens, devices, freed)
        assert ok.tolist() == model.release(freed)
        want, want_ok = model.allocate(rows, counts, tokens, devices)
        assert given.ok.tolist() == want_ok, turn
        ids, offsets = np.asarray(given.ids), np.asarray(given.row_offsets)
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == want, turn
        assert (ids[offsets[-1] :] == -1).all()
        assert num_free.tolist() == [len(queue) for queue in model.free]
        for row in range(ROWS):
            assert table.table.blocks[row].tolist() == model.rows[row] + [-1] * (WIDTH - len(model.rows[row]))
        assert table.table.num_tokens.tolist() == model.tokens
        served, refused = served + sum(want_ok), refused + want_ok.count(False)
        spilled += sum(block // per_device != device for b, device in zip(want, devices, strict=True) for block in b)
        if turn % 20 == 0:
            table.check_invariants()
            check_replicas(table, mesh)
    assert min(served, refused, spilled) > 20


def test_own_device_first_then_those_with_most_left_lowest_first() -> None:
    table = DistributedBlockTable.create(CONFIG, 4, 2, num_blocks=16)
    table, _ = table.allocate_blocks([0, 1], [3, 1], devices=[1, 3], capacity=16)  # 4 1 4 3 are free
    table, given = table.allocate_blocks([2, 3], [6, 3], devices=[1, 2])
    assert given.ids[:9].tolist() == [7, 0, 1, 2, 3, 13, 8, 9, 10]
    assert table.num_free.tolist() == [0, 0, 1, 2]
    table, given = table.allocate_blocks(4, 1)  # an empty row: worker 2
    assert given.ids.tolist() == [11]
    table, given = table.allocate_blocks([2], [0])
    assert given.ok.tolist() == [True]
    table, _ = table.free([1, 0])
    table, given = table.allocate_blocks(0, 2, prefer_local=False)
    assert given.ids.tolist() == [6, 5]  # devices 1 and 3 have three each; tails were freed first
    table, given = table.allocate_blocks(0, 1)  # where its last block is
    assert given.ids.tolist() == [4]


def test_locations() -> None:
    table = DistributedBlockTable.create(CONFIG, 4, 2, num_blocks=16)
    assert int(table.get_block_location(5)) == 1
    assert table.get_block_location(np.array([[0, 3], [4, 15]])).tolist() == [[0, 0], [1, 3]]
    assert table.is_local([7, 8, 11, 12]).tolist() == [False, True, True, False]
    assert table.is_local([7, 8], 1).tolist() == [True, False]
    assert jax.jit(lambda ids: table.get_block_location(ids))(np.array([16, -1, 4])).tolist() == [-1, -1, 1]
    for wrong in (16, -1):
        with pytest.raises(InvalidBlockError, match=f"block_id: got {wrong}, want 0 to 15"):
            table.get_block_location([3, wrong])
    for nowhere in (4, -1, 0.5):
        with pytest.raises(InvalidArgumentError, match=f"device: got {nowhere}, want 0 to 3"):
            table.is_local(3, nowhere)


def test_what_cannot_be_is_refused_and_nothing_changes() -> None:
    table = DistributedBlockTable.create(CONFIG, 4, 2, num_blocks=16)
    none = np.full(2, -1)
    table, _ = table.allocate_blocks([0, 3], [3, 6], devices=none, num_tokens=[9, 0], capacity=8 + 4)
    before = jax.device_get((table.table, table.pools))
    for error, message, changed in (
        (
            OutOfBlocksError,
            "row 2: got a request for 4 blocks, want at most 3: 7 are free on 4",
            {"num_blocks": [4, 4]},
        ),
        (RequestTooLongError, r"row 0: got 4 more blocks, want at most 3 \(3 of its 6", {"row_idx": [0, 1]}),
        (UnknownRequestError, "row: got 7, want 0 to 6", {"row_idx": [1, 7]}),
        (InvalidArgumentError, "row_idx: got row 1 twice", {"row_idx": [1, 1]}),
        (InvalidArgumentError, "row 2: got a request for -2 blocks, want 0 or more", {"num_blocks": [1, -2]}),
        (InvalidArgumentError, "devices: got 4, want 0 to 3, or -1", {"devices": [0, 4]}),
        (InvalidArgumentError, "num_tokens: got 17 for row 1, want at most 16", {"num_tokens": [17, 0]}),
        (ShapeMismatchError, r"num_blocks: got int64\[1\], want int32\[2\]", {"num_blocks": [1]}),
        (InvalidArgumentError, "capacity: got -1, want a static integer", {"capacity": -1}),
    ):
        asked = {"row_idx": [1, 2], "num_blocks": [4, 1], "devices": none, "num_tokens": [0, 0], "capacity": 12}
        with pytest.raises(error, match=message):
            table.allocate_blocks(**(asked | changed))
    with pytest.raises(UnknownRequestError, match="row 1: holds nothing"):
        table.free([0, 1])
    with pytest.raises(InvalidArgumentError, match="row_idx: got row 0 twice"):
        table.free([0, 0])
    chex.assert_trees_all_equal(jax.device_get((table.table, table.pools)), before)
    table.check_invariants()


def test_configurations_that_cannot_be() -> None:
    create = DistributedBlockTable.create
    mesh = cpu_mesh(own=2)
    with pytest.raises(ConfigError, match="num_blocks: got 9, want a multiple of 2"):
        create(CONFIG, 2, num_blocks=9)
    with pytest.raises(ConfigError, match=r"axis: got 'other', want one of the mesh's axes \('own',\)"):
        create(CONFIG, 2, num_blocks=8, mesh=mesh, axis="other")
    with pytest.raises(ConfigError, match="num_workers: got 3, want 2, the devices of axis 'own'"):
        create(CONFIG, 3, num_blocks=9, mesh=mesh, axis="own")
    with pytest.raises(ConfigError, match="worker_id: got 2, want 0 to 1"):
        create(CONFIG, 2, 2, num_blocks=8)


def test_broken_pools_are_found() -> None:
    table = DistributedBlockTable.create(CONFIG, 4, 2, num_blocks=16)
    table, _ = table.allocate_blocks([0, 1], [3, 1], devices=[1, 3], capacity=16)  # a program that was compiled above
    table.check_invariants()
    counts = table.pools.ref_counts.at[1, 0].add(1)
    lost = dataclasses.replace(table, pools=dataclasses.replace(table.pools, ref_counts=counts))
    with pytest.raises(InvalidBlockError, match=r"not as many references as rows name it, on devices \[1\]"):
        lost.check_invariants()


def test_extend_brings_slots_of_all_devices() -> None:
    table = DistributedBlockTable.create(CONFIG, 2, num_blocks=4)
    lens = np.array([5, 0, 4, 0, 0, 0, 8], np.int32)
    table, meta = table.extend(lens, num_tokens=20, devices=np.full(ROWS, 1, np.int32))
    assert meta.ok.tolist() == [True, True, True, True, True, True, False]
    assert meta.slot_mapping.tolist()[:9] == [8, 9, 10, 11, 12, 0, 1, 2, 3]
    assert set(meta.slot_mapping.tolist()[9:]) == {-1}
    table, meta = table.extend(np.array([1, 0, 1, 0, 0, 0, 2], np.int32))
    assert meta.ok.tolist() == [True, True, True, True, True, True, False]  # two tokens of one row are no decode
    assert meta.kv_lens.tolist() == [6, 0, 5, 0, 0, 0, 0]
    assert meta.slot_mapping.tolist() == [13, -1, 4, -1, -1, -1, -1]  # beside its last block, on device 0
    table.check_invariants()


def test_collectives_of_an_allocation() -> None:
    """An all-gather of D numbers and an all-reduce of the ids; nothing to free."""
    table = DistributedBlockTable.create(CONFIG, 4, num_blocks=16)
    rows = np.arange(BATCH, dtype=np.int32)
    allocate = jax.jit(lambda table, rows, counts: table.allocate_blocks(rows, counts, capacity=CAPACITY))
    program = allocate.lower(table, rows, rows).compile()
    assert collectives(program) == [("all-gather", 4 * 4), ("all-reduce", CAPACITY * 4)]
    assert collectives(jax.jit(lambda table, rows: table.free(rows)).lower(table, rows).compile()) == []


def test_a_jitted_step_raises_nothing_and_says_so() -> None:
    table = DistributedBlockTable.create(CONFIG, 2, num_blocks=4)
    step = jax.jit(lambda table, counts: table.allocate_blocks(jnp.arange(2, dtype=jnp.int32), counts))
    table, given = step(table, np.array([3, 2], np.int32))
    assert given.ok.tolist() == [True, False]
    assert table.table.num_blocks.tolist()[:2] == [3, 0]
