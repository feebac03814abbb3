"""How a cache lies on a mesh: which axis its KV heads are spread over, which one its tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax.arguments import is_count
from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.all_reduce import AllReduceStrategy
from pyagent_kv_jax.distributed.combine import Combine
from pyagent_kv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CacheSharding:
    """Where on a mesh a cache's K and V are, and how its ranks put their shares of attention together. Static.

    Heads are spread over ``tensor_axis``: each of its t ranks stores ``num_heads / t`` KV heads, or, where there are
    fewer heads than ranks, one head that others store too.

    Tokens are spread over ``context_axis`` (decode context parallel, DCP): a block of ``config.block_size`` tokens lies
    on all C ranks, ``block_size / C`` slots on each, dealt out ``interleave`` tokens at a time: the token at offset o
    of its block is on rank ``(o // interleave) % C``. Block ids, tables, lengths and slots are those of whole blocks,
    the same on every rank. Other axes of the mesh hold copies.

    Attributes:
        mesh: made by the user. Axes of Explicit type, ``jax.make_mesh``'s own choice, are taken as Auto: what lies
            where is said here, not by the types of arrays.
        context_axis: name of an axis of it; None: every rank holds all tokens of its heads.
        tensor_axis: likewise; None: every rank holds all heads.
        interleave: consecutive tokens that stay on one rank; divides ``page_size / C``.
        combine: how ranks of ``context_axis`` merge their shares, see ``Combine``. None: ALL_TO_ALL where the query
            heads divide by the size of both axes, else ALL_REDUCE.
        strategy: of ALL_REDUCE.

    Raises:
        ConfigError: a mesh without devices, an axis that it lacks, one named twice, or an interleave that is no
            positive integer.
    """

    mesh: Mesh
    context_axis: str | None = None
    tensor_axis: str | None = None
    interleave: int = 1
    combine: Combine | None = None
    strategy: AllReduceStrategy = AllReduceStrategy.NCCL

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise ConfigError(f"mesh: got {self.mesh!r}, want a jax.sharding.Mesh of devices")
        auto = (AxisType.Auto,) * len(self.mesh.axis_names)
        if self.mesh.axis_types != auto:
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto))
        for name in ("context_axis", "tensor_axis"):
            axis = getattr(self, name)
            if axis is not None and axis not in self.mesh.axis_names:
                raise ConfigError(f"{name}: got {axis!r}, want one of the mesh's axes {self.mesh.axis_names}")
        if self.context_axis is not None and self.context_axis == self.tensor_axis:
            raise ConfigError(f"context_axis and tensor_axis: got {self.context_axis!r} twice, want two axes")
        if not is_count(self.interleave) or self.interleave < 1:
            raise ConfigError(f"interleave: got {self.interleave!r}, want a positive integer")
        for name, kind in (("combine", Combine), ("strategy", AllReduceStrategy)):
            value = getattr(self, name)
            if value not in list(kind) and not (name == "combine" and value is None):
                raise ConfigError(f"{name}: got {value!r}, want one of {[one.value for one in kind]}")
            object.__setattr__(self, name, None if value is None else kind(value))

    @classmethod
    def of(cls, mesh: Mesh | Self) -> Self:
        """``mesh`` if it is a ``CacheSharding``, else one over its axes "dcp" (context) and "tp" (heads), by name.

        Raises:
            ConfigError: it has other axes.
        """
        if isinstance(mesh, cls):
            return mesh
        if not isinstance(mesh, Mesh) or not set(mesh.axis_names) <= {"dcp", "tp"}:
            got = mesh.axis_names if isinstance(mesh, Mesh) else mesh
            raise ConfigError(f"mesh: got {got!r}, want axes 'dcp' and 'tp', or a CacheSharding, which names axes")
        context, tensor = (axis if axis in mesh.axis_names else None for axis in ("dcp", "tp"))
        return cls(mesh, context, tensor)

    @property
    def context_size(self) -> int:
        """C: ranks that the tokens are spread over."""
        return 1 if self.context_axis is None else self.mesh.shape[self.context_axis]

    @property
    def tensor_size(self) -> int:
        """Ranks that the heads are spread over."""
        return 1 if self.tensor_axis is None else self.mesh.shape[self.tensor_axis]

    def head_copies(self, num_heads: int) -> int:
        """How many ranks of ``tensor_axis`` store the same KV head: 1 unless there are fewer heads than ranks."""
        return max(self.tensor_size // num_heads, 1)

    def on_rank(self, config: KVCacheConfig) -> KVCacheConfig:
        """What one rank holds of a cache of ``config``, as a cache of its own; each has ``config``'s block ids.

        Raises:
            ConfigError: heads or tokens that cannot be spread like this.
        """
        size, heads = self.context_size, config.num_heads
        if heads % self.tensor_size and self.tensor_size % heads:
            raise ConfigError(
                f"num_heads: got {heads} KV heads over {self.tensor_size} ranks of {self.tensor_axis!r}, want one "
                f"number to divide the other"
            )
        if config.page_size % (size * self.interleave):
            raise ConfigError(
                f"interleave: got {self.interleave}, with pages of {config.page_size} tokens over {size} ranks of "
                f"{self.context_axis!r}: want a divisor of the {config.page_size}/{size} slots a rank has of a page"
            )
        return dataclasses.replace(
            config,
            num_heads=max(heads // self.tensor_size, 1),
            block_size=config.block_size // size,
            kernel_block_size=config.page_size // size,
        )

    def combine_of(self, num_q_heads: int) -> Combine:
        """``combine``, resolved for so many query heads.

        Raises:
            ConfigError: it cannot be done with so many.
        """
        ranks = self.context_size * self.tensor_size
        chosen = self.combine or (Combine.ALL_REDUCE if num_q_heads % ranks else Combine.ALL_TO_ALL)
        wanted = self.tensor_size if chosen is Combine.ALL_REDUCE else ranks
        if num_q_heads % wanted:
            raise ConfigError(
                f"q heads: got {num_q_heads}, want a multiple of {wanted}, the ranks that {chosen.value!r} leaves "
                f"them on"
            )
        return chosen

    def q_head_axes(self, num_q_heads: int) -> tuple[str, ...]:
        """Axes that query heads, and with them the heads of the result, are spread over."""
        scattered = self.combine_of(num_q_heads) is not Combine.ALL_REDUCE
        return tuple(axis for axis in (self.tensor_axis, self.context_axis if scattered else None) if axis is not None)

    def page_spec(self, leading: int = 1) -> Any:
        """PartitionSpec of pages [..., heads, page_size, head_dim] with ``leading`` axes before the heads."""
        return P(*(None,) * leading, self.tensor_axis, self.context_axis, None)

    def named(self, spec: Any) -> NamedSharding:
        """``spec`` on this mesh."""
        return NamedSharding(self.mesh, spec)

    def fitting_blocks(self, config: KVCacheConfig) -> int:
        """As many blocks of ``config`` as ``memory_fraction`` of a rank's free memory holds."""
        return dataclasses.replace(self.on_rank(config), num_blocks=None, num_kernel_blocks=None).pool_blocks

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return self.named(P())

    def token_order(self, block_size: int) -> np.ndarray:
        """i32[block_size]: which offset of a block stands at each index of a page array's token axis."""
        index = np.arange(block_size, dtype=np.int32)
        rank, local = np.divmod(index, block_size // self.context_size)
        turn, within = np.divmod(local, self.interleave)
        return (turn * self.context_size + rank) * self.interleave + within
