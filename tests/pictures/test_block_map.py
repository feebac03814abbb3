"""What is drawn of a pool: as many cells of each kind as there are blocks, under the letters of those who hold them."""

import re

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure

from pyagent_kv_jax import BlockPool, BlockTable, KVCacheConfig, KVCacheManager, LayerGroup, PagedKVCache
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import block_map, block_owners, style
from pyagent_kv_jax.tables import SparseBlockTable

matplotlib.use("Agg")

SIZES = {"num_layers": 2, "num_heads": 1, "head_dim": 4, "max_model_len": 256, "max_num_reqs": 8}


@pytest.fixture(scope="module")
def manager():
    """Prefixes shared by two, a fork, blocks set aside, and cached content of a request that is gone."""
    rng = np.random.default_rng(0)
    manager = KVCacheManager(KVCacheConfig(num_blocks=48, **SIZES))
    prompt = rng.integers(0, 999, 70)
    for name, tokens in (
        ("first", prompt),
        ("second", np.concatenate([prompt[:64], rng.integers(0, 999, 30)])),
        ("gone", rng.integers(0, 999, 100)),
    ):
        manager.add_request(name, tokens)
        manager.allocate(name, len(tokens))
    manager.free("gone")
    manager.allocate("third", 33)
    manager.fork("third", "fork")
    manager.reserve("second", 40)
    return manager


def cells(figure: Figure) -> dict[str, int]:
    """Drawn cells by kind."""
    found = [c for c in figure.axes[0].collections if isinstance(c, PatchCollection)]
    return {collection.get_gid(): len(collection.get_paths()) for collection in found}


def marks(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def count_in(labels: list[str], word: str) -> int:
    (label,) = [label for label in labels if word in label]
    return int(re.search(r"\((\d+)\)", label)[1])


def test_manager_has_a_cell_for_each_block(manager):
    figure, stats = block_map(manager), manager.stats()
    drawn, labels = cells(figure), legend(figure)
    tables = {name: manager.get_block_table(name) for name in manager.request_ids()}
    held = set().union(*tables.values())
    infos = [manager.block_info(block) for block in range(48)]
    shared = [info.block_id for info in infos if info.ref_count > 1]
    assert drawn["free"] == stats.num_free_blocks - stats.num_cached_free_blocks
    assert drawn["cached and free"] == stats.num_cached_free_blocks == 6
    assert drawn["held, room"] == len(held) == 48 - stats.num_free_blocks
    assert drawn["shared"] == len(shared) == count_in(labels, "shared by n") == 4 + 3
    assert drawn["set aside"] == count_in(labels, "striped") == 3
    assert count_in(labels, "white") == drawn["free"]
    assert count_in(labels, "dotted") == 6
    times = style.TIMES
    want = {f"A{times}2": 4, "A": 1, "B": len(tables["second"]) - 4, f"C{times}2": 3}
    assert {mark: marks(figure).count(mark) for mark in set(marks(figure))} == want
    assert labels[0] == "A  first: 70 tokens in 5 blocks"
    assert labels[1] == f"B  second: 94 tokens in {len(tables['second'])} blocks"


def test_cells_are_filled_as_far_as_tokens_go(manager):
    owners = block_owners(manager)
    (filled,) = [c for c in block_map(manager).axes[0].collections if c.get_gid() == "held, tokens"]
    widths = np.array([np.ptp(path.vertices[:, 0]) for path in filled.get_paths()])
    tokens = np.array([min(max(70 - 16 * i, 0), 16) for i in range(5)])  # of the first request
    np.testing.assert_allclose(widths[:5] / widths.max(), tokens / 16)
    blocks = manager.get_block_table("first")
    assert owners.tokens[blocks].tolist() == tokens.tolist()
    assert owners.references[blocks].tolist() == [2, 2, 2, 2, 1]


def test_dots_are_where_held_content_is_cached(manager):
    (dots,) = [c for c in block_map(manager).axes[0].collections if c.get_gid() == "cached and held"]
    seen, owners = np.floor(dots.get_offsets()).astype(int), block_owners(manager)
    columns = row_length(block_map(manager))
    assert sorted((seen[:, 1] * columns + seen[:, 0]).tolist()) == np.flatnonzero(owners.cached & owners.held).tolist()
    assert len(seen) == 5  # four shared blocks, and one more full one of the second request


def row_length(figure: Figure) -> int:
    """Cells of a row: the id of the second row's first cell."""
    return int(figure.axes[0].get_yticklabels()[1].get_text())


@pytest.mark.parametrize("table_type", [BlockTable, SparseBlockTable])
def test_pool_with_table_and_names(table_type):
    table = table_type.create(BlockTableConfig(block_size=4, max_num_reqs=3, max_num_blocks_per_req=4))
    table = table.append_row(0, [5, 2], 7).append_row(2, [2, 9], 5)
    pool = BlockPool.with_references(np.array([0, 0, 2, 0, 0, 1, 0, 0, 0, 1, 1, 0]))
    figure = block_map(pool, table, names=["one", "none", "two"])
    assert cells(figure) == {
        "free": 8,
        "held": 1,  # block 10: nobody knows by whom
        "held, room": 3,
        "held, tokens": 3,
        "shared": 1,
    }
    assert sorted(marks(figure)) == ["?", "A", f"A{style.TIMES}2", "B"]
    assert legend(figure)[:2] == ["A  one: 7 tokens in 2 blocks", "B  two: 5 tokens in 2 blocks"]
    assert block_owners(pool, table).tokens[[5, 2, 9]].tolist() == [4, 4, 1]  # block 2: 3 tokens of one, 4 of the other


def test_pool_alone_and_cache():
    cache = PagedKVCache.create(KVCacheConfig(num_blocks=16, **SIZES)).allocate_for_request(1, 40)
    assert cells(block_map(cache))["held, room"] == 3
    assert legend(block_map(cache))[0] == "A  row 1: 40 tokens in 3 blocks"
    alone = block_map(cache.pool)
    assert cells(alone) == {"free": 13, "held": 3}
    assert marks(alone) == ["?"] * 3


def test_layer_groups_are_numbered():
    groups = (LayerGroup((0,)), LayerGroup((1,), sliding_window=8))
    manager = KVCacheManager(KVCacheConfig(num_blocks=32, layer_groups=groups, **SIZES))
    manager.allocate("a", 40)
    figure = block_map(manager)
    assert marks(figure).count("A0") == marks(figure).count("A1") == 3
    assert any("layer group" in label for label in legend(figure))


def test_thousands_of_blocks_are_marked_once_a_run():
    held = np.arange(4000).reshape(40, 100) % 100 < 90
    table = BlockTable(
        blocks=jnp.asarray(np.where(held, np.arange(4000).reshape(40, 100), -1)),
        num_blocks=jnp.full(40, 90),
        num_tokens=jnp.full(40, 90 * 16),
        config=BlockTableConfig(block_size=16, max_num_reqs=40, max_num_blocks_per_req=100),
    )
    figure = block_map(BlockPool.with_references(held.ravel().astype(np.int32)), table)
    assert cells(figure)["held, tokens"] == 3600
    seen = set(marks(figure))
    assert seen == {style.owner_mark(owner) for owner in range(40)}
    assert len(marks(figure)) < 150
    assert legend(figure)[11] == "... and 29 more, each with letters of its own"
    figure.canvas.draw()  # no text is wider than the run it stands on
    ax = figure.axes[0]
    cell = np.diff(ax.transData.transform([(0, 0), (1, 0)])[:, 0])[0]
    widest = max(text.get_window_extent().width for text in ax.texts)
    assert widest < 6 * cell


def test_shows_itself_and_leaves_pyplot_alone(manager):
    from matplotlib import pyplot as plt

    figure = block_map(manager)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    own = Figure()
    axes = own.subplots(1, 2)
    assert block_map(manager, ax=axes[1], title="mine") is own
    assert axes[1].get_title(loc="left") == "mine"
    assert not axes[0].collections


def test_owners_differ_in_letters_and_in_grey():
    assert [style.owner_mark(i) for i in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        *("A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA")
    ]
    assert len({style.owner_color(i) for i in range(18)}) == 18
    grey = np.array([style.owner_color(i) for i in range(18)]) @ [0.299, 0.587, 0.114]
    assert abs(np.diff(grey)).min() > 0.05  # neighbours
    assert grey.max() < style.EMPTY[0] - 0.05


def test_bad_input(manager):
    pool = BlockPool.create(4)
    table = BlockTable.create(BlockTableConfig(block_size=4, max_num_reqs=2, max_num_blocks_per_req=4))
    for arguments, what in (
        ((manager, table), "a manager has its own"),
        ((np.zeros(3),), "got ndarray"),
        ((pool, np.zeros(3)), "got BlockPool with ndarray"),
        ((pool, table.append_row(0, [7], 4)), "got block 7"),
        ((pool, table.append_row(1, [2], 4), ["one"]), "want at least 2"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            block_owners(*arguments)

    def traced(pool):
        with pytest.raises(InvalidArgumentError, match="without values"):
            block_map(pool)
        return pool

    jax.eval_shape(traced, pool)
