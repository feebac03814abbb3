"""What plans are made for: a cache on a mesh, the heads that query it, and the sizes a batch may have."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.arguments import is_count
from pyagent_kv_jax.config import DeviceType, DType, KVCacheConfig
from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy
from pyagent_kv_jax.distributed.cache_sharding import CacheSharding
from pyagent_kv_jax.distributed.combine import Combine
from pyagent_kv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DCPPlanConfig:
    """Static: plans of one config run on the same few compiled programs.

    A batch is padded to the least bucket of rows and the least bucket of tokens that hold it; the last buckets are the
    most it may have.

    Attributes:
        cache: of the whole cache, with one group of layers.
        sharding: how it lies on the mesh, and how its ranks combine what they see.
        num_q_heads: of the model, on all ranks together.
        dtype: of q, k, v and the result. None: the cache's, or where that is quantised float32 on CPUs and bfloat16
            elsewhere.
        row_buckets: numbers of requests, ascending. Empty: powers of two up to ``cache.max_num_reqs``.
        token_buckets: numbers of tokens, ascending. Empty: powers of two from 16 to the greater of 8192 and the last
            row bucket.
        memory_budget: bytes on one device that a batch may take beside weights and cache, by ``step_bytes``. None: no
            bound.

    Raises:
        ConfigError: heads or pages that the mesh's axes do not divide, an interleave that does not divide, several
            groups of layers, buckets that do not ascend, or fewer tokens than rows.
    """

    cache: KVCacheConfig
    sharding: CacheSharding
    num_q_heads: int
    dtype: DType | None = None
    row_buckets: tuple[int, ...] = ()
    token_buckets: tuple[int, ...] = ()
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        self._check_heads()
        self.sharding.on_rank(self.cache)
        self.sharding.combine_of(self.num_q_heads)
        if len(self.cache.groups) > 1:
            raise ConfigError(
                f"cache.layer_groups: got {len(self.cache.groups)} groups, want one: a request has one list of blocks"
            )
        rows = tuple(self.row_buckets) or powers_of_two(1, self.cache.max_num_reqs)
        tokens = tuple(self.token_buckets) or powers_of_two(16, max(8192, *rows))
        for name, buckets in (("row_buckets", rows), ("token_buckets", tokens)):
            if not all(is_count(size) and size for size in buckets) or list(buckets) != sorted(set(buckets)):
                raise ConfigError(f"{name}: got {buckets}, want positive integers that ascend")
            object.__setattr__(self, name, tuple(int(size) for size in buckets))
        if tokens[-1] < rows[-1]:
            raise ConfigError(f"token_buckets: got at most {tokens[-1]} tokens for {rows[-1]} rows, want one a row")
        if self.memory_budget is not None and (not is_count(self.memory_budget) or not self.memory_budget):
            raise ConfigError(f"memory_budget: got {self.memory_budget!r}, want a positive number of bytes, or None")
        dtype = self._default_dtype() if self.dtype is None else _one_of(DType, "dtype", self.dtype)
        object.__setattr__(self, "dtype", dtype)
        if self.activation_dtype.is_quantized:
            raise ConfigError(f"dtype: got {self.activation_dtype.value!r}, want a float of 2 or 4 bytes")

    @classmethod
    def create(
        cls,
        cache: KVCacheConfig,
        mesh: Mesh,
        num_q_heads: int,
        *,
        context_axis: str | None = None,
        tensor_axis: str | None = None,
        interleave: int = 1,
        combine: Combine | str | None = None,
        strategy: AllReduceStrategy | str = AllReduceStrategy.NCCL,
        **sizes: Any,
    ) -> Self:
        """With the ``CacheSharding`` that these make; ``sizes`` are the other fields."""
        chosen = None if combine is None else _one_of(Combine, "combine", combine)
        reduction = _one_of(AllReduceStrategy, "strategy", strategy)
        sharding = CacheSharding(mesh, context_axis, tensor_axis, interleave, chosen, reduction)
        return cls(cache, sharding, num_q_heads, **sizes)

    def _check_heads(self) -> None:
        if not is_count(self.num_q_heads) or not self.num_q_heads or self.num_q_heads % self.cache.num_heads:
            raise ConfigError(
                f"num_q_heads: got {self.num_q_heads!r}, want a positive multiple of "
                f"the {self.cache.num_heads} KV heads"
            )

    def _default_dtype(self) -> DType:
        if not self.cache.kv_dtype.is_quantized:
            return self.cache.kv_dtype
        return DType.FLOAT32 if self.cache.device_type is DeviceType.CPU else DType.BFLOAT16

    @property
    def activation_dtype(self) -> DType:
        """``dtype``, resolved."""
        assert self.dtype is not None
        return self.dtype

    @property
    def combine(self) -> Combine:
        """The form of combining, resolved for these heads."""
        return self.sharding.combine_of(self.num_q_heads)

    @property
    def scatters_heads(self) -> bool:
        """Whether ranks of the context axis have query heads of their own, which are gathered for attention."""
        return self.combine is not Combine.ALL_REDUCE and self.sharding.context_size > 1

    @property
    def heads_attended(self) -> int:
        """Query heads a rank attends with where there is context: all of its tensor rank."""
        return self.num_q_heads // self.sharding.tensor_size

    @property
    def heads_owned(self) -> int:
        """Query heads a rank has of q and of the result."""
        return self.heads_attended // (self.sharding.context_size if self.scatters_heads else 1)

    @property
    def q_sharding(self) -> NamedSharding:
        """Of q and out [T, num_q_heads, d], and of the LSE."""
        return self.sharding.named(P(None, self.sharding.q_head_axes(self.num_q_heads) or None))

    @property
    def kv_sharding(self) -> NamedSharding:
        """Of k and v [T, num_heads, d]: spread over the tensor axis where it divides the KV heads."""
        divides = self.cache.num_heads % self.sharding.tensor_size == 0
        return self.sharding.named(P(None, self.sharding.tensor_axis if divides else None))

    def padded_sizes(self, num_rows: int, num_tokens: int, is_one_token_each: bool) -> tuple[int, int]:
        """Rows and tokens that a batch of so many is padded to, at most the last buckets."""
        rows = bucket_of(num_rows, self.row_buckets)
        return rows, rows if is_one_token_each else bucket_of(num_tokens, self.token_buckets)


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The least of ``buckets`` that holds ``size``; the last one holds it."""
    return next(bucket for bucket in buckets if bucket >= size)


def powers_of_two(least: int, most: int) -> tuple[int, ...]:
    """From ``least``, doubling, and then ``most``."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def _one_of(kind: Any, name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}: got {value!r}, want one of {[known.value for known in kind]}") from None
