"""Lists of new block ids, padded on the host, so that few programs are compiled."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from pyagent_kv_jax.arguments import integers
from pyagent_kv_jax.errors import InvalidArgumentError, InvalidBlockError
from pyagent_kv_jax.tables.padding import padded

NO_BLOCK = -(2**31)
"""Padding of a list of block ids; -1 would hide an id that is wrong."""


def new_block_ids(block_ids: ArrayLike) -> Any:
    """``block_ids`` as i32[n], on the host padded with ``NO_BLOCK`` to a power of two.

    Raises:
        ShapeMismatchError: not a flat array of integers.
        InvalidBlockError: an id that is no int32, or the padding itself.
    """
    try:
        ids = integers("block_ids", block_ids if isinstance(block_ids, jax.core.Tracer) else np.asarray(block_ids))
    except InvalidArgumentError as error:
        raise InvalidBlockError(str(error)) from None
    if isinstance(ids, jax.core.Tracer):
        return ids
    if ids.size and ids.min() == NO_BLOCK:
        raise InvalidBlockError(f"block_ids: got {NO_BLOCK}, want ids of 0 or more")
    return padded(ids, fill=NO_BLOCK)
