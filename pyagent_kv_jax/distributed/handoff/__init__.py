"""Handing KV blocks from a prefill instance to a decode instance: arrays, channel, leases; no manager.

Within one process ``move_blocks`` is all there is to it. Between processes, a ``ControlServer`` and ``ControlClient``s
agree on what is to be sent, and ``BulkEndpoint``s send it. ``pyagent_kv_jax.serving.handoff`` puts both to use.
"""

from pyagent_kv_jax.distributed.handoff.block_layout import BlockLayout, Blocks
from pyagent_kv_jax.distributed.handoff.block_transfer import move_blocks, read_blocks, write_blocks
from pyagent_kv_jax.distributed.handoff.bulk_transfer import BulkEndpoint, PulledBlocks
from pyagent_kv_jax.distributed.handoff.control_channel import ControlClient, ControlServer, Timeouts
from pyagent_kv_jax.distributed.handoff.identity import InstanceIdentity
from pyagent_kv_jax.distributed.handoff.leases import Lease, LeaseBook

__all__ = [
    "BlockLayout",
    "Blocks",
    "BulkEndpoint",
    "ControlClient",
    "ControlServer",
    "InstanceIdentity",
    "Lease",
    "LeaseBook",
    "PulledBlocks",
    "Timeouts",
    "move_blocks",
    "read_blocks",
    "write_blocks",
]
