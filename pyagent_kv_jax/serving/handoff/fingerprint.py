"""A name for a model's weights that two processes arrive at by themselves."""

from __future__ import annotations

import hashlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

_SAMPLES = 4096  # elements of each parameter that are read


def model_fingerprint(model: nnx.Module) -> str:
    """Digest of the model's ``config`` and of its parameters: names, shapes, dtypes, and elements spread over each.

    Two checkpoints of one architecture differ in it, for all but deliberate purposes; it is no proof against someone
    who makes weights to deceive. Reading 4096 elements a parameter takes milliseconds, whatever the model's size.
    """
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for path, param in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda item: str(item[0])):
        value = param[...]
        digest.update(f"{path} {value.shape} {value.dtype};".encode())
        at = np.unique(np.linspace(0, value.size - 1, min(value.size, _SAMPLES)).astype(np.int64))
        chosen = value[np.unravel_index(at, value.shape)] if value.ndim else value
        digest.update(np.asarray(chosen.astype(jnp.float32)).tobytes())
    return digest.hexdigest()
