"""The counts a manager reports."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ManagerStats:
    """A snapshot of ``KVCacheManager``.

    Attributes:
        num_blocks: of the pool.
        num_free_blocks: that an admission could take, cached ones included.
        num_cached_free_blocks: free blocks whose content is kept until somebody needs them.
        num_cached_blocks: blocks that a request could share now, held or free.
        num_host_blocks: of the host pool.
        num_free_host_blocks: of those.
        num_requests: that hold blocks.
        num_swapped_requests: that wait in host memory.
        num_waiting_requests: that were added, or preempted to be computed again, and hold nothing.
        hit_rate: prompt tokens found in the prefix cache by prompt tokens, since the last reset; 0.0 before any.
        recent_hit_rate: the same over the last requests.
        num_hits_cut_short: lookups in which some layer group had more of the prefix than all groups together.
        num_hash_collisions: blocks of other content that came out with the same key, and were not taken for it.
        num_evicted_blocks: cached blocks whose content gave way to new requests.
        num_copied_blocks: shared blocks copied because somebody wrote into them.
        num_swapped_out: requests, so far.
        num_swapped_in: requests, so far.
        num_recomputed: requests preempted to be computed again, so far.
        num_reserved_blocks: free blocks that stand ready for the next decode steps.
        num_prediction_hits: blocks that decode steps needed and had been reserved, so far.
        num_prediction_misses: blocks that decode steps needed and had not been, so far; 0 where nothing is predicted.
        padding_bytes: memory in the blocks held that belongs to no layer, where groups are of different sizes.
        empty_slot_share: slots of held blocks without a token yet, by all slots of held blocks; 0.0 if none are held.
    """

    num_blocks: int
    num_free_blocks: int
    num_cached_free_blocks: int
    num_cached_blocks: int
    num_host_blocks: int
    num_free_host_blocks: int
    num_requests: int
    num_swapped_requests: int
    num_waiting_requests: int
    hit_rate: float
    recent_hit_rate: float
    num_hits_cut_short: int
    num_hash_collisions: int
    num_evicted_blocks: int
    num_copied_blocks: int
    num_swapped_out: int
    num_swapped_in: int
    num_recomputed: int
    num_reserved_blocks: int
    num_prediction_hits: int
    num_prediction_misses: int
    padding_bytes: int
    empty_slot_share: float


@dataclasses.dataclass
class Counts:
    """Those of them that only grow."""

    hits_cut_short: int = 0
    evicted_blocks: int = 0
    copied_blocks: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    recomputed: int = 0
