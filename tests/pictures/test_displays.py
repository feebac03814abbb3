"""How objects show themselves: right numbers, well-formed and escaped HTML, and shapes where there are no values."""

import threading
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyagent_kv_jax import BlockPool, BlockTable, KVCacheConfig, KVCacheManager, ManagerOptions, PagedKVCache
from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.notebook_display import values_of
from pyagent_kv_jax.tables import SparseBlockTable

SIZES = {"num_layers": 2, "num_heads": 3, "head_dim": 4, "max_model_len": 256, "max_num_reqs": 24}


class Page(HTMLParser):
    """Text by cell, bar widths, and whether each tag that opens closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.widths: list[float] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        style = dict(attrs).get("style", "")
        if style.startswith("width:"):
            self.widths.append(float(style.split("%")[0][6:]))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def page(shown) -> Page:
    found = Page(shown._repr_html_())
    assert found.tags <= {"div", "span", "b", "table", "tr", "td", "th"}
    return found


def one_line(shown) -> str:
    line = repr(shown)
    assert "\n" not in line
    assert len(line) < 400
    return line


@pytest.fixture(scope="module")
def cache():
    cache = PagedKVCache.create(KVCacheConfig(num_blocks=64, **SIZES))
    for row in range(20):
        cache = cache.allocate_for_request(row, 5 + 2 * row)
    return cache.free_request(3)


LENGTHS = {row: 5 + 2 * row for row in range(20) if row != 3}
BLOCKS = {row: -(-length // 16) for row, length in LENGTHS.items()}


@pytest.mark.parametrize("sparse", [False, True])
def test_table_rows(cache, sparse):
    table = SparseBlockTable.from_dense(cache.table) if sparse else cache.table
    name, blocks, tokens = type(table).__name__, sum(BLOCKS.values()), sum(LENGTHS.values())
    assert one_line(table) == (
        f"{name}(24 rows of up to 16 blocks of 16 tokens: 19 rows in use, {blocks} blocks, {tokens} tokens)"
    )
    seen = page(table)
    assert seen.rows[0] == ["", "tokens", "blocks", "empty", "block ids"]
    assert len(seen.rows) == 1 + 16
    for cells, row in zip(seen.rows[1:], LENGTHS, strict=False):
        ids = np.asarray(table.get_row(row))[: BLOCKS[row]]
        empty = f"{1 - LENGTHS[row] / (16 * BLOCKS[row]):.1%}"
        assert cells == [f"row {row}", str(LENGTHS[row]), str(BLOCKS[row]), empty, ", ".join(map(str, ids))]
    assert "... 3 more rows in use" in seen.text
    share = 100 * tokens / (16 * blocks)
    np.testing.assert_allclose(seen.widths, [share, 100 - share], atol=1e-3)


def test_pool_counts():
    pool, admitted = BlockPool.create(40).allocate([10], capacity=10)
    pool = pool.mark_cached(admitted.ids[:4])[0].free(admitted.ids[:6])[0]
    assert one_line(pool) == "BlockPool(40 blocks: 4 held, 4 cached and free, 32 free)"
    seen = page(pool)
    np.testing.assert_allclose(seen.widths, [10, 10, 80], atol=1e-3)
    for text in ("4 held", "4 cached and free", "32 free"):
        assert text in seen.text


def test_cache_facts(cache):
    held, tokens = sum(BLOCKS.values()), sum(LENGTHS.values())
    config = "2 layers, 3 heads of 4, float32, 64 blocks of 16 tokens, 192 KiB"  # 64 * 16 * 2 * 3 * (4 + 4) * 4
    assert one_line(cache) == f"PagedKVCache({config}: {held} blocks held, {tokens} tokens in 19 rows)"
    seen = page(cache)
    assert config in seen.text
    assert [row[:3] for row in seen.rows[1:]] == [
        [f"row {row}", str(LENGTHS[row]), str(BLOCKS[row])] for row in list(LENGTHS)[:16]
    ]
    np.testing.assert_allclose(seen.widths, [100 * held / 64, 0, 100 * (64 - held) / 64], atol=1e-3)
    assert "no rows in use" in page(PagedKVCache.create(cache.config)).text


def test_manager_facts_and_escaping():
    evil = "<script>alert('x')</script>&"
    manager = KVCacheManager(KVCacheConfig(num_blocks=32, **SIZES), ManagerOptions(num_host_blocks=8))
    prompt = np.arange(40)
    manager.add_request("gone", prompt[::-1])
    manager.allocate("gone", 40)
    manager.free("gone")
    manager.add_request(evil, prompt)
    manager.allocate(evil, 40)
    manager.add_request("b", np.arange(45))
    manager.allocate("b", 45)
    manager.allocate("unknown tokens", 16)
    manager.allocate("c", 20)
    manager.preempt("c", "swap")
    manager.add_request("later", prompt)
    stats, html = manager.stats(), manager._repr_html_()
    assert "<script" not in html
    seen = page(manager)
    assert seen.rows[1:] == [
        [evil, "40", "3", "16.7%", "32"],
        ["b", "45", "3", "6.2%", "32"],
        ["unknown tokens", "16", "1", "0.0%", "0"],
    ]
    assert f"prefix hit rate {stats.hit_rate:.0%}, {stats.num_cached_blocks} blocks can be hit" in seen.text
    assert "2 of 8 host blocks used; 2 more requests without blocks here, 1 in host memory" in seen.text
    held = stats.num_blocks - stats.num_free_blocks
    counts = np.array([held, stats.num_cached_free_blocks, stats.num_free_blocks - stats.num_cached_free_blocks])
    np.testing.assert_allclose(seen.widths, 100 * counts / 32, atol=1e-3)
    assert f"3 requests, {held} held, {counts[1]} cached and free, {counts[2]} free, prefix" in one_line(manager)


def test_manager_shows_itself_while_decoding_ahead_and_when_locked(monkeypatch):
    manager = KVCacheManager(KVCacheConfig(num_blocks=32, **SIZES), ManagerOptions(prediction_horizon=32))
    manager.step(["a"], [10], num_tokens=16)
    for _ in range(12):
        manager.step(["a"], [1])
    used = manager._state.ahead.used.copy()
    assert used.any()  # the control plane does not know them yet
    assert page(manager).rows[1][:3] == ["a", "22", "2"]
    assert "1 request, 2 held" in one_line(manager)
    assert (manager._state.ahead.used == used).all()  # nor does looking tell it
    assert manager.stats().num_free_blocks == 30
    monkeypatch.setattr("pyagent_kv_jax.manager.manager_display._PATIENCE", 0.01)
    taken, done = threading.Event(), threading.Event()

    def keep() -> None:
        with manager._lock:
            taken.set()
            done.wait(10)

    thread = threading.Thread(target=keep)
    thread.start()
    taken.wait()
    shown = one_line(manager), page(manager).text
    done.set()
    thread.join()
    assert all("32 blocks of 16 tokens" in text and "request" not in text for text in shown)


def objects(cache):
    return [cache, cache.pool, cache.table, SparseBlockTable.from_dense(cache.table)]


def test_without_values_shapes_are_shown(cache):
    lines = []

    def look(trees):
        for tree in trees:
            lines.append(one_line(tree))
            page(tree)
        return trees

    jax.eval_shape(look, objects(cache))
    jax.jit(lambda trees: look(trees)[1].counters)(objects(cache))
    assert lines[:4] == lines[4:]
    assert lines[0].endswith("pages float32[128,3,16,4], no values here)")
    assert lines[1].startswith("BlockPool(ref_counts=int32[64], cached=bool[64]")
    assert "blocks=int32[24,16]" in lines[2]
    assert "nodes=int32[" in lines[3]
    shapes = jax.eval_shape(lambda tree: tree, objects(cache))
    assert [one_line(tree) for tree in look(shapes)] == lines[:4]
    jax.eval_shape(jax.vmap(look), jax.tree.map(lambda x: x[None], objects(cache)))
    assert lines[-4:] == lines[:4]  # as each of the batch is
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), cache.table)
    assert "blocks=int32[2,24,16]" in one_line(batch)
    page(batch)


def test_odd_leaves_do_not_break_it(cache):
    for make in (lambda _: None, lambda x: x.sharding, lambda _: object(), lambda _: 3):
        for tree in objects(cache):
            odd = jax.tree.map(make, tree)
            one_line(odd)
            page(odd)
    assert (
        one_line(jax.tree.map(lambda _: None, cache.table))
        == "BlockTable(num_blocks=None, num_tokens=None, blocks=None)"
    )


def test_donated_arrays_are_named_as_such(cache):
    table, pool = jax.tree.map(jnp.copy, (cache.table, cache.pool))
    held = PagedKVCache(cache.pages, pool, table, cache.config)
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(lambda x: x | 1, t), donate_argnums=0)((table, pool)))
    assert "int32[24] (deleted)" in one_line(table)
    assert "(deleted)" in page(table).text
    assert "counters=int32[7] (deleted)" in one_line(pool)
    assert "no values here" in one_line(held)
    assert "no values here" in page(held).text


def test_arrays_on_several_devices(cache):
    mesh = jax.make_mesh((2,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    on_both = jax.device_put(cache.table, replicated)
    assert one_line(on_both) == one_line(cache.table)
    assert page(on_both).rows == page(cache.table).rows
    assert one_line(jax.device_put(cache.table, spread)) == one_line(cache.table)


def test_metadata_is_one_line(cache):
    _, meta = cache.extend(np.ones(24, np.int32))
    line = one_line(meta)
    assert "block_tables=int32[24,16], kv_lens=int32[24], query_start_loc=None" in line
    assert line.endswith("max_query_len=1, max_kv_len=256)")
    assert one_line(jax.tree.map(lambda _: None, meta)).startswith("AttentionMetadata(block_tables=None")


def test_values_are_read_only_where_they_can_be():
    assert values_of(np.arange(3))[0].tolist() == [0, 1, 2]
    assert values_of(jnp.arange(3), None) is None
    assert values_of(jax.ShapeDtypeStruct((3,), jnp.int32)) is None
    assert values_of(3) is None
    assert values_of(jnp.arange(3))[0].tolist() == [0, 1, 2]


def test_wide_rows_show_their_first_blocks():
    table = BlockTable.create(BlockTableConfig(block_size=4, max_num_reqs=2, max_num_blocks_per_req=12))
    table = table.append_row(1, np.arange(20, 30), 38)
    assert page(table).rows[1] == ["row 1", "38", "10", "5.0%", "20, 21, 22, 23, 24, 25, 26, 27, ..."]
    table = table.set_block(0, 2, 7)  # columns before it were never set
    assert page(table).rows[1][-1] == "-, -, 7"
