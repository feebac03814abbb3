"""Padded rows, as Flax models have them, and the ragged tokens of a step, as the cache wants them: there and back."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp

from pyagent_kv_jax.arguments import static_count
from pyagent_kv_jax.errors import ShapeMismatchError


@partial(jax.tree_util.register_dataclass, data_fields=["places"], meta_fields=["rows", "length"])
@dataclasses.dataclass(frozen=True)
class PaddedRows:
    """Where in [rows, length] the T tokens of a step stand: the first of each row are real, the rest is padding.

    >>> cache, meta = cache.extend(lengths, num_tokens=rows * n)
    >>> tokens = PaddedRows.of(meta.query_start_loc, rows, n)
    >>> q, k, v = (tokens.ragged(x) for x in (q, k, v))          # [rows, n, heads, dim] -> [T, heads, dim]
    >>> out, cache = cache.attend(layer, q, k, v, meta)
    >>> out = tokens.padded(out)                                 # [T, heads, dim] -> [rows, n, heads, dim]

    Attributes:
        places: i32[T], ``row * length + index`` of each token; ``rows * length`` for the step's own padding.
        rows: static.
        length: static; n, what rows are padded to.
    """

    places: jax.Array
    rows: int
    length: int

    @classmethod
    def of(cls, query_start_loc: jax.Array | None, rows: int, length: int, num_tokens: int | None = None) -> Self:
        """The places of a step in which rows stand one after another.

        Args:
            query_start_loc: i32[rows + 1], of ``AttentionMetadata``; no row brings more than ``length``. None: decode
                layout, token r is row r's.
            rows: static.
            length: static; 1 in decode layout.
            num_tokens: static; T. None: ``rows * length``.

        Raises:
            ShapeMismatchError: starts of another number of rows, or a decode layout of another length or T.
        """
        rows, length = static_count("rows", rows, 1), static_count("length", length, 1)
        tokens = rows * length if num_tokens is None else static_count("num_tokens", num_tokens, 1)
        if query_start_loc is None:
            if length != 1 or tokens != rows:
                raise ShapeMismatchError(f"decode layout: got {tokens} tokens in [{rows}, {length}], want one a row")
            return cls(jnp.arange(rows, dtype=jnp.int32), rows, length)
        if query_start_loc.shape != (rows + 1,):
            raise ShapeMismatchError(f"query_start_loc: got shape {query_start_loc.shape}, want ({rows + 1},)")
        token = jnp.arange(tokens, dtype=jnp.int32)
        row = jnp.searchsorted(query_start_loc, token, side="right").astype(jnp.int32) - 1
        row = jnp.minimum(row, rows - 1)  # past the last row's tokens, where the place is dropped anyway
        place = row * length + token - query_start_loc[row]
        return cls(jnp.where(token < query_start_loc[-1], place, rows * length), rows, length)

    def ragged(self, x: jax.Array) -> jax.Array:
        """[rows, length, ...] as [T, ...]; 0 for the step's padding, whatever ``x`` has there.

        Raises:
            ShapeMismatchError: ``x`` has other leading axes.
        """
        if x.shape[:2] != (self.rows, self.length):
            raise ShapeMismatchError(f"x: got shape {list(x.shape)}, want [{self.rows}, {self.length}, ...]")
        return x.reshape(-1, *x.shape[2:]).at[self.places].get(mode="fill", fill_value=0)

    def padded(self, x: jax.Array) -> jax.Array:
        """[T, ...] as [rows, length, ...]; 0 for the rows' padding.

        Raises:
            ShapeMismatchError: ``x`` has another leading axis.
        """
        if x.shape[:1] != self.places.shape:
            raise ShapeMismatchError(f"x: got shape {list(x.shape)}, want [{self.places.shape[0]}, ...]")
        flat = jnp.zeros((self.rows * self.length, *x.shape[1:]), x.dtype)
        return flat.at[self.places].set(x, mode="drop").reshape(self.rows, self.length, *x.shape[1:])
