"""``jax.experimental.transfer`` as it is used here; two ends of one process, and one that is killed."""

from __future__ import annotations

import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pyagent_kv_jax import DType, KVCacheConfig, KVPages
from pyagent_kv_jax.distributed.handoff.block_transfer import read_blocks, write_blocks
from pyagent_kv_jax.distributed.handoff.bulk_transfer import BulkEndpoint
from pyagent_kv_jax.errors import TransferError
from tests.distributed.handoff.test_block_transfer import all_content, filled, on_mesh

CONFIG = KVCacheConfig(2, 2, 8, num_blocks=4, block_size=4, dtype=DType.BFLOAT16)


def some_blocks(count=3):
    pages = KVPages.create(CONFIG)
    bits = np.random.default_rng(0).integers(0, 2**16, pages.k_pages.shape).astype(np.uint16)
    return read_blocks(KVPages(jax.numpy.asarray(bits), pages.v_pages, None, None, CONFIG), range(count))


def arrived(pulled, seconds=60.0):
    deadline = time.monotonic() + seconds
    while (blocks := pulled.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return blocks


@pytest.fixture(scope="module")
def ends():
    first, second = jax.devices("cpu")[:2]
    return BulkEndpoint(first), BulkEndpoint(second)


def test_blocks_arrive_bit_for_bit_on_the_device_of_the_end_that_pulls(ends):
    giver, taker = ends
    blocks = some_blocks()
    uuid = giver.put(blocks)
    assert giver.num_given == 1
    found = arrived(taker.pull(giver.address, uuid, CONFIG, 3))
    giver.fetched(uuid)
    assert giver.num_given == 0
    np.testing.assert_array_equal(found.k, blocks.k)
    np.testing.assert_array_equal(found.v, blocks.v)
    assert found.k.devices() == {jax.devices("cpu")[1]}


def test_between_meshes_that_lie_differently(ends):
    giver, taker = ends
    source, target = (filled(on_mesh(CONFIG, *sizes), seed) for seed, sizes in enumerate([(2, 1), (1, 2, 2, 4)]))
    wanted = [all_content(source, block) for block in (0, 3)]
    uuid = giver.put(read_blocks(source, [0, 3]))
    target = write_blocks(target, [2, 1], arrived(taker.pull(giver.address, uuid, CONFIG, 2)))
    giver.fetched(uuid)
    assert [all_content(target, block) for block in (2, 1)] == wanted


def test_numbers_cannot_be_guessed(ends):
    giver, _ = ends
    uuids = [giver.put(some_blocks(1)) for _ in range(4)]
    assert len({uuid >> 40 for uuid in uuids}) == 4
    for uuid in uuids:
        giver.drop(uuid)
        giver.drop(uuid)
    assert giver.num_given == 0


def test_what_was_put_twice_as_large_is_an_error_and_the_next_pull_works(ends):
    giver, taker = ends
    with pytest.raises(TransferError, match="broke off"):
        arrived(taker.pull(giver.address, giver.put(some_blocks(1)), CONFIG, 4))
    blocks = some_blocks(2)
    np.testing.assert_array_equal(arrived(taker.pull(giver.address, giver.put(blocks), CONFIG, 2)).k, blocks.k)


GIVER = """
import sys, time
from tests.distributed.handoff.test_bulk_transfer import *
end = BulkEndpoint(jax.devices("cpu")[0])
print(end.address, flush=True)
sys.stdin.read()
"""


def test_a_killed_giver_is_an_error(ends):
    child = subprocess.Popen([sys.executable, "-c", GIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = child.stdout.readline().strip()
        pulled = ends[1].pull(address, 12345, CONFIG, 1)  # nobody has put that
        time.sleep(0.2)
        assert pulled.poll() is None  # and nobody waits for it
        child.kill()
        with pytest.raises(TransferError, match=address):
            arrived(pulled)
    finally:
        child.kill()
        child.wait()


def test_where_jax_cannot_transfer_it_says_so(monkeypatch):
    monkeypatch.delattr("jax.experimental.transfer.start_transfer_server")
    with pytest.raises(TransferError, match=f"jax {jax.__version__}"):
        BulkEndpoint(jax.devices("cpu")[0])
