"""What attention of Flax's parameters is, in float64 and one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def attend(params: dict[str, Any], x: np.ndarray, window: int | None = None) -> np.ndarray:
    """Causal self attention of one row.

    Args:
        params: ``query``, ``key``, ``value`` with kernels [features, heads, head_dim], ``out`` with
            [heads, head_dim, out_features], biases; ``query_ln`` and ``key_ln`` with scales [head_dim], or neither.
        x: [n, features].
        window: tokens that each sees, itself included. None: all.

    Returns:
        [n, out_features].
    """
    params = {name: {kind: np.asarray(value, np.float64) for kind, value in p.items()} for name, p in params.items()}
    x = np.asarray(x, np.float64)
    q, k, v = (np.einsum("nf,fhd->nhd", x, p["kernel"]) + p["bias"] for p in map(params.get, ("query", "key", "value")))
    if "query_ln" in params:
        q, k = _norm(q, params["query_ln"]["scale"]), _norm(k, params["key_ln"]["scale"])
    out = np.zeros(q.shape)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        for at in range(len(x)):
            seen = slice(0 if window is None else max(at + 1 - window, 0), at + 1)
            logits = k[seen, kv] @ q[at, head] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[at, head] = weights / weights.sum() @ v[seen, kv]
    return np.einsum("nhd,hdo->no", out, params["out"]["kernel"]) + params["out"]["bias"]


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale
