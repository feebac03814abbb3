"""Prefill and decode in two instances, with KV blocks handed from one to the other."""

from pyagent_kv_jax.distributed.handoff.control_channel import Timeouts
from pyagent_kv_jax.serving.handoff.block_load import LoadOptions
from pyagent_kv_jax.serving.handoff.decode_instance import DecodeInstance, HandoffRequest
from pyagent_kv_jax.serving.handoff.fingerprint import model_fingerprint
from pyagent_kv_jax.serving.handoff.prefill_instance import PrefillInstance
from pyagent_kv_jax.serving.handoff.prefill_link import LocalLink
from pyagent_kv_jax.serving.handoff.remote_link import PrefillServer, RemoteLink

__all__ = [
    "DecodeInstance",
    "HandoffRequest",
    "LoadOptions",
    "LocalLink",
    "PrefillInstance",
    "PrefillServer",
    "RemoteLink",
    "Timeouts",
    "model_fingerprint",
]
