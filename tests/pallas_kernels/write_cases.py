"""The one table of cases of ``paged_write``, and the arrays of a case."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pallas_kernels import CompressedSlotMapping
from tests.pallas_kernels import numpy_reference
from tests.pallas_kernels.stored_numbers import encode, logical, random_bits

Array = NDArray[Any]
PADDING = -(2**31)


@dataclasses.dataclass(frozen=True)
class WriteCase:
    """``slots``: the slot of each token ("random": distinct and shuffled), or None with ``runs``: (first_slot,
    first_token, length), or with ``words`` of a ``CompressedSlotMapping``. Scales: None, "tensor" or "head".
    ``stored_as`` None: ``kv_dtype`` itself."""

    name: str
    slots: tuple[int, ...] | str | None = "random"
    runs: tuple[tuple[int, int, int], ...] | None = None
    words: tuple[int, ...] | None = None
    words_block_size: int = 4
    num_tokens: int = 11
    num_pages: int = 6
    kv_heads: int = 2
    block_size: int = 4
    head_dim: int = 8
    v_head_dim: int = 8
    storage_head_dim: int = 8
    v_storage_head_dim: int = 8
    dtype: str = "float32"
    kv_dtype: str = "float32"
    stored_as: str | None = None
    k_scale: str | None = None
    v_scale: str | None = None
    magnitude: float = 1.0


CASES = [
    WriteCase("random-slots"),
    WriteCase("one-token", slots=(7,), num_tokens=1),
    WriteCase("no-tokens", slots=(), num_tokens=0),
    WriteCase("every-slot", num_tokens=24),
    WriteCase("padding", slots=(-1, 3, -1, -1, 0, 23, -1), num_tokens=7),
    WriteCase("only-padding", slots=(-1,) * 5, num_tokens=5),
    WriteCase("last-slot-beside-padding", slots=(23, -1), num_tokens=2),
    WriteCase("outside-the-pool", slots=(5, 24, -2, 2**31 - 1, -(2**31), 6), num_tokens=6),
    WriteCase("runs", slots=None, runs=((2, 0, 5), (20, 5, 3), (9, 8, 3))),
    WriteCase("runs-out-of-order", slots=None, runs=((9, 8, 3), (2, 0, 5), (20, 5, 3))),
    WriteCase("runs-across-blocks", slots=None, runs=((3, 0, 11),)),
    WriteCase("runs-padding", slots=None, runs=((0, 0, 0), (2, 1, 4), (5, 3, 0), (-1, 5, 3), (12, 8, 2), (0, 0, 0))),
    WriteCase("runs-all-empty", slots=None, runs=((0, 0, 0), (-1, -1, 0))),
    WriteCase("runs-none", slots=None, runs=()),
    WriteCase("runs-skip-tokens", slots=None, runs=((8, 2, 3), (1, 9, 2))),
    WriteCase("runs-outside-the-pool", slots=None, runs=((22, 0, 4), (0, 4, 2))),
    WriteCase("runs-of-bits", slots=None, runs=((1, 0, 11),), kv_dtype="bfloat16", stored_as="uint16"),
    WriteCase("words", slots=None, words=(3, -3, 0, 0, -2, 20, PADDING, PADDING), num_tokens=14),
    WriteCase("words-outside-the-pool", slots=None, words=(6, -3, 23, 0)),
    WriteCase("words-of-two-pages", slots=None, words=(2, -1, 3), words_block_size=8),
    WriteCase("words-none", slots=None, words=()),
    WriteCase("block-size-1", block_size=1, num_pages=20),
    WriteCase("block-size-64", block_size=64, num_tokens=50),
    WriteCase("many-heads", kv_heads=16),
    WriteCase("v-head-dim", v_head_dim=5, v_storage_head_dim=5),
    WriteCase("storage-padded", head_dim=5, v_head_dim=6, storage_head_dim=8, v_storage_head_dim=16),
    WriteCase("storage-padded-bits", head_dim=5, v_head_dim=6, kv_dtype="float8_e4m3fn", stored_as="uint8"),
    WriteCase("bfloat16-in", dtype="bfloat16"),
    WriteCase("scale-tensor", k_scale="tensor", v_scale="head"),
    WriteCase("bfloat16", kv_dtype="bfloat16"),
    WriteCase("bfloat16-bits", kv_dtype="bfloat16", stored_as="uint16"),
    WriteCase("float16-bits", kv_dtype="float16", stored_as="uint16"),
    WriteCase("float32-bits", kv_dtype="float32", stored_as="uint32"),
    WriteCase("int8", kv_dtype="int8", k_scale="tensor", v_scale="tensor", magnitude=3.0),
    WriteCase("int8-per-head", kv_dtype="int8", k_scale="head", v_scale="head", magnitude=3.0),
    WriteCase("int8-bits", kv_dtype="int8", stored_as="uint8", magnitude=60.0),
    WriteCase("int8-saturates", kv_dtype="int8", magnitude=1e4),
    WriteCase("int8-halves", kv_dtype="int8", magnitude=0.0),
    WriteCase("e4m3", kv_dtype="float8_e4m3fn"),
    WriteCase("e4m3-bits", kv_dtype="float8_e4m3fn", stored_as="uint8", k_scale="head", v_scale="tensor"),
    WriteCase("e4m3-saturates", kv_dtype="float8_e4m3fn", stored_as="uint8", magnitude=1e4),
    WriteCase("e4m3-subnormal", kv_dtype="float8_e4m3fn", stored_as="uint8", magnitude=0.01),
    WriteCase("e5m2-bits", kv_dtype="float8_e5m2", stored_as="uint8", k_scale="tensor", v_scale="head"),
    WriteCase("e5m2-saturates", kv_dtype="float8_e5m2", stored_as="uint8", magnitude=1e7),
]


@dataclasses.dataclass
class WriteInputs:
    """Arguments of one call, and both page arrays as they must be after it."""

    arguments: dict[str, Any]
    k_pages: Array
    v_pages: Array


def make_inputs(case: WriteCase) -> WriteInputs:
    """Pages of random bits, so that a slot written by mistake shows."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    storage = np.dtype(case.stored_as) if case.stored_as else logical(case.kv_dtype)
    shape = (case.num_pages, case.kv_heads, case.block_size)
    slots, mapping = _slots(rng, case)
    arguments: dict[str, Any] = {"slot_mapping": mapping, "kv_dtype": case.kv_dtype if case.stored_as else None}
    expected = {}
    for name, d, storage_d, kind in (
        ("k", case.head_dim, case.storage_head_dim, case.k_scale),
        ("v", case.v_head_dim, case.v_storage_head_dim, case.v_scale),
    ):
        pages = random_bits(rng, (*shape, storage_d), storage)
        values = _values(rng, case, (case.num_tokens, case.kv_heads, d))
        # Powers of two: division by them is exact, however it is done.
        exponents = rng.integers(-7, -4, () if kind == "tensor" else (case.kv_heads,))
        scale = None if kind is None else np.asarray(2.0**exponents, np.float32)
        scaled = values.astype(np.float32) / (np.float32(1) if scale is None else scale[..., None])
        rows = encode(scaled, logical(case.kv_dtype)).view(storage)
        expected[name] = numpy_reference.paged_write(pages, rows, slots)
        arguments |= {f"{name}_pages": pages, name: values, f"{name}_scale": scale}
    return WriteInputs(arguments, expected["k"], expected["v"])


def _values(rng: np.random.Generator, case: WriteCase, shape: tuple[int, ...]) -> Array:
    if case.magnitude == 0:  # halves, where rounding has to choose
        return (rng.integers(-20, 20, shape) + 0.5).astype(np.float32)
    return (rng.standard_normal(shape) * case.magnitude).astype(logical(case.dtype))


def _slots(rng: np.random.Generator, case: WriteCase) -> tuple[list[int], Any]:
    """(the slot of each token, the argument): token by token, or what the runs or words say of each token."""
    if case.runs is not None:
        slots = [-1] * case.num_tokens
        for first_slot, first_token, length in case.runs:
            for i in range(length):
                slots[first_token + i] = first_slot + i if first_slot >= 0 else -1
        return slots, np.array(case.runs, np.int32).reshape(-1, 3)
    if case.words is not None:
        slots, words, size = [], [word for word in case.words if word != PADDING], case.words_block_size
        while words:
            word = words.pop(0)
            first, length = (word * size, size) if word >= 0 else (words.pop(0) - 1, -word)
            slots += [first + i if first >= 0 else -1 for i in range(length)]
        slots += [-1] * (case.num_tokens - len(slots))
        return slots, CompressedSlotMapping(np.array(case.words, np.int32), size)
    if case.slots == "random":
        chosen = rng.permutation(case.num_pages * case.block_size)[: case.num_tokens]
        return chosen.tolist(), chosen.astype(np.int32)
    assert isinstance(case.slots, tuple)
    return list(case.slots), np.array(case.slots, np.int32)
