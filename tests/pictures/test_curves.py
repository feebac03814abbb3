"""Pictures of numbers: heights, areas and legends against what numpy makes of the same input."""

import matplotlib
import numpy as np
import pytest

from pyagent_kv_jax import KVCacheConfig, KVCacheManager, PagedKVCache
from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import (
    BlocksPanel,
    KernelPoint,
    MemoryHistory,
    MemoryRecorder,
    blocks_over_time,
    empty_share,
    kernel_points,
    memory_over_time,
    roofline,
    style,
    waste_by_block_size,
)

matplotlib.use("Agg")

CONFIG = KVCacheConfig(num_layers=2, num_heads=1, head_dim=4, num_blocks=32, max_model_len=256, max_num_reqs=4)


def test_areas_add_up_to_the_pool():
    rng = np.random.default_rng(0)
    steps, blocks = 20, 64
    held = rng.integers(8, 40, steps)
    history = MemoryHistory(
        num_blocks=np.full(steps, blocks),
        block_size=np.full(steps, 16),
        held=held,
        cached_free=rng.integers(0, 20, steps),
        tokens=held * 16 - rng.integers(0, 100, steps),
        owners=rng.integers(1, 9, steps),
        block_bytes=np.full(steps, 4096),
    )
    for unit, scale in (("blocks", 1), ("tokens", 16), ("bytes", 4)):
        (ax,) = memory_over_time(history, unit=unit).axes
        want = np.cumsum(
            [history.tokens / 16, held - history.tokens / 16, history.cached_free, blocks - held - history.cached_free],
            axis=0,
        )
        for area, edge in zip(ax.collections, want, strict=True):
            drawn = area.get_paths()[0].vertices.tolist()
            for step in range(steps):  # the middle of a step: its edge is drawn from its beginning to its end
                levels = {round(y, 6) for x, y in drawn if x == step} & {round(y, 6) for x, y in drawn if x == step + 1}
                assert any(abs(y - edge[step] * scale) < 1e-5 for y in levels), (unit, step)
        assert ax.get_ylabel().endswith("KiB" if unit == "bytes" else unit)
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[2].startswith("free, cached content kept (mean ")
    share = 1 - history.tokens.sum() / (held.sum() * 16)
    assert history.empty_share == pytest.approx(share)
    assert f"{share:.1%} of what they hold is empty" in ax.get_title(loc="left")


def test_recorder_counts_what_is_there():
    recorder, manager = MemoryRecorder(), KVCacheManager(CONFIG)
    recorder.record(manager)
    manager.add_request("a", np.arange(40))
    manager.allocate("a", 40)
    recorder.record(manager)
    manager.fork("a", "b")
    manager.extend("b", 1)  # a block of its own in place of the third, shared one
    recorder.record(manager)
    manager.free("a")
    manager.free("b")
    recorder.record(manager)
    history = recorder.history()
    assert history.held.tolist() == [0, 3, 4, 0]
    assert history.tokens.tolist() == [0, 40, 40 + 9, 0]
    assert history.cached_free.tolist() == [0, 0, 0, 2]
    assert history.owners.tolist() == [0, 1, 2, 0]
    assert set(history.block_bytes.tolist()) == {CONFIG.block_size_bytes()}
    of_cache = MemoryRecorder()
    of_cache.record(PagedKVCache.create(CONFIG).allocate_for_request(2, 17))
    assert of_cache.history().held.tolist() == [2]
    assert of_cache.history().tokens.tolist() == [17]
    with pytest.raises(InvalidArgumentError, match="got int"):
        recorder.record(3)
    with pytest.raises(InvalidArgumentError, match=r"got MemoryRecorder, want .*history\(\)"):
        memory_over_time(recorder)
    with pytest.raises(InvalidArgumentError, match="no steps"):
        memory_over_time(MemoryRecorder().history())
    with pytest.raises(InvalidArgumentError, match="'pages'"):
        memory_over_time(history, unit="pages")


def test_bars_are_the_empty_shares():
    rng = np.random.default_rng(1)
    lengths, sizes = rng.integers(1, 900, 50), (1, 16, 256)
    (ax,) = waste_by_block_size(lengths, sizes=sizes, row_tokens=1024, in_use=16).axes
    drawn = [bar.get_height() for bar in ax.patches]
    want = [1 - lengths.sum() / sum(-(-int(n) // size) * size for n in lengths) for size in sizes]
    np.testing.assert_allclose(drawn, [*want, 1 - lengths.mean() / 1024], atol=1e-12)
    assert drawn[0] == 0
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "16\nin use", "256", "dense rows\nof 1,024"]
    texts = [text.get_text() for text in ax.texts]
    assert texts[-1] == f"{1 - lengths.mean() / 1024:.0%}"
    assert texts[1] == f"{100 * want[1]:.1f}%"
    assert empty_share([], 16) == 0.0
    for bad, what in (
        (([],), "n > 0"),
        (([1.5],), "positive integers"),
        (([0, 3],), "positive integers"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            waste_by_block_size(*bad)
    with pytest.raises(InvalidArgumentError, match="at least the 900"):
        waste_by_block_size([900], row_tokens=512)
    with pytest.raises(InvalidArgumentError, match="sizes"):
        waste_by_block_size([900], sizes=[0])


REPORT = {
    "rows": [
        {"case": "copy", "ours_us": 10.0, "baseline": "xla", "num_bytes": 8e6, "flops": 0.0},
        {"case": "decode", "ours_us": 4.0, "baseline": "xla", "num_bytes": 2e6, "flops": 1e7},
        {"case": "decode", "ours_us": 4.0, "baseline": "torch", "num_bytes": 2e6, "flops": 1e7},
        {"case": "prefill", "ours_us": 50.0, "num_bytes": 1e6, "flops": 4e9},
        {"case": "older report", "ours_us": 50.0},
    ]
}


def test_points_stand_under_the_roof():
    points = kernel_points(REPORT)
    assert [point.label for point in points] == ["copy", "decode", "prefill"]
    bandwidth, rate = 1e12, 1e14
    (ax,) = roofline(points, bandwidth, rate).axes
    drawn = [line for line in ax.lines if line.get_marker() not in ("None", None) and len(line.get_xdata()) == 1]
    xy = np.array([[line.get_xdata()[0], line.get_ydata()[0]] for line in drawn])
    np.testing.assert_allclose(xy[1], [5.0, 1e7 / 4e-6])
    np.testing.assert_allclose(xy[2], [4000.0, 4e9 / 50e-6])
    roof = next(line for line in ax.lines if len(line.get_xdata()) > 2)
    x, y = roof.get_data()
    np.testing.assert_allclose(y, np.minimum(x * bandwidth, rate))
    assert xy[0, 0] < x.min()  # the copy, in its strip, as far below its own bit of roof as its bandwidth
    strip = next(line for line in ax.lines if len(line.get_xdata()) == 2)
    assert xy[0, 1] / strip.get_ydata()[0] == pytest.approx(8e6 / 10e-6 / bandwidth)
    low, high = ax.get_xlim()
    assert (low < xy[:, 0]).all()
    assert (xy[:, 0] < high).all()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["copy, measured: 1 TB/s", "matrix product, measured: 100 TFLOP/s"]
    assert labels[2] == "copy: 10 µs, 80% of the limit"
    assert labels[3] == "decode: 4 µs, 50% of the limit"
    assert labels[4] == "prefill: 50 µs, 80% of the limit"


def test_roof_without_arithmetic_and_bad_numbers():
    point = KernelPoint("decode", 4.0, 2e6, 1e7)
    (ax,) = roofline([point], 1e12).axes
    x, y = next(line for line in ax.lines if len(line.get_xdata()) > 2).get_data()
    np.testing.assert_allclose(y, x * 1e12)
    for bad in (([], 1e12), ([point], 0.0), ([point._replace(microseconds=0.0)], 1e12), ([point], 1e12, float("nan"))):
        with pytest.raises(InvalidArgumentError, match="roofline"):
            roofline(*bad)


def test_blocks_over_time_colours_each_unit():
    owner = np.array([[0, 0, -1, -1], [0, 0, 1, -1], [-1, -1, 1, -1]])
    used = np.array([[True, False, False, False], [True, True, False, False], [False, False, True, False]])
    figure = blocks_over_time([BlocksPanel("one", "block id", owner, used, 2), BlocksPanel("two", "id", owner, used)])
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (4, 3, 3)
    np.testing.assert_allclose(image[0, 0], style.owner_color(0), atol=1e-6)
    np.testing.assert_allclose(image[1, 0], style.EMPTY, atol=1e-6)
    np.testing.assert_allclose(image[2, 1], style.EMPTY, atol=1e-6)
    np.testing.assert_allclose(image[2, 2], style.owner_color(1), atol=1e-6)
    np.testing.assert_allclose(image[3], np.ones((3, 3)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["one", "two"]
