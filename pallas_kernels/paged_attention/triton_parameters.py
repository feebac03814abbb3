"""How the Triton attention kernel is cut: from the tuning table, or by rule where it is silent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.nvidia import Gpu
from pallas_kernels.triton_numbers import multiplied
from pallas_kernels.tuning import parameters


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Tiles, and what the compiler is told, for short (decode) and long (prefill) sequences.

    Attributes:
        decode_keys, prefill_keys: of a step.
        prefill_rows: of a tile; decode takes as few as hold a sequence. See ``TileMemory.fit`` for all three.
        decode_warps, prefill_warps, decode_stages, prefill_stages: for the compiler.
        programs_per_core: decode is split over the keys until there are so many programs a core.
        fewest_keys: of a split, where there are so many.
    """

    decode_keys: int
    decode_warps: int
    decode_stages: int
    programs_per_core: int
    fewest_keys: int
    prefill_rows: int
    prefill_keys: int
    prefill_warps: int
    prefill_stages: int

    def splits(self, gpu: Gpu, programs: int, longest_context: int) -> int:
        """Parts to deal each sequence's keys to."""
        wanted = -(-self.programs_per_core * gpu.cores // programs)
        possible = -(-longest_context // self.fewest_keys)
        return max(min(wanted, possible, 128), 1)


@dataclasses.dataclass(frozen=True)
class TileMemory:
    """What a tile takes of fast memory: the compiler says so only when it is too late for another form.

    Attributes:
        gpu: that it is for.
        head_dim, v_head_dim: logical sizes.
        dot_itemsize, kv_itemsize: bytes of a number as it is multiplied, and as it is stored.
    """

    gpu: Gpu
    head_dim: int
    v_head_dim: int
    dot_itemsize: int
    kv_itemsize: int

    def most(self, rows: int, keys: int) -> int:
        """Bytes at most, for any number of stages: queries, a step of K and V, weights."""
        # wgmma and its successor read K and V from where they arrive, so that a second step needs room of its own.
        steps = 2 if self.gpu.capability in (90, 100, 103) and rows >= 64 and self.dot_itemsize == 2 else 1
        steps = steps if self.kv_itemsize == self.dot_itemsize else 1
        numbers = rows * self.head_dim + steps * keys * (self.head_dim + self.v_head_dim) + rows * keys
        return numbers * self.dot_itemsize + 1024

    def fit(self, rows: int, keys: int, *, fewest_rows: int) -> tuple[int, int]:
        """(rows, keys), or as many as there is room for: fewer keys first, then fewer rows.

        Raises:
            NotImplementedError: there is no room for ``fewest_rows`` and 16 keys.
        """
        while not self.has_room(rows, keys) and keys > 16:
            keys //= 2
        while not self.has_room(rows, keys) and rows > fewest_rows:
            rows //= 2
        if not self.has_room(rows, keys):
            raise NotImplementedError(
                f"{rows} rows of head_dim {self.head_dim} and v_head_dim {self.v_head_dim}: a tile of them takes up to "
                f"{self.most(rows, keys)} bytes of shared memory, of which a program on {self.gpu.kind} has "
                f"{self.gpu.shared_memory}, or its sums more than there is of tensor memory"
            )
        return rows, keys

    def has_room(self, rows: int, keys: int) -> bool:
        """Whether a tile of so many rows and keys fits, as the compilers of jax 0.10.2 and 0.11.2 lay it out."""
        # Sums of 128 rows take one of Blackwell's 512 columns of tensor memory for each number.
        sums = self.v_head_dim + keys if self.gpu.capability in (100, 103) and rows >= 128 else 0
        return sums <= 512 and self.most(rows, keys) <= self.gpu.shared_memory


def choose_parameters(gpu: Gpu, q: jax.Array, k_pages: jax.Array, kv_dtype: Any) -> Parameters:
    """For these shapes on this GPU."""
    group, head_dim = q.shape[1] // k_pages.shape[1], q.shape[2]
    dot_itemsize = multiplied(q.dtype, kv_dtype).itemsize
    shape = {
        "group": group,
        "head_dim": head_dim,
        "block_size": k_pages.shape[2],
        "itemsize": kv_dtype.itemsize,
        "dot_itemsize": dot_itemsize,
    }
    rule = heuristic(gpu, head_dim, dot_itemsize, kv_dtype.itemsize)
    return Parameters(**parameters("paged_attention", "triton", gpu.kind, shape, rule, ["take_turns"]))  # of mosaic_gpu


def heuristic(gpu: Gpu, head_dim: int, dot_itemsize: int, kv_itemsize: int) -> dict[str, int]:
    """A step of K and V in two or three stages of shared memory; the accumulators in registers, without spilling.

    float32 (also what bfloat16 and float16 meet in) is multiplied by the ordinary units, whose operands stand in
    registers too, so its tiles are smaller, more so where they are made of narrower pages: those are not even loaded
    ahead. So are tiles that convert one byte to two in registers, where the matrix units cannot read shared memory
    (sm_80) or the head is wide.
    """
    wide, exact = head_dim > 128, dot_itemsize > 2
    widens = exact and kv_itemsize < dot_itemsize
    converts = kv_itemsize == 1 and (wide or gpu.capability < 90)
    return {
        "decode_keys": 32 if wide or exact else 64,
        "decode_warps": 4,
        "decode_stages": 1 if widens else 2 if exact else 3,
        "programs_per_core": 4,
        "fewest_keys": 256,
        "prefill_rows": 32 if widens or (wide and exact) else 64 if wide or exact else 128,
        "prefill_keys": 16 if exact else 32 if converts else 64,
        "prefill_warps": 8,
        "prefill_stages": 1 if widens else 2 if wide or exact else 3,
    }
