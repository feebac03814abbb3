"""What two instances must have in common before a block may move between them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.handoff.block_layout import Pages
from pyagent_kv_jax.distributed.handoff.block_transfer import block_geometry
from pyagent_kv_jax.errors import TransferError

PROTOCOL = 1
"""Of the messages between instances; changes whenever they do."""


@dataclasses.dataclass(frozen=True)
class InstanceIdentity:
    """Who an instance is to another one. Meshes are no part of it: they may differ.

    Attributes:
        protocol: of the messages.
        library: major and minor version of this package.
        model: what names the weights; see ``model_fingerprint``.
        geometry: of a block (JSON), see ``block_geometry``.
        hash_algorithm: of the blocks' keys.
        scales: digest of the quantisation scales, which do not move; "" where there are none.
    """

    protocol: int
    library: str
    model: str
    geometry: str
    hash_algorithm: str
    scales: str

    @classmethod
    def of(cls, model: str, pages: Pages, hash_algorithm: str | Callable[[bytes], bytes]) -> Self:
        """That of an instance whose blocks stand in ``pages``."""
        named = hash_algorithm if isinstance(hash_algorithm, str) else getattr(hash_algorithm, "__qualname__", "")
        geometry = json.dumps(block_geometry(pages.config), sort_keys=True)
        return cls(PROTOCOL, library_version(), model, geometry, named, _digest_of_scales(pages))

    def check(self, other: dict[str, Any]) -> None:
        """Compare with what another instance says of itself.

        Raises:
            TransferError: they differ; the message has both values of each difference.
        """
        mine = dataclasses.asdict(self)
        different = [name for name in mine if other.get(name) != mine[name]]
        if different or set(other) != set(mine):
            values = "; ".join(
                f"{name}: got {str(other.get(name))[:1000]!r}, want {mine[name]!r}" for name in different
            )
            raise TransferError(f"the other instance differs: {values or sorted(set(other) ^ set(mine))}")


def library_version() -> str:
    """Major and minor version of this package."""
    try:
        return ".".join(importlib.metadata.version("pyagent-kv-jax").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _digest_of_scales(pages: Pages) -> str:
    if pages.k_scale is None or pages.v_scale is None:
        return ""
    config: KVCacheConfig = pages.config
    digest = hashlib.sha256()
    for scale in (pages.k_scale, pages.v_scale):
        each = np.asarray(scale)
        digest.update(np.ascontiguousarray(each[:, :: each.shape[1] // config.num_heads]).tobytes())
    return digest.hexdigest()
