"""Rotary position embeddings (Su et al., RoFormer) in the half-split layout of Llama, and its scalings."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How fast each pair of head elements turns with the position.

    Attributes:
        theta: base of the geometric row of frequencies.
        kind: ``"default"``; ``"linear"`` divides all frequencies by ``factor``; ``"llama3"`` only slow ones.
        factor: how many times longer than the original context.
        low_freq_factor: llama3: waves longer than ``original_max_position / low_freq_factor`` are divided.
        high_freq_factor: llama3: waves shorter than ``original_max_position / high_freq_factor`` are kept.
        original_max_position: llama3: context length before the scaling.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """f32[head_dim / 2]: radians each pair turns per position."""
        plain = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "llama3":
            plain = self._scale_slow_waves(plain)
        return plain.astype(np.float32)

    def _scale_slow_waves(self, frequencies: np.ndarray) -> np.ndarray:
        """Llama 3.1: between the two wavelengths, blend smoothly from divided to untouched."""
        turns = self.original_max_position * frequencies / (2 * math.pi)  # full turns in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


def rotary_table(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each f32[T, 1, head_dim / 2], at ``positions`` i32[T]; once a step, for all layers."""
    angles = positions[:, None, None].astype(jnp.float32) * rope.inverse_frequencies(head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn ``x`` [T, heads, head_dim] by ``rotary_table``; element i is paired with i + head_dim / 2."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
