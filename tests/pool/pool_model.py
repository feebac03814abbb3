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

    def allocate_runs(self, counts, capacity):
        """(ids of each row, evicted of each row, ok of each row): the shortest run that is long enough, empty first."""
        out = [], [], []
        room, refused = capacity, False
        for count in counts:
            ids: list[int] = []
            if count > 0 and not refused:
                free = [b for b in range(self.num_blocks) if self.refs[b] == 0]
                run = self._shortest([b for b in free if b not in self.cached], count) or self._shortest(free, count)
                refused = run is None or count > room
                ids = [] if refused else run[:count]
            self._give(out, ids, len(ids) == count)
            room -= len(ids)
        return out

    def _shortest(self, blocks, count):
        runs: list[list[int]] = []
        for block in blocks:
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        return min((run for run in runs if len(run) >= count), key=len, default=None)

    def allocate_near(self, counts, nodes, num_nodes, capacity):
        """Likewise: first each served row from its own node, then each served row from whatever is left."""
        valid = [count >= 0 and 0 <= node < num_nodes for count, node in zip(counts, nodes, strict=True)]
        wanted = [count if row_valid else 0 for count, row_valid in zip(counts, valid, strict=True)]
        left, room, served = self.num_free, capacity, []
        for count in wanted:
            if count and count > min(left, room):
                left = room = 0
            served.append(count == 0 or count <= min(left, room))
            left, room = (left - count, room - count) if served[-1] else (left, room)
        per_node = self.num_blocks // num_nodes
        free = [*self.uncached_free, *self.cached_free]
        ids: list[list[int]] = [[] for _ in counts]
        for near in (True, False):
            for r, count in enumerate(wanted):
                for block in list(free) if served[r] else []:
                    if len(ids[r]) < count and (block // per_node == nodes[r] or not near):
                        ids[r].append(block)
                        free.remove(block)
        out = [], [], []
        for r in range(len(counts)):
            self._give(out, ids[r], served[r] and valid[r])
        return out

    def _give(self, out, ids, ok) -> None:
        out[0].append(ids)
        out[1].append([b in self.cached for b in ids])
        out[2].append(ok)
        self.uncache(ids)
        self.take(ids)

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
