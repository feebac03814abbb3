"""How a decode instance reaches a prefill instance: the interface, and the plain case of both in one process."""

from __future__ import annotations

import itertools
from typing import Protocol

from pyagent_kv_jax.distributed.handoff.block_layout import Blocks
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.messages import Message, checked
from pyagent_kv_jax.errors import TransferError
from pyagent_kv_jax.serving.engine import Engine
from pyagent_kv_jax.serving.handoff.prefill_instance import PrefillInstance


class PendingBlocks(Protocol):
    """Blocks on their way."""

    def poll(self) -> Blocks | None:
        """Canonical blocks, or None where they are not here yet.

        Raises:
            TransferError: they will never be.
        """
        ...


class PrefillLink(Protocol):
    """A connection to a prefill instance."""

    def introduce(self, identity: InstanceIdentity) -> None:
        """Say who is asking, and hear who answers.

        Raises:
            TransferError: the two differ, or the other one is not there.
        """
        ...

    def send(self, message: Message) -> None:
        """Say something.

        Raises:
            TransferError: nobody is there.
        """
        ...

    def poll(self) -> list[Message]:
        """What was answered since the last call.

        Raises:
            TransferError: the other side is gone, and all that was asked of it lost; once each time.
        """
        ...

    def pull(self, uuid: int, num_blocks: int) -> PendingBlocks:
        """Fetch what a "staged" message speaks of."""
        ...

    def wait(self, seconds: float) -> None:
        """Until something is answered, at most so long."""
        ...

    def close(self) -> None:
        """Say goodbye."""
        ...


class _Here:
    """Blocks that need not travel; they go from mesh to mesh when they are written."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def poll(self) -> Blocks | None:
        return self._blocks


class LocalStage:
    """``Stage`` of an instance in this process."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._blocks: dict[int, Blocks] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, blocks: Blocks) -> int:
        """See ``Stage``."""
        uuid = next(self._numbers)
        self._blocks[uuid] = blocks
        return uuid

    def drop(self, uuid: int) -> None:
        """See ``Stage``."""
        self._blocks.pop(uuid, None)

    def fetched(self, uuid: int) -> None:
        """See ``Stage``; ``take`` has done it."""

    def take(self, uuid: int) -> Blocks:
        """What was put.

        Raises:
            TransferError: it was fetched or dropped before.
        """
        if uuid not in self._blocks:
            raise TransferError(f"blocks {uuid}: are not here, want some that were put and not fetched")
        return self._blocks.pop(uuid)


class LocalLink:
    """Between two instances of one process, on any two meshes or devices of it.

    The prefill instance computes while the decode instance polls.
    """

    _names = itertools.count()

    def __init__(self, engine: Engine, model_name: str, *, lease_seconds: float = 60.0) -> None:
        """A prefill instance around ``engine``, see ``PrefillInstance``."""
        self._stage = LocalStage()
        self.instance = PrefillInstance(engine, self._stage, model_name, lease_seconds=lease_seconds)
        self._name = f"local:{next(self._names)}"

    def introduce(self, identity: InstanceIdentity) -> None:
        """See ``PrefillLink``."""
        identity.check(vars(self.instance.identity))

    def send(self, message: Message) -> None:
        """See ``PrefillLink``."""
        self.instance.receive(self._name, checked(message))

    def poll(self) -> list[Message]:
        """See ``PrefillLink``."""
        self.instance.step()
        return [message for _, message in self.instance.replies()]

    def pull(self, uuid: int, num_blocks: int) -> PendingBlocks:
        """See ``PrefillLink``."""
        return _Here(self._stage.take(uuid))

    def wait(self, seconds: float) -> None:
        """Nothing comes by itself here."""

    def close(self) -> None:
        """Give back all that the instance keeps."""
        self.instance.drop_peer(self._name)
