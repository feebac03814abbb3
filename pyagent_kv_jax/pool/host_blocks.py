"""What objects that hand out blocks call by call ask of a pool on the host."""

from __future__ import annotations

import abc

import numpy as np

from pyagent_kv_jax.config import BlockAllocationStrategy
from pyagent_kv_jax.errors import InvalidBlockError


class HostBlocks(abc.ABC):
    """What a pool on the host can do, be it one ``BlockPool`` or several.

    Attributes:
        knows_nodes: whether a node may be named with SCATTERED too.
    """

    knows_nodes = False

    @property
    @abc.abstractmethod
    def num_blocks(self) -> int:
        """N."""

    @property
    @abc.abstractmethod
    def num_free(self) -> int:
        """Free blocks."""

    @abc.abstractmethod
    def ref_counts(self) -> np.ndarray:
        """References of every block, i32[N]; valid until the next call."""

    @abc.abstractmethod
    def allocate(
        self,
        count: int,
        strategy: BlockAllocationStrategy = BlockAllocationStrategy.SCATTERED,
        node: int | None = None,
    ) -> np.ndarray:
        """``count`` blocks, i32[count], each with one reference.

        Raises:
            OutOfBlocksError: fewer are free, or no run is as long.
            InvalidArgumentError: a negative count, or a strategy or node that the pool cannot serve.
        """

    @abc.abstractmethod
    def take(self, ids: np.ndarray) -> None:
        """One more reference to each of these very blocks i32[n], free or in use.

        Raises:
            InvalidBlockError: an id outside the pool.
        """

    @abc.abstractmethod
    def free(self, ids: np.ndarray) -> None:
        """Drop one reference to each block i32[n], in their order.

        Raises:
            InvalidBlockError: an id outside the pool.
            DoubleFreeError: fewer references than are dropped.
        """

    def check_inside(self, ids: np.ndarray, name: str = "blocks") -> None:
        """Raise ``InvalidBlockError`` where an id i32[n] is outside the pool."""
        outside = ids[(ids < 0) | (ids >= self.num_blocks)]
        if len(outside):
            raise InvalidBlockError(f"{name}: got {outside[:20].tolist()}, want 0 to {self.num_blocks - 1}")

    def check_held(self, ids: np.ndarray, error: type[InvalidBlockError], name: str = "blocks") -> None:
        """Raise ``error`` where a block has fewer references than it is named among ``ids`` i32[n].

        Raises:
            InvalidBlockError: an id outside the pool.
        """
        self.check_inside(ids, name)
        named, times = np.unique(ids, return_counts=True)
        lacking = named[self.ref_counts()[named] < times]
        if len(lacking):
            raise error(f"{name}: got {lacking[:20].tolist()}, want blocks with that many references")
