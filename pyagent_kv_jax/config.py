"""Sizes and kinds, all static under ``jit``: what a table, a pool and a cache are built from."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

import jax
import jax.numpy as jnp

from pyagent_kv_jax.errors import ConfigError, DeviceUnavailableError

_MAX_INT32 = 2**31 - 1


class DeviceType(StrEnum):
    """Where the pages live. ``MPS`` is known by name so that asking for it can be refused clearly."""

    CPU = "cpu"
    CUDA = "cuda"
    TPU = "tpu"
    MPS = "mps"

    @classmethod
    def default(cls) -> DeviceType:
        """The kind of device JAX uses when it is not told otherwise."""
        return {"gpu": cls.CUDA, "cuda": cls.CUDA, "tpu": cls.TPU}.get(jax.default_backend(), cls.CPU)

    def devices(self) -> list[jax.Device]:
        """This process's devices of this kind.

        Raises:
            DeviceUnavailableError: there are none, or JAX cannot drive this kind (``MPS``).
        """
        if self is DeviceType.MPS:
            raise DeviceUnavailableError("device 'mps' is not supported: want one of 'cpu', 'cuda', 'tpu'")
        try:
            return jax.local_devices(backend=self.value)
        except RuntimeError as error:
            hidden = os.environ.get("JAX_PLATFORMS")
            hint = f"; JAX_PLATFORMS={hidden!r} may hide it: add {self.value!r} to it" if hidden else ""
            raise DeviceUnavailableError(f"no {self.value!r} device in this process{hint} ({error})") from error


class DType(StrEnum):
    """What one stored element of K or V is. ``FP8`` is float8_e4m3fn."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    INT8 = "int8"
    FP8 = "fp8"

    @classmethod
    def _missing_(cls, value: Any) -> DType:
        """``DType(jnp.bfloat16)``, ``DType("float8_e4m3fn")``: by JAX's own names."""
        try:
            name = jnp.dtype(value).name
        except TypeError:
            name = ""
        name = {"float8_e4m3fn": "fp8"}.get(name, name)
        if name not in list(cls):
            raise ConfigError(f"dtype: got {value!r}, want one of {[kind.value for kind in cls]}")
        return cls(name)

    @property
    def jax_dtype(self) -> Any:
        """The logical element type, e.g. ``jnp.float8_e4m3fn`` for ``FP8``."""
        return jnp.dtype(jnp.float8_e4m3fn if self is DType.FP8 else self.value)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(self.jax_dtype.itemsize)

    @property
    def is_quantized(self) -> bool:
        """Whether values are divided by a scale on the way in (int8, fp8)."""
        return self in (DType.INT8, DType.FP8)

    def storage_dtype(self, device: DeviceType) -> Any:
        """The element type of the page arrays on ``device``.

        fp8 is kept as uint8 everywhere (fp8 scatters are slow). On CPUs the 16-bit floats are kept as uint16: jax
        0.10.2 upcasts a whole bfloat16 pool to scatter into it.
        """
        if self is DType.FP8:
            return jnp.dtype(jnp.uint8)
        if device is DeviceType.CPU and self.itemsize == 2:
            return jnp.dtype(jnp.uint16)
        return self.jax_dtype


class BlockAllocationStrategy(StrEnum):
    """Which free blocks a request gets.

    ``CONTIGUOUS``: one run of consecutive ids, or a clear failure. ``SCATTERED``: any, in the pool's own order.
    ``NUMA_AWARE``: those of the node asked for first. ``PREDICTIVE``: reserved ahead of need, which is
    ``PredictiveBlockAllocator``'s work; a pool by itself refuses it.
    """

    CONTIGUOUS = "contiguous"
    SCATTERED = "scattered"
    NUMA_AWARE = "numa_aware"
    PREDICTIVE = "predictive"


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{type(config).__name__}.{name}: got {value!r}, want a positive integer")


@dataclasses.dataclass(frozen=True)
class BlockTableConfig:
    """Sizes of a block table.

    Attributes:
        block_size: tokens of one manager block.
        kernel_block_size: tokens of one page as the kernels see it; divides ``block_size``. None: the same.
        max_num_reqs: rows.
        max_num_blocks_per_req: blocks a row can hold.
        max_num_batched_tokens: tokens of the longest slot mapping made in one step.
        cp_kv_cache_interleave_size: consecutive tokens that stay on one context-parallel rank; divides
            ``block_size``.

    Raises:
        ConfigError: a size that is not a positive integer, or does not divide.
    """

    block_size: int
    max_num_reqs: int
    max_num_blocks_per_req: int
    max_num_batched_tokens: int = 8192
    kernel_block_size: int | None = None
    cp_kv_cache_interleave_size: int = 1

    def __post_init__(self) -> None:
        if self.kernel_block_size is None:
            object.__setattr__(self, "kernel_block_size", self.block_size)
        _require_positive(self, *(field.name for field in dataclasses.fields(self)))
        for name in ("kernel_block_size", "cp_kv_cache_interleave_size"):
            if self.block_size % getattr(self, name):
                raise ConfigError(
                    f"BlockTableConfig.{name}: got {getattr(self, name)}, "
                    f"want a divisor of block_size {self.block_size}"
                )

    @property
    def blocks_per_kv_block(self) -> int:
        """Kernel blocks in one manager block (``k`` of the hybrid block sizes)."""
        assert self.kernel_block_size is not None
        return self.block_size // self.kernel_block_size

    @property
    def max_tokens_per_req(self) -> int:
        """Tokens a full row holds."""
        return self.block_size * self.max_num_blocks_per_req


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens, and so share a block table.

    Attributes:
        layers: the model's layers, ascending.
        sliding_window: tokens a query sees, itself included. None: all.
        chunk_size: a query sees the tokens of its own chunk of this many. None: all.

    Raises:
        ConfigError: no layers, layers that do not ascend, both kinds at once, or sizes that are no positive integers.
    """

    layers: tuple[int, ...]
    sliding_window: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ConfigError(f"LayerGroup.layers: got {self.layers}, want layers from 0 on, ascending")
        _require_positive(self, *(name for name in ("sliding_window", "chunk_size") if getattr(self, name) is not None))
        if self.sliding_window is not None and self.chunk_size is not None:
            raise ConfigError(
                f"LayerGroup: got sliding_window {self.sliding_window} and chunk_size {self.chunk_size}, want one"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether no token of the group is ever out of sight."""
        return self.sliding_window is None and self.chunk_size is None


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups of about equally many layers, each of one window, for ``KVCacheConfig.layer_groups``.

    A block takes the memory of the largest group, so small groups pad; but each group brings a table of its own. The
    size chosen weighs one more group like 2% of padding.

    Args:
        windows: one entry a layer, ``LayerGroup.sliding_window``.
    """
    kinds = {w: tuple(layer for layer, window in enumerate(windows) if window == w) for w in dict.fromkeys(windows)}
    counts = [len(layers) for layers in kinds.values()]

    def cost(size: int) -> float:
        groups = sum(math.ceil(count / size) for count in counts)
        return 1 - sum(counts) / (groups * size) + 0.02 * groups

    size = min(range(1, max(counts, default=0) + 1), key=cost, default=1)
    return tuple(
        LayerGroup(layers[start : start + size], sliding_window=window)
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    )


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of a KV cache.

    Attributes:
        num_layers: layers of the model; without ``layer_groups`` a block spans all of them.
        num_heads: KV heads of a layer.
        head_dim: elements of one K head; also of a V head unless ``v_head_dim`` says otherwise.
        num_blocks: blocks of the pool. None: as many as ``memory_fraction`` of the device's free memory holds.
        block_size: tokens of one block.
        dtype: element type, a ``DType`` or its name, "bfloat16" say. None: float32 on CPUs, bfloat16 elsewhere.
        device: kind of device for the pages. None: JAX's default.
        max_num_reqs: requests that can hold blocks at once (rows of the table).
        max_model_len: tokens of the longest request.
        v_head_dim: elements of one V head. None: ``head_dim``.
        memory_fraction: share of the device's free memory to take when ``num_blocks`` is None.
        layer_groups: groups of layers that keep different tokens, each with a table of its own over the one pool; a
            block spans ``layers_per_group`` layers of one group. Empty: one group of all layers that keeps all tokens.
        kernel_block_size: tokens of one page as the kernels see it; divides ``block_size``. A block is so many
            consecutive pages. None: ``block_size``, one page a block.
        num_kernel_blocks: pages of each layer, where they are more than the blocks' own: those that a change of block
            size left over. None: those of the blocks.

    Raises:
        ConfigError: a size that is not a positive integer, a kernel block size that does not divide, fewer pages than
            the blocks need, more slots than an int32 can name, or groups in which not every layer is named once.
        DeviceUnavailableError: ``device`` is not there (looked up only when ``num_blocks`` is None).
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_blocks: int | None = None
    block_size: int = 16
    dtype: DType | None = None
    device: DeviceType | None = None
    max_num_reqs: int = 256
    max_model_len: int = 4096
    v_head_dim: int | None = None
    memory_fraction: float = 0.9
    layer_groups: tuple[LayerGroup, ...] = ()
    kernel_block_size: int | None = None
    num_kernel_blocks: int | None = None

    def __post_init__(self) -> None:
        device = DeviceType.default() if self.device is None else DeviceType(self.device)
        dtype = self.dtype or (DType.FLOAT32 if device is DeviceType.CPU else DType.BFLOAT16)
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "dtype", DType(dtype))
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        if device is DeviceType.MPS:
            device.devices()  # raises: says what is supported
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"KVCacheConfig.memory_fraction: got {self.memory_fraction!r}, want 0 < fraction <= 1")
        sizes = ("num_layers", "num_heads", "head_dim", "v_head_dim", "block_size", "max_num_reqs", "max_model_len")
        _require_positive(self, *sizes)
        self._check_page_size(self.block_size)
        named = sorted(layer for group in self.groups for layer in group.layers)
        if named != list(range(self.num_layers)):
            raise ConfigError(
                f"KVCacheConfig.layer_groups: got layers {named}, want each of 0 to {self.num_layers - 1} once"
            )
        if self.num_blocks is None:
            object.__setattr__(self, "num_blocks", self._blocks_that_fit())
        _require_positive(self, "num_blocks")
        if self.num_kernel_blocks is not None:
            _require_positive(self, "num_kernel_blocks")
            if self.num_kernel_blocks < (needed := self.pool_blocks * self.pages_per_block):
                raise ConfigError(
                    f"KVCacheConfig.num_kernel_blocks: got {self.num_kernel_blocks}, want at least the {needed} of "
                    f"{self.pool_blocks} blocks of {self.pages_per_block}"
                )
        if self.num_slots > _MAX_INT32:
            raise ConfigError(
                f"KVCacheConfig: layers_per_group * num_blocks * block_size = {self.num_slots} slots, "
                f"want at most {_MAX_INT32}"
            )

    def _check_page_size(self, block_size: int) -> None:
        """That ``block_size`` is a positive multiple of the kernel block size."""
        _require_positive(self, *(("kernel_block_size",) if self.kernel_block_size is not None else ()))
        if block_size % self.page_size:
            raise ConfigError(
                f"KVCacheConfig.kernel_block_size: got {self.page_size}, want a divisor of block_size {block_size}"
            )

    def _blocks_that_fit(self) -> int:
        memory = free_memory_bytes(self.device_type.devices()[0])
        return max(1, int(memory * self.memory_fraction) // self.block_size_bytes())

    @property
    def device_type(self) -> DeviceType:
        """``device``, resolved."""
        assert self.device is not None
        return self.device

    @property
    def kv_dtype(self) -> DType:
        """``dtype``, resolved."""
        assert self.dtype is not None
        return self.dtype

    @property
    def pool_blocks(self) -> int:
        """``num_blocks``, resolved."""
        assert self.num_blocks is not None
        return self.num_blocks

    @property
    def page_size(self) -> int:
        """``kernel_block_size``, resolved: tokens of one page."""
        return self.block_size if self.kernel_block_size is None else self.kernel_block_size

    @property
    def pages_per_block(self) -> int:
        """k: pages of one layer that a block consists of. Block b has pages ``b * k`` to ``b * k + k - 1``."""
        return self.block_size // self.page_size

    @property
    def pages_per_layer(self) -> int:
        """``num_kernel_blocks``, resolved."""
        return self.num_kernel_blocks or self.pool_blocks * self.pages_per_block

    @property
    def value_head_dim(self) -> int:
        """``v_head_dim``, resolved."""
        assert self.v_head_dim is not None
        return self.v_head_dim

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """``layer_groups``, resolved."""
        return self.layer_groups or (LayerGroup(tuple(range(self.num_layers))),)

    def group_of(self, layer: int) -> int:
        """Index in ``groups`` of the group that ``layer``, one of the model's, is in."""
        return next(index for index, group in enumerate(self.groups) if layer in group.layers)

    @property
    def layers_per_group(self) -> int:
        """Layers whose K and V one block has room for: those of the largest group."""
        return max(len(group.layers) for group in self.groups)

    @property
    def num_slots(self) -> int:
        """Slots of all layers of a block's span together."""
        return self.layers_per_group * self.pages_per_layer * self.page_size

    @property
    def max_request_tokens(self) -> int:
        """Tokens that no request can ever exceed: those of a row of the table, or of all the blocks there are."""
        groups_of_all = sum(group.keeps_all for group in self.groups)
        if not groups_of_all:
            return self.max_model_len
        return min(self.max_model_len, self.pool_blocks // groups_of_all * self.block_size)

    def most_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """Most blocks that a request holds at once on its way to ``num_tokens``, by steps of at most ``step_tokens``.

        A group that does not keep all tokens holds what the first token of a step sees, and the step's own tokens.
        """
        columns = math.ceil(num_tokens / self.block_size)
        spans = (group.sliding_window or group.chunk_size for group in self.groups)
        # n tokens in a row touch at most this many blocks, wherever they begin.
        touched = ((span and (span + step_tokens + self.block_size - 3) // self.block_size + 1) for span in spans)
        return sum(min(columns, columns if blocks is None else blocks) for blocks in touched)

    @property
    def storage_dtype(self) -> Any:
        """Element type of the page arrays (see ``DType.storage_dtype``)."""
        return self.kv_dtype.storage_dtype(self.device_type)

    def storage_head_dim(self, head_dim: int) -> int:
        """Elements a stored head takes: on TPUs padded to 128 lanes, where Mosaic calls would else copy the pool."""
        return math.ceil(head_dim / 128) * 128 if self.device_type is DeviceType.TPU else head_dim

    def kv_size_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, as stored."""
        width = self.storage_head_dim(self.head_dim) + self.storage_head_dim(self.value_head_dim)
        return self.num_layers * self.num_heads * width * self.kv_dtype.itemsize

    def block_size_bytes(self) -> int:
        """Bytes of one block over the layers it spans, as stored."""
        return self.block_size * self.kv_size_per_token() // self.num_layers * self.layers_per_group

    def padding_bytes(self, group: int) -> int:
        """Bytes of a block of this group that no layer uses."""
        unused = self.layers_per_group - len(self.groups[group].layers)
        return self.block_size * self.kv_size_per_token() // self.num_layers * unused

    def table_config(self, max_num_batched_tokens: int = 8192) -> BlockTableConfig:
        """The table that goes with this cache."""
        return BlockTableConfig(
            block_size=self.block_size,
            max_num_reqs=self.max_num_reqs,
            max_num_blocks_per_req=math.ceil(self.max_model_len / self.block_size),
            max_num_batched_tokens=max_num_batched_tokens,
            kernel_block_size=self.page_size,
        )

    def with_block_size(self, block_size: int) -> Self:
        """The same pages, in blocks of ``block_size`` tokens: as many blocks as there are whole ones.

        Raises:
            ConfigError: not a positive multiple of the kernel block size, or more than all pages of a layer hold.
        """
        if not isinstance(block_size, numbers.Integral) or isinstance(block_size, bool) or block_size <= 0:
            raise ConfigError(f"block_size: got {block_size!r}, want a positive multiple of {self.page_size}")
        block_size, pages = int(block_size), self.pages_per_layer
        self._check_page_size(block_size)
        num_blocks, left_over = divmod(pages, block_size // self.page_size)
        if not num_blocks:
            raise ConfigError(
                f"block_size: got {block_size}, want at most the {pages * self.page_size} tokens of a layer's pages"
            )
        return dataclasses.replace(
            self,
            block_size=block_size,
            num_blocks=num_blocks,
            kernel_block_size=None if block_size == self.page_size else self.page_size,
            num_kernel_blocks=pages if left_over else None,
        )


def free_memory_bytes(device: jax.Device) -> int:
    """Bytes a new array on ``device`` may take: XLA's limit less what is in use, or the host's free memory on CPUs.

    Raises:
        ConfigError: the device does not tell; give ``num_blocks`` instead.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise ConfigError(f"{device} does not tell how much memory is free: give num_blocks")
