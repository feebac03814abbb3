"""Holds and imports: content between two managers, never seen before it is there, never lost, never leaked."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import (
    InvalidArgumentError,
    InvalidBlockError,
    KVCacheConfig,
    KVCacheManager,
    ManagerOptions,
    OutOfBlocksError,
    RequestTooLongError,
    ShapeMismatchError,
    TooManyRequestsError,
    UnknownRequestError,
)
from pyagent_kv_jax.config import LayerGroup
from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.manager.prefix.block_hash import CacheExtras
from pyagent_kv_jax.manager.prefix.events import BlockStored

CONFIG = KVCacheConfig(
    num_layers=2, num_heads=2, head_dim=4, num_blocks=12, block_size=4, max_num_reqs=4, max_model_len=32
)
# A window of 6 tokens sees at most two of the blocks before it.
WINDOWED = dataclasses.replace(
    CONFIG, num_blocks=24, layer_groups=(LayerGroup((0,)), LayerGroup((1,), sliding_window=6))
)
PROMPT = np.arange(100, 119)  # four full blocks, and three tokens


def manager_of(config=CONFIG, **options):
    manager = KVCacheManager(config, ManagerOptions(**options))
    rng = np.random.default_rng(0)
    pages = manager.pages
    manager.pages = dataclasses.replace(
        pages,
        k_pages=jnp.asarray(rng.normal(size=pages.k_pages.shape), jnp.float32),
        v_pages=jnp.asarray(rng.normal(size=pages.v_pages.shape), jnp.float32),
    )
    return manager


def served(manager, name, tokens):
    """A request whose tokens are all computed; its block table."""
    manager.add_request(name, tokens)
    plan = manager.step([name], [len(tokens)], num_tokens=32)
    assert plan.ok.all()
    return plan


def content(manager, blocks):
    """[layers per group, n, ...] of K, as stored."""
    config = manager.config
    k = np.asarray(manager.pages.k_pages).reshape(config.layers_per_group, config.pool_blocks, -1)
    return k[:, list(blocks)]


def handed_over(source, target, tokens, places=None):
    """An import into ``target``, written from a hold of ``source`` and finished."""
    hold, imported = source.hold_prefix(tokens), target.begin_import(tokens)
    assert imported.keys == hold.keys[: len(imported.keys)]
    places = imported.wanted if places is None else places
    target.write_import(imported.hold_id, places, source.read_hold(hold.hold_id, places))
    target.finish_import(imported.hold_id)
    source.release_hold(hold.hold_id)
    return imported


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["one group", "a window besides"])
def test_a_request_begins_with_what_was_imported(config):
    source, target = manager_of(config), manager_of(config)
    served(source, "prompt", PROMPT)
    tables = [source.get_block_table("prompt", layer) for layer in range(2)]
    imported = handed_over(source, target, PROMPT)
    assert imported.num_tokens == 16
    assert imported.num_cached_tokens == 0
    target.add_request("same", PROMPT)
    target.release_hold(imported.hold_id)
    plan = target.step(["same"], [32], num_tokens=32)
    assert plan.num_cached_tokens.tolist() == [16]
    assert plan.num_tokens.tolist() == [3]
    for layer, table in enumerate(tables):
        mine = target.get_block_table("same", layer)
        seen = [c for c in range(4) if mine[c] >= 0]
        assert seen[-2:] == [2, 3]
        assert seen == [0, 1, 2, 3] or (config is WINDOWED and layer == 1)
        np.testing.assert_array_equal(
            content(target, [mine[c] for c in seen]), content(source, [table[c] for c in seen])
        )
    for manager, name in ((source, "prompt"), (target, "same")):
        manager.check_invariants()
        manager.free(name)
        manager.check_invariants()
        assert manager.get_num_free_blocks() == config.num_blocks
        assert manager.holds() == []


def test_a_windowed_group_wants_only_what_the_next_token_sees():
    imported = manager_of(WINDOWED).begin_import(PROMPT)
    # Position 16 sees tokens 11 to 16.
    assert imported.wanted.tolist() == [[0, 0], [0, 1], [0, 2], [1, 2], [0, 3], [1, 3]]
    assert imported.present.shape == (0, 2)


def test_nothing_can_be_hit_before_it_is_finished():
    source, target = manager_of(), manager_of()
    served(source, "prompt", PROMPT)
    hold, imported = source.hold_prefix(PROMPT), target.begin_import(PROMPT)
    target.add_request("same", PROMPT)
    assert target.lookup_prefix("same").num_tokens == 0
    target.write_import(imported.hold_id, imported.wanted, source.read_hold(hold.hold_id, imported.wanted))
    assert target.lookup_prefix("same").num_tokens == 0
    target.finish_import(imported.hold_id)
    assert target.lookup_prefix("same").num_tokens == 16
    target.check_invariants()


def test_what_did_not_arrive_is_never_hit():
    source, target = manager_of(), manager_of()
    served(source, "prompt", PROMPT)
    imported = handed_over(source, target, PROMPT, np.array([[0, 0], [0, 1], [0, 3]], np.int32))
    target.release_hold(imported.hold_id)
    target.add_request("same", PROMPT)
    assert target.lookup_prefix("same").num_tokens == 8  # up to the gap
    target.check_invariants()
    assert target.get_num_free_blocks() == 12


def test_a_cancelled_import_leaves_nothing_behind():
    target = manager_of()
    before = target.get_num_free_blocks()
    imported = target.begin_import(PROMPT)
    assert target.get_num_free_blocks() == before - 4
    target.check_invariants()
    target.release_hold(imported.hold_id)
    assert target.get_num_free_blocks() == before
    assert target.stats().num_cached_blocks == 0
    target.check_invariants()
    with pytest.raises(UnknownRequestError, match=imported.hold_id):
        target.release_hold(imported.hold_id)


def test_what_is_here_already_is_not_wanted_and_stays_while_held():
    target = manager_of()
    served(target, "first", PROMPT[:9])
    target.free("first")
    imported = target.begin_import(PROMPT)
    assert imported.num_cached_tokens == 8
    assert imported.present.tolist() == [[0, 0], [0, 1]]
    assert imported.wanted.tolist() == [[0, 2], [0, 3]]
    served(target, "others", np.arange(500, 532))  # all other blocks: those held are not evicted
    assert target.get_num_free_blocks() == 0
    target.finish_import(imported.hold_id)  # nothing came
    target.free("others")
    target.add_request("same", PROMPT)
    assert target.lookup_prefix("same").num_tokens == 8
    target.release_hold(imported.hold_id)
    target.check_invariants()
    assert target.get_num_free_blocks() == 12


def test_a_prompt_of_whole_blocks_computes_its_last_block_itself():
    target = manager_of()
    assert target.begin_import(PROMPT[:16]).num_tokens == 12
    assert target.begin_import(PROMPT[:4]).wanted.shape == (0, 2)
    target.check_invariants()


def test_two_imports_of_one_prompt_and_a_request_that_computed_it_meanwhile():
    source, target = manager_of(), manager_of(dataclasses.replace(CONFIG, num_blocks=20))
    served(source, "prompt", PROMPT)
    hold = source.hold_prefix(PROMPT)
    imports = [target.begin_import(PROMPT) for _ in range(2)]
    served(target, "computed", PROMPT)
    for imported in imports:
        target.write_import(imported.hold_id, imported.wanted, source.read_hold(hold.hold_id, imported.wanted))
        assert target.finish_import(imported.hold_id) == 0  # the keys are taken
    target.check_invariants()
    for imported in imports:
        target.release_hold(imported.hold_id)
    target.free("computed")
    target.check_invariants()
    assert target.get_num_free_blocks() == 20
    assert target.stats().num_cached_blocks == 4


def test_holds_follow_their_blocks_when_these_move():
    source, target = manager_of(), manager_of()
    served(source, "away", np.arange(900, 912))
    served(source, "prompt", PROMPT)
    hold, imported = source.hold_prefix(PROMPT), target.begin_import(PROMPT)
    wanted = np.asarray(source.read_hold(hold.hold_id, imported.wanted).k)
    source.free("away")
    assert source.evict_prefix(np.arange(900, 912)) == 3
    assert source.defragment().num_moved
    np.testing.assert_array_equal(source.read_hold(hold.hold_id, imported.wanted).k, wanted)
    source.check_invariants()


def test_what_a_reset_forgets_does_not_come_back():
    source, target = manager_of(), manager_of()
    for manager in (source, target):
        served(manager, "prompt", PROMPT[:9])
    served(source, "all", PROMPT)
    hold, imported = source.hold_prefix(PROMPT), target.begin_import(PROMPT)
    assert imported.num_cached_tokens == 8
    blocks = source.read_hold(hold.hold_id, imported.wanted)
    for manager in (source, target):
        manager.reset_prefix_cache()
    with pytest.raises(InvalidArgumentError, match="content"):
        source.read_hold(hold.hold_id, imported.wanted)
    target.write_import(imported.hold_id, imported.wanted, blocks)
    assert target.finish_import(imported.hold_id) == 2  # those that came afterwards
    target.add_request("same", PROMPT)
    assert target.lookup_prefix("same").num_tokens == 0
    target.check_invariants()


def test_a_request_may_be_called_like_a_hold():
    manager = manager_of()
    manager.allocate("handoff:0", 4)
    manager.add_request("handoff:1", PROMPT)
    hold = manager.begin_import(PROMPT)
    assert manager.get_num_free_blocks() == 12 - 1 - 4
    manager.release_hold(hold.hold_id)
    manager.free("handoff:0")
    manager.free("handoff:1")
    manager.check_invariants()
    assert manager.get_num_free_blocks() == 12


def test_events_name_what_can_be_hit():
    source, target = manager_of(), manager_of(event_capacity=100)
    served(source, "prompt", PROMPT)
    imported = handed_over(source, target, PROMPT, np.array([[0, 0], [0, 1], [0, 3]], np.int32))
    stored = [event for event in target.events.drain() if isinstance(event, BlockStored)]
    assert [event.keys for event in stored] == [imported.keys[:2], imported.keys[3:]]
    assert [event.parent_key for event in stored] == [None, imported.keys[2]]


def test_another_salt_is_another_prefix():
    source = manager_of()
    served(source, "prompt", PROMPT)
    assert source.hold_prefix(PROMPT).num_tokens == 16
    salted = source.hold_prefix(PROMPT, extras=CacheExtras(salt="tenant"))
    assert salted.num_tokens == 0
    source.check_invariants()


def test_zero_on_free_clears_before_content_arrives():
    source, target = manager_of(), manager_of(zero_on_free=True)
    served(source, "prompt", PROMPT)
    imported = handed_over(source, target, PROMPT)
    blocks = target.get_block_table(imported.hold_id)
    np.testing.assert_array_equal(content(target, blocks), content(source, source.get_block_table("prompt")[:4]))


def test_bad_input_raises_and_changes_nothing():
    manager = manager_of()
    served(manager, "prompt", PROMPT)
    hold, imported = manager.hold_prefix(PROMPT), manager.begin_import(PROMPT + 1000)
    blocks = manager.read_hold(hold.hold_id, [[0, 0], [0, 1]])
    places = np.array([[0, 0], [0, 1]], np.int32)
    free = manager.get_num_free_blocks()
    calls = [
        (UnknownRequestError, "handoff:9", lambda: manager.read_hold("handoff:9", places)),
        (InvalidArgumentError, "content", lambda: manager.read_hold(imported.hold_id, places)),
        (InvalidArgumentError, r"\[\[0, 4\]\]", lambda: manager.read_hold(hold.hold_id, [[0, 0], [0, 4]])),
        (InvalidArgumentError, "wants", lambda: manager.write_import(hold.hold_id, places, blocks)),
        (InvalidArgumentError, "-1", lambda: manager.write_import(imported.hold_id, [[0, -1], [0, 1]], blocks)),
        (InvalidBlockError, "twice", lambda: manager.write_import(imported.hold_id, [[0, 1], [0, 1]], blocks)),
        (ShapeMismatchError, "n, 2", lambda: manager.write_import(imported.hold_id, [0, 1], blocks)),
        (ShapeMismatchError, "want uint32", lambda: manager.write_import(imported.hold_id, places[:1], blocks)),
        (ShapeMismatchError, "float32", lambda: manager.write_import(imported.hold_id, places, as_floats(blocks))),
        (InvalidArgumentError, "no import", lambda: manager.finish_import(hold.hold_id)),
        (RequestTooLongError, "at most 32", lambda: manager.begin_import(np.arange(40))),
        (InvalidArgumentError, "holds open", lambda: manager.change_block_size(8)),
        (InvalidArgumentError, "integers", lambda: manager.hold_prefix([0.5])),
    ]
    for error, wanted, call in calls:
        with pytest.raises(error, match=wanted):
            call()
        assert manager.get_num_free_blocks() == free
        manager.check_invariants()
    assert manager.adapt_block_size() == 4
    manager.write_import(imported.hold_id, places, blocks)
    with pytest.raises(InvalidArgumentError, match="wants"):
        manager.write_import(imported.hold_id, places, blocks)  # once is enough
    assert manager.finish_import(imported.hold_id) == 2
    with pytest.raises(InvalidArgumentError, match="no import"):
        manager.finish_import(imported.hold_id)


def as_floats(blocks):
    return Blocks(*(x.astype(jnp.float32) for x in blocks))


def test_no_room():
    manager = manager_of()
    manager.allocate("others", 32)
    manager.allocate("more", 4)
    with pytest.raises(OutOfBlocksError, match="3 free"):
        manager.begin_import(PROMPT)
    assert manager.get_num_free_blocks() == 3
    manager.free("more")
    holds = [manager.begin_import(PROMPT[:2]) for _ in range(3)]
    with pytest.raises(TooManyRequestsError):
        manager.hold_prefix(PROMPT)
    for hold in holds:
        manager.release_hold(hold.hold_id)
    manager.check_invariants()


def test_a_manager_without_prefix_cache_says_so():
    with pytest.raises(InvalidArgumentError, match="prefix_caching"):
        manager_of(prefix_caching=False).begin_import(PROMPT)


def test_decode_steps_from_reserved_blocks_go_on_beside_a_hold():
    manager = manager_of(prediction_horizon=8)
    served(manager, "running", PROMPT[:5])
    imported = manager.begin_import(PROMPT)
    for token in range(12):
        manager.record_tokens(["running"], [token])
        assert manager.step(["running"], [1]).ok.all()
    manager.release_hold(imported.hold_id)
    manager.free("running")
    manager.check_invariants()
    assert manager.get_num_free_blocks() == 12
