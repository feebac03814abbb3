"""Readable views of blocks. Each is a value: a change is a new view, and changes nothing in any pool.

Who owns a block is what the pools say (``KVCacheAllocator``, ``KVCacheManager``); they hand out views of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

from pyagent_kv_jax.arguments import integer
from pyagent_kv_jax.config import DeviceType, DType
from pyagent_kv_jax.errors import DoubleFreeError, InvalidArgumentError, InvalidBlockError


@dataclasses.dataclass(frozen=True)
class BlockInfo:
    """Which block, how many references, where.

    Raises:
        InvalidArgumentError: a negative id or count, or one that is no integer.
    """

    block_id: int
    ref_count: int = 0
    device: DeviceType = dataclasses.field(default_factory=DeviceType.default)

    def __post_init__(self) -> None:
        _set_counts(self, "block_id", "ref_count")

    def increment_ref(self) -> Self:
        """With one more reference."""
        return dataclasses.replace(self, ref_count=self.ref_count + 1)

    def decrement_ref(self) -> Self:
        """With one less.

        Raises:
            DoubleFreeError: it has none.
        """
        return dataclasses.replace(self, ref_count=_one_less(self.block_id, self.ref_count))

    def can_free(self) -> bool:
        """Whether nobody refers to it."""
        return self.ref_count == 0


@dataclasses.dataclass(frozen=True)
class KVCacheBlock:
    """One block of the device's or of the host's pool: without references it is free, and has no shape.

    Attributes:
        block_id: in its pool.
        device: the kind of device whose K and V it holds.
        on_host: whether it is one of the host's pool, in that device's pinned host memory.
        ref_count: references to it.
        group: the layer group it belongs to.
        k_shape: (layers, num_heads, block_size, head_dim) of its K; None while it is free.
        v_shape: the same of its V.
        dtype: of an element; None while it is free.

    Raises:
        InvalidArgumentError: a negative id, count or group, or one that is no integer.
    """

    block_id: int
    device: DeviceType = dataclasses.field(default_factory=DeviceType.default)
    on_host: bool = False
    ref_count: int = 0
    group: int = 0
    k_shape: tuple[int, int, int, int] | None = None
    v_shape: tuple[int, int, int, int] | None = None
    dtype: DType | None = None

    def __post_init__(self) -> None:
        _set_counts(self, "block_id", "ref_count", "group")

    def allocate(
        self,
        num_heads: int,
        head_dim: int,
        block_size: int,
        dtype: DType,
        *,
        num_layers: int = 1,
        v_head_dim: int | None = None,
    ) -> Self:
        """The block taken: its shape, and the first reference.

        Args:
            num_heads: KV heads of a layer.
            head_dim: elements of a K head, as stored.
            block_size: tokens.
            dtype: of an element.
            num_layers: layers the block spans.
            v_head_dim: elements of a V head. None: ``head_dim``.

        Raises:
            InvalidBlockError: it has references.
            InvalidArgumentError: a size that is not a positive integer.
        """
        if self.ref_count:
            raise InvalidBlockError(f"block {self.block_id}: got {self.ref_count} references, want a free block")
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "block_size": block_size}
        layers, heads, tokens, k_dim, v_dim = (
            _positive(name, value) for name, value in (sizes | {"head_dim": head_dim, "v_head_dim": v_head_dim}).items()
        )
        return dataclasses.replace(
            self,
            ref_count=1,
            k_shape=(layers, heads, tokens, k_dim),
            v_shape=(layers, heads, tokens, v_dim),
            dtype=DType(dtype),
        )

    def acquire(self) -> Self:
        """With one more reference.

        Raises:
            InvalidBlockError: it is free: what it held may be gone.
        """
        if not self.ref_count:
            raise InvalidBlockError(f"block {self.block_id}: got no reference, want a block in use")
        return dataclasses.replace(self, ref_count=self.ref_count + 1)

    def release(self) -> Self:
        """With one reference less; without any it is free.

        Raises:
            DoubleFreeError: it is free already.
        """
        left = _one_less(self.block_id, self.ref_count)
        return dataclasses.replace(self, ref_count=left) if left else self.free()

    def free(self) -> Self:
        """The block given back by the only one who refers to it.

        Raises:
            DoubleFreeError: it is free already.
            InvalidBlockError: others refer to it too.
        """
        if _one_less(self.block_id, self.ref_count):
            raise InvalidBlockError(f"block {self.block_id}: got {self.ref_count} references, want the last one")
        return dataclasses.replace(self, ref_count=0, k_shape=None, v_shape=None, dtype=None)

    @property
    def is_free(self) -> bool:
        """Whether nobody refers to it."""
        return self.ref_count == 0

    @property
    def nbytes(self) -> int:
        """Bytes of its K and V; 0 while it is free."""
        if self.k_shape is None or self.v_shape is None or self.dtype is None:
            return 0
        return (math.prod(self.k_shape) + math.prod(self.v_shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class KVCacheBlocks:
    """The blocks of one request, in the order of its tokens.

    Attributes:
        gpu_block_ids: on the device.
        cpu_block_ids: on the host, swapped out.

    Raises:
        InvalidArgumentError: a negative id, or one that is no integer.
        InvalidBlockError: a block named twice in one pool.
    """

    gpu_block_ids: tuple[int, ...] = ()
    cpu_block_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("gpu_block_ids", "cpu_block_ids"):
            ids = tuple(_count(name, value) for value in getattr(self, name))
            if len(set(ids)) < len(ids):
                twice = sorted({i for i in ids if ids.count(i) > 1})
                raise InvalidBlockError(f"{name}: got {twice} more than once, want each block once")
            object.__setattr__(self, name, ids)

    def num_blocks(self) -> int:
        """Blocks on the device and on the host together."""
        return len(self.gpu_block_ids) + len(self.cpu_block_ids)

    def append_gpu(self, block_id: int) -> Self:
        """With one more block of the device at the end.

        Raises:
            InvalidBlockError: it is there already.
            InvalidArgumentError: no block id.
        """
        return dataclasses.replace(self, gpu_block_ids=(*self.gpu_block_ids, block_id))

    def append_cpu(self, block_id: int) -> Self:
        """With one more block of the host at the end; raises as ``append_gpu``."""
        return dataclasses.replace(self, cpu_block_ids=(*self.cpu_block_ids, block_id))


def _set_counts(view: BlockInfo | KVCacheBlock, *names: str) -> None:
    for name in names:
        object.__setattr__(view, name, _count(name, getattr(view, name)))


def _count(name: str, value: int) -> int:
    if (count := int(integer(name, value))) < 0:
        raise InvalidArgumentError(f"{name}: got {count}, want 0 or more")
    return count


def _positive(name: str, value: int) -> int:
    if (size := int(integer(name, value))) <= 0:
        raise InvalidArgumentError(f"{name}: got {size}, want a positive integer")
    return size


def _one_less(block_id: int, ref_count: int) -> int:
    if not ref_count:
        raise DoubleFreeError(f"block {block_id}: got no reference to drop, want a block in use")
    return ref_count - 1
