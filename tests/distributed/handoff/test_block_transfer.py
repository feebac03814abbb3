"""Blocks moved between pages that lie differently, against plain numpy indexing of the page arrays."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from pyagent_kv_jax import DType, InvalidBlockError, KVCacheConfig, KVPages, ShapeMismatchError
from pyagent_kv_jax.config import LayerGroup
from pyagent_kv_jax.distributed import CacheSharding, ShardedKVPages
from pyagent_kv_jax.distributed.handoff import block_transfer
from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.distributed.handoff.block_transfer import move_blocks, read_blocks, write_blocks
from pyagent_kv_jax.tables.padding import chunks

CONFIG = KVCacheConfig(num_layers=3, num_heads=2, head_dim=8, v_head_dim=4, num_blocks=6, block_size=16)
WINDOWED = dataclasses.replace(CONFIG, layer_groups=(LayerGroup((0, 2)), LayerGroup((1,), sliding_window=20)))
PAIRED = dataclasses.replace(CONFIG, kernel_block_size=8)


def on_mesh(config, context=1, tensor=1, interleave=1, first=0):
    devices = jax.devices("cpu")[first : first + context * tensor]
    mesh = jax.make_mesh((context, tensor), ("c", "t"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return ShardedKVPages.create(config, CacheSharding(mesh, "c", "t", interleave))


def filled(pages, seed):
    """The same pages with random bits everywhere; what is not a copy of another rank's head is as random."""
    rng = np.random.default_rng(seed)

    def bits(x):
        values = rng.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)
        return jax.device_put(values, x.sharding, may_alias=False)

    return dataclasses.replace(pages, k_pages=bits(pages.k_pages), v_pages=bits(pages.v_pages))


def content(pages, block, layer, head, offset):
    """(K, V) bytes of one token, found as the issue words it: by rank, by local slot, by page."""
    config, copies, at = pages.config, 1, offset
    page_size = config.page_size
    page = (layer * config.pages_per_layer) + block * config.pages_per_block
    if isinstance(pages, ShardedKVPages):
        size, interleave = pages.sharding.context_size, pages.sharding.interleave
        copies = pages.sharding.head_copies(config.num_heads)
        rank = (offset // interleave) % size
        slot = offset // (size * interleave) * interleave + offset % interleave
        own = page_size // size
        page, at = page + slot // own, rank * own + slot % own
    else:
        page, at = page + offset // page_size, offset % page_size
    return tuple(np.asarray(x)[page, head * copies, at].tobytes() for x in (pages.k_pages, pages.v_pages))


def all_content(pages, block):
    config = pages.config
    k_pages, v_pages = np.asarray(pages.k_pages), np.asarray(pages.v_pages)
    host = dataclasses.replace(pages, k_pages=k_pages, v_pages=v_pages)
    return [
        content(host, block, layer, head, offset)
        for layer in range(config.layers_per_group)
        for head in range(config.num_heads)
        for offset in range(config.block_size)
    ]


SIDES = {
    "one device": lambda config: KVPages.create(config),
    "context 2": lambda config: on_mesh(config, context=2, interleave=2),
    "context 4, tensor 2": lambda config: on_mesh(config, context=4, tensor=2),
    "tensor 4, heads twice": lambda config: on_mesh(config, context=2, tensor=4, interleave=4),
    "the last two": lambda config: on_mesh(config, context=1, tensor=2, first=6),
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one device", "context 4, tensor 2"),
        ("context 4, tensor 2", "one device"),
        ("context 2", "tensor 4, heads twice"),
        ("tensor 4, heads twice", "the last two"),
        ("the last two", "context 2"),
    ],
)
def test_every_token_arrives_where_the_other_side_looks_for_it(source, target):
    source, target = filled(SIDES[source](CONFIG), 0), filled(SIDES[target](CONFIG), 1)
    if isinstance(source, ShardedKVPages) and source.sharding.head_copies(2) > 1:
        source = move_blocks(filled(KVPages.create(CONFIG), 2), range(6), source, range(6))  # so that copies are equal
    wanted = {dst: all_content(source, src) for src, dst in ((4, 1), (0, 5), (3, 0))}
    wanted |= {block: all_content(target, block) for block in (2, 3, 4)}
    target = move_blocks(source, [4, 0, 3], target, [1, 5, 0])
    for block, tokens in wanted.items():
        assert all_content(target, block) == tokens, block
    if isinstance(target, ShardedKVPages) and target.sharding.head_copies(2) > 1:
        for x in (target.k_pages, target.v_pages):  # every copy of a head is written
            stored = np.asarray(x).reshape(-1, 6, 2, 2, *x.shape[2:])[:, [0, 1, 5]]
            np.testing.assert_array_equal(stored[:, :, :, 0].tobytes(), stored[:, :, :, 1].tobytes())


@pytest.mark.parametrize("dtype", list(DType))
def test_all_dtypes_move_bit_for_bit(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    source, target = filled(KVPages.create(config), 0), filled(on_mesh(config, context=2), 1)
    wanted = all_content(source, 5)
    assert all_content(move_blocks(source, [5], target, [2]), 2) == wanted


@pytest.mark.parametrize("config", [WINDOWED, PAIRED], ids=["layer groups", "hybrid block sizes"])
def test_other_forms_of_blocks(config):
    source, target = filled(KVPages.create(config), 0), filled(on_mesh(config, context=2, interleave=4), 1)
    wanted, untouched = all_content(source, 5), all_content(target, 3)
    target = move_blocks(source, [5], target, [2])
    assert all_content(target, 2) == wanted
    assert all_content(target, 3) == untouched
    back = move_blocks(target, [2], filled(KVPages.create(config), 3), [0])
    assert all_content(back, 0) == wanted


def test_blocks_are_written_in_place():
    config = dataclasses.replace(CONFIG, num_blocks=2048)
    pages = KVPages.create(config)
    ids, blocks = np.array([1, 2], np.int32), read_blocks(pages, [3, 4])
    memory = block_transfer._write.lower(pages, ids, blocks).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes // 100
    on_ranks = on_mesh(config, context=2)
    placed = jax.device_put(blocks, block_transfer.sharding_of_blocks(on_ranks))
    memory = block_transfer._write.lower(on_ranks, ids, placed).compile().memory_analysis()
    assert memory.alias_size_in_bytes == on_ranks.nbytes // 2
    assert memory.temp_size_in_bytes < on_ranks.nbytes // 100


def test_nothing_is_left_out_or_sent_twice_by_chunks():
    for count in range(40):
        pieces = [list(range(40))[piece] for piece in chunks(count, 8)]
        assert [block for piece in pieces for block in piece] == list(range(count))
        assert all(len(piece) in (1, 2, 4, 8) for piece in pieces)


@pytest.mark.parametrize(
    ("error", "call", "wanted"),
    [
        (InvalidBlockError, lambda a, b: move_blocks(a, [0, 6], b, [0, 1]), r"\[6\]"),
        (InvalidBlockError, lambda a, b: move_blocks(a, [0, 1], b, [2, -1]), r"\[-1\]"),
        (InvalidBlockError, lambda a, b: move_blocks(a, [0, 1], b, [2, 2]), "twice"),
        (InvalidBlockError, lambda a, b: move_blocks(a, [0, 1], b, [2]), "2 blocks"),
        (ShapeMismatchError, lambda a, b: move_blocks(a, [0.5], b, [2]), "float64"),
        (ShapeMismatchError, lambda a, b: write_blocks(b, [1], Blocks(a.k_pages, a.v_pages)), "want uint32"),
        (InvalidBlockError, lambda a, b: write_blocks(b, [1, 1], read_blocks(a, [1, 1])), "twice"),
    ],
)
def test_bad_input_changes_nothing(error, call, wanted):
    source, target = filled(KVPages.create(CONFIG), 0), filled(KVPages.create(CONFIG), 1)
    with pytest.raises(error, match=wanted):
        call(source, target)
    assert not target.k_pages.is_deleted()


def test_another_geometry_is_refused():
    source = filled(KVPages.create(CONFIG), 0)
    target = filled(KVPages.create(dataclasses.replace(CONFIG, block_size=32)), 1)
    with pytest.raises(ShapeMismatchError, match="'block_size': 16"):
        move_blocks(source, [0], target, [0])
