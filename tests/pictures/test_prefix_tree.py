"""The tree of prefixes: which blocks follow which, who holds them, hits, and what is left of evicted ones."""

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, LayerGroup, ManagerOptions
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import prefix_runs, prefix_tree

matplotlib.use("Agg")

SIZES = {"num_layers": 2, "num_heads": 1, "head_dim": 4, "max_model_len": 256, "max_num_reqs": 8, "block_size": 4}
RNG = np.random.default_rng(0)
COMMON, LEFT, RIGHT = RNG.integers(0, 999, 12), RNG.integers(0, 999, 9), RNG.integers(0, 999, 5)


def admit(manager, name, *parts):
    tokens = np.concatenate(parts)
    manager.add_request(name, tokens)
    return manager.allocate(name, len(tokens))


@pytest.fixture(
    params=["sha256", lambda data: bytes(sum(data[i::16]) % 251 for i in range(16))], ids=["sha256", "weak"]
)
def manager(request):
    """Three requests that begin with 12 common tokens: two of them alike for two blocks more; one is gone."""
    manager = KVCacheManager(KVCacheConfig(num_blocks=24, **SIZES), ManagerOptions(hash_algorithm=request.param))
    admit(manager, "left", COMMON, LEFT)
    admit(manager, "right", COMMON, RIGHT)
    admit(manager, "gone", COMMON, LEFT[:8], RIGHT)
    manager.free("gone")
    return manager


def test_runs_are_cut_at_branches_and_where_holders_change(manager):
    left, right = (manager.get_block_table(name) for name in ("left", "right"))
    runs = prefix_runs(manager.snapshot())
    names = manager.request_ids()
    seen = {run.blocks: ([names[i] for i in run.holders], run.hits, run.first_column, run.num_tokens) for run in runs}
    gone = next(run for run in runs if not run.holders)
    assert seen == {
        tuple(left[:3]): (["left", "right"], 2, 0, 12),
        tuple(left[3:5]): (["left"], 1, 3, 8),
        (right[3],): (["right"], 0, 3, 4),
        gone.blocks: ([], 0, 5, 4),
    }
    of = {run.blocks: runs[run.parent].blocks if run.parent >= 0 else None for run in runs}
    assert of[tuple(left[:3])] is None
    assert of[tuple(left[3:5])] == of[(right[3],)] == tuple(left[:3])
    assert of[gone.blocks] == tuple(left[3:5])
    assert all(run.parent < i for i, run in enumerate(runs))


def test_picture_says_what_the_runs_are(manager):
    (ax,) = prefix_tree(manager).axes
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    assert sorted(box.get_gid() for box in boxes) == ["free", "held", "held", "held"]
    shared = max(boxes, key=lambda box: box.get_linewidth())
    texts = [text.get_text() for text in ax.texts]
    assert "blocks 0-2\nleft, right\n2 hits" in texts
    assert sum("held by nobody" in text for text in texts) == 1
    assert sorted(text for text in texts if text.isdigit()) == ["12", "4", "4", "8"]  # on the lines
    assert shared.get_gid() == "held"
    assert ax.get_title(loc="left") == (
        f"Prefix cache: 28 tokens in 7 cached blocks, 4 of them held by nobody; hit rate {32 / 63:.0%}"
    )
    assert manager.stats().hit_rate == pytest.approx(32 / (21 + 17 + 25))
    xs = [box.get_x() for box in boxes]
    assert len(set(xs)) == 3  # three levels
    overlap = {(box.get_x(), round(box.get_y(), 3)) for box in boxes}
    assert len(overlap) == len(boxes)


def test_evicted_beginning_leaves_an_end_that_says_so():
    manager = KVCacheManager(KVCacheConfig(num_blocks=24, **SIZES))
    admit(manager, "a", COMMON, LEFT)
    assert manager.evict_prefix(COMMON[:4]) == 1
    (run,) = prefix_runs(manager.snapshot())
    assert (run.first_column, run.parent, run.num_tokens) == (1, -1, 16)
    assert "16\nafter 4 evicted" in [text.get_text() for text in prefix_tree(manager).axes[0].texts]
    manager.reset_prefix_cache()
    assert prefix_runs(manager.snapshot()) == []
    assert "nothing is cached" in [text.get_text() for text in prefix_tree(manager).axes[0].texts]


def test_moved_blocks_keep_their_places():
    manager = KVCacheManager(KVCacheConfig(num_blocks=24, **SIZES))
    manager.allocate("before", 40)
    admit(manager, "left", COMMON, LEFT)
    admit(manager, "right", COMMON, RIGHT)
    manager.free("before")
    before = prefix_runs(manager.snapshot())
    assert manager.defragment().num_moved > 0
    after = prefix_runs(manager.snapshot())
    shape = [(run.first_column, run.num_tokens, run.holders, run.hits) for run in before]
    assert sorted(shape) == sorted((run.first_column, run.num_tokens, run.holders, run.hits) for run in after)
    tables = [manager.get_block_table("left")[:5], manager.get_block_table("right")[:4]]
    assert {block for run in after for block in run.blocks} == set().union(*tables)


def test_each_layer_group_has_a_tree_and_many_runs_are_counted():
    groups = (LayerGroup((0,)), LayerGroup((1,), sliding_window=6))
    manager = KVCacheManager(KVCacheConfig(num_blocks=64, layer_groups=groups, **SIZES))
    for i in range(5):
        admit(manager, f"r{i}", RNG.integers(0, 999, 9))
    seen = manager.snapshot()
    for group in range(2):
        blocks = {block for run in prefix_runs(seen, group) for block in run.blocks}
        assert blocks == set(seen.prefix_blocks[group].ids.tolist())
        assert len(blocks) == 10
    (ax,) = prefix_tree(manager, layer_idx=1, most_runs=3).axes
    assert len([patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]) == 3
    assert ax.get_xlabel() == "... and 2 more runs"
    with pytest.raises(InvalidArgumentError, match="layer_idx: got 2"):
        prefix_tree(manager, layer_idx=2)
    with pytest.raises(InvalidArgumentError, match="got int"):
        prefix_tree(3)
