"""The one-line way in."""

from __future__ import annotations

from pyagent_kv_jax.config import DeviceType, DType, KVCacheConfig
from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.manager.options import DEFAULT_OPTIONS, ManagerOptions


def create_kv_cache_manager(
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_blocks: int | None = None,
    block_size: int = 16,
    *,
    dtype: DType | None = None,
    device: DeviceType | None = None,
    max_num_reqs: int = 256,
    max_model_len: int = 4096,
    kernel_block_size: int | None = None,
    options: ManagerOptions = DEFAULT_OPTIONS,
) -> KVCacheManager:
    """A manager in one line. See ``KVCacheConfig`` and ``ManagerOptions`` for the arguments and the errors."""
    config = KVCacheConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
        device=device,
        max_num_reqs=max_num_reqs,
        max_model_len=max_model_len,
        kernel_block_size=kernel_block_size,
    )
    return KVCacheManager(config, options)
