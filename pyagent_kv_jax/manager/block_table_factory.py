"""Tables from a few numbers."""

from __future__ import annotations

from jax.sharding import Mesh

from pyagent_kv_jax.config import BlockTableConfig
from pyagent_kv_jax.manager.block_table_v2 import BlockTableV2
from pyagent_kv_jax.tables import BlockTable, SparseBlockTable


class BlockTableFactory:
    """Makes each form of block table. ``sizes`` are other fields of ``BlockTableConfig``, such as
    ``kernel_block_size``. All raise ``ConfigError`` for sizes that cannot be.
    """

    @staticmethod
    def create_standard(
        block_size: int = 16, max_num_reqs: int = 256, max_blocks_per_req: int = 512, **sizes: int
    ) -> BlockTable:
        """A dense table."""
        return BlockTable.create(BlockTableConfig(block_size, max_num_reqs, max_blocks_per_req, **sizes))

    @staticmethod
    def create_sparse(
        block_size: int = 16,
        *,
        max_num_reqs: int = 256,
        max_blocks_per_req: int = 8192,
        num_blocks: int | None = None,
        fan_out: int | None = None,
        **sizes: int,
    ) -> SparseBlockTable:
        """A sparse table, with room for ``num_blocks`` blocks; wide rows cost it next to nothing."""
        config = BlockTableConfig(block_size, max_num_reqs, max_blocks_per_req, **sizes)
        return SparseBlockTable.create(config, num_blocks, fan_out)

    @staticmethod
    def create_v2(
        block_size: int = 16,
        use_sparse: bool = False,
        use_prediction: bool = False,
        *,
        max_num_reqs: int = 256,
        max_blocks_per_req: int = 512,
        num_blocks: int | None = None,
        prediction_horizon: int = 64,
        num_nodes: int = 1,
        mesh: Mesh | None = None,
        axis: str = "workers",
        **sizes: int,
    ) -> BlockTableV2:
        """A table with its pool; see ``BlockTableV2``."""
        return BlockTableV2(
            BlockTableConfig(block_size, max_num_reqs, max_blocks_per_req, **sizes),
            use_sparse,
            use_prediction,
            num_blocks=num_blocks,
            prediction_horizon=prediction_horizon,
            num_nodes=num_nodes,
            mesh=mesh,
            axis=axis,
        )
