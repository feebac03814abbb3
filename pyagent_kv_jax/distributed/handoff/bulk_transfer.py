"""Blocks between processes by ``jax.experimental.transfer``, from device memory to device memory.

What it leaves to its user is done here: a number that names blocks is drawn at random, since whoever knows one may
fetch them; a transfer that will never end is polled and not waited for; blocks that nobody fetched are fetched by
their own side, for there is no other way to let go of them.
"""

from __future__ import annotations

import secrets
from typing import Any

import jax

from pyagent_kv_jax.config import KVCacheConfig
from pyagent_kv_jax.distributed.handoff.block_layout import BlockLayout, Blocks
from pyagent_kv_jax.errors import TransferError

_STREAMS = 2  # TCP connections side by side


class BulkEndpoint:
    """This process's end: gives blocks to others, and fetches theirs."""

    def __init__(self, device: jax.Device, *, host: str = "127.0.0.1") -> None:
        """Listen.

        Args:
            device: blocks leave from it, and arrive there.
            host: address of this machine; only this machine's own processes reach the default.

        Raises:
            TransferError: JAX cannot do it here.
        """
        self._device = device
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        try:
            from jax.experimental import transfer

            self._server: Any = transfer.start_transfer_server(device.client, f"{host}:0", [f"{host}:0"] * _STREAMS)
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            raise TransferError(
                f"jax.experimental.transfer: cannot serve {device} of jax {jax.__version__} at {host} ({error})"
            ) from error
        self._given: dict[int, list[jax.ShapeDtypeStruct]] = {}
        self._connections: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """For the others' ``pull``."""
        address: str = self._server.address()
        return address

    @property
    def num_given(self) -> int:
        """Blocks that nobody has fetched yet, as far as it is known."""
        return len(self._given)

    def put(self, blocks: Blocks) -> int:
        """Keep canonical ``blocks`` to be fetched once, under a new number."""
        uuid = secrets.randbits(62)
        arrays = [jax.device_put(x, self._sharding) for x in blocks]
        self._server.await_pull(uuid, arrays)
        self._given[uuid] = [self._spec(x.shape, x.dtype) for x in arrays]
        return uuid

    def fetched(self, uuid: int) -> None:
        """Blocks have been fetched, or are on their way."""
        self._given.pop(uuid, None)

    def drop(self, uuid: int) -> None:
        """Let go of blocks that nobody fetched; passed over if they are not here."""
        if (specs := self._given.pop(uuid, None)) is not None:
            self._connection(self.address).pull(uuid, specs)

    def pull(self, address: str, uuid: int, config: KVCacheConfig, num_blocks: int) -> PulledBlocks:
        """Fetch ``num_blocks`` blocks of a cache of ``config``.

        Raises:
            TransferError: nobody can be reached there.
        """
        k_shape, v_shape, dtype = BlockLayout(config).canonical_shapes(num_blocks)
        try:
            arrays = self._connection(address).pull(uuid, [self._spec(shape, dtype) for shape in (k_shape, v_shape)])
        except (RuntimeError, ValueError) as error:
            self.forget(address)
            raise TransferError(f"blocks {uuid}: cannot be fetched from {address} ({error})") from error
        return PulledBlocks(self, address, arrays)

    def forget(self, address: str) -> None:
        """Make a new connection for the next pull."""
        self._connections.pop(address, None)

    def _connection(self, address: str) -> Any:
        if address not in self._connections:
            self._connections[address] = self._server.connect(address)
        return self._connections[address]

    def _spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)


class PulledBlocks:
    """Blocks on their way from another process."""

    def __init__(self, endpoint: BulkEndpoint, address: str, arrays: list[Any]) -> None:
        self._endpoint = endpoint
        self._address = address
        self._arrays = arrays

    def poll(self) -> Blocks | None:
        """Canonical blocks, or None where they are not here yet. They may never be: keep a deadline.

        Raises:
            TransferError: the connection broke.
        """
        try:
            if not all(x.is_ready() for x in self._arrays):
                return None
            return Blocks(*jax.block_until_ready(self._arrays))
        except RuntimeError as error:  # JaxRuntimeError
            self._endpoint.forget(self._address)
            raise TransferError(f"blocks from {self._address} broke off on their way ({error})") from error
