"""Every error this library raises, and the one way an ``ok`` flag becomes one.

Each class says what was wrong with the call; the message says the value received and the value wanted.
Whenever one of these is raised, the state is what it was before the call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels.checking import check


class KVCacheError(Exception):
    """Base class of all errors raised by ``pyagent_kv_jax``."""


class ConfigError(KVCacheError, ValueError):
    """A configuration that cannot work: sizes that do not divide, a device that is not there."""


class InvalidArgumentError(KVCacheError, ValueError):
    """A value of the wrong kind: a negative or non-integer count, an empty prompt."""


class ShapeMismatchError(KVCacheError, ValueError):
    """Arrays whose shapes or dtypes do not fit each other or the cache."""


class OutOfBlocksError(KVCacheError):
    """The pool has fewer free blocks than were asked for."""


class RequestTooLongError(KVCacheError, ValueError):
    """More tokens than one row of the table, or the whole pool, can ever hold."""


class TableFullError(KVCacheError):
    """A sparse block table has fewer free nodes than the blocks need; those of rows that are cleared come back."""


class InvalidBlockError(KVCacheError, ValueError):
    """A block id outside the pool, or one that is not in the state the call needs."""


class DoubleFreeError(InvalidBlockError):
    """A reference dropped that nobody holds."""


class UnknownRequestError(KVCacheError, KeyError):
    """A request id that holds nothing here."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class DuplicateRequestError(KVCacheError, ValueError):
    """A request id that is already in use, or named twice in one call."""


class TooManyRequestsError(KVCacheError):
    """Every row of the table is taken."""


class CallbackError(KVCacheError):
    """A user's callback raised; the cause is chained."""


class ModelLoadError(KVCacheError):
    """A model directory that cannot be loaded: a missing file, shard or tensor, an unknown architecture."""


class ReplicaDriftError(KVCacheError, RuntimeError):
    """Copies of one array on several devices that are no longer the same."""


class DeviceUnavailableError(KVCacheError, RuntimeError):
    """A device or backend that this process cannot reach."""


class TransferError(KVCacheError, RuntimeError):
    """Blocks did not come over from another instance: it is gone, refused, differs, or did not answer in time."""


def is_concrete(*values: object) -> bool:
    """Whether every array among ``values`` has a value now, i.e. none is traced by ``jit``, ``vmap`` or ``grad``."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def require(ok: ArrayLike, error: type[KVCacheError], message: str) -> None:
    """Raise ``error(message)`` when a concrete ``ok`` is false anywhere.

    Under a transformation nothing can raise, and the refused operation changes nothing; in ``checking()`` it is an
    error that ``checkify`` reports.
    """
    if isinstance(ok, jax.core.Tracer):
        check(jnp.all(ok), f"{error.__name__}: {message}")
    elif not np.all(np.asarray(ok)):
        raise error(message)
