"""What a pool does, in plain Python: one block at a time, dictionaries and lists. Written from the contract alone."""

from __future__ import annotations

from collections import OrderedDict, deque


class PoolModel:
    """Reference counts, cached content, and two queues."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.cached: set[int] = set()
        self.uncached_free = deque(range(num_blocks))
        self.cached_free: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.uncached_free) + len(self.cached_free)

    def admit(self, counts, hits, order, capacity):
        """(ids of each row, evicted of each row, ok of each row)."""
        rows = range(len(counts))
        valid = [counts[r] >= 0 and all(self._can_hit(b) for b in hits[r]) for r in rows]
        ok, free, room, refused, revived = [False] * len(counts), self.num_free, capacity, False, set()
        for r in order:
            if not valid[r]:
                continue
            if not counts[r] and not hits[r]:
                ok[r] = True
                continue
            revivals = {b for b in hits[r] if self.refs[b] == 0} - revived
            fits = counts[r] + len(revivals) <= free and counts[r] + len(hits[r]) <= room
            refused = refused or not fits
            if not refused:
                ok[r], free, room = True, free - counts[r] - len(revivals), room - counts[r] - len(hits[r])
                revived |= revivals
        ids: list[list[int]] = [[] for _ in rows]
        evicted: list[list[bool]] = [[] for _ in rows]
        for r in (r for r in order if ok[r]):
            for block in hits[r]:
                self.cached_free.pop(block, None)
                self.refs[block] += 1
            ids[r], evicted[r] = list(hits[r]), [False] * len(hits[r])
        for r in (r for r in order if ok[r]):
            for _ in range(counts[r]):
                evicted[r].append(not self.uncached_free)
                ids[r].append(self._take())
        return ids, evicted, ok

    def _can_hit(self, block: int) -> bool:
        return 0 <= block < self.num_blocks and (self.refs[block] > 0 or block in self.cached)

    def _take(self) -> int:
        if self.uncached_free:
            block = self.uncached_free.popleft()
        else:
            block, _ = self.cached_free.popitem(last=False)
            self.cached.discard(block)
        self.refs[block] = 1
        return block

    def take(self, ids) -> bool:
        ids = [b for b in ids if b != -1]
        if any(not 0 <= b < self.num_blocks for b in ids):
            return False
        for block in ids:
            if block in self.uncached_free:
                self.uncached_free.remove(block)
            self.cached_free.pop(block, None)
            self.refs[block] += 1
        return True

    def free(self, ids) -> bool:
        ids = [b for b in ids if b != -1]
        if any(not 0 <= b < self.num_blocks or ids.count(b) > self.refs[b] for b in ids):
            return False
        for block in ids:
            self.refs[block] -= 1
        last = list(OrderedDict.fromkeys(reversed(ids)))[::-1]
        for block in last:  # a block reached twice is queued at its last place
            if self.refs[block] == 0:
                if block in self.cached:
                    self.cached_free[block] = None
                else:
                    self.uncached_free.append(block)
        return True

    def mark_cached(self, ids) -> bool:
        ids = [b for b in ids if b != -1]
        if any(not 0 <= b < self.num_blocks or self.refs[b] == 0 for b in ids):
            return False
        self.cached |= set(ids)
        return True

    def uncache(self, ids) -> bool:
        ids = [b for b in ids if b != -1]
        if any(not 0 <= b < self.num_blocks for b in ids):
            return False
        for block in ids:
            if block in self.cached_free:
                del self.cached_free[block]
                self.uncached_free.append(block)
            self.cached.discard(block)
        return True
