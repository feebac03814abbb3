"""A cache manager of the same interface in plain Python sets, for scheduling without arrays."""

from pyagent_kv_jax.errors import UnknownRequestError
from pyagent_kv_jax.manager.step_plan import AdmissionPreview


class FakeManager:
    """``step`` as the contract has it: free, then serve in order; once one does not fit, refuse who wants blocks.

    With ``caching`` full blocks of known tokens are found again until somebody takes them, for want of others;
    with ``swapping`` preempted requests keep all they hold.
    """

    def __init__(self, num_blocks, block_size, max_rows=10**6, *, caching=False, swapping=False):
        self.num_blocks, self.block_size, self.max_rows = num_blocks, block_size, max_rows
        self.caching, self.swapping = caching, swapping
        self.unused = list(range(num_blocks))
        self.blocks, self.lengths, self.tokens, self.swapped = {}, {}, {}, {}
        self.cached = {}  # tokens up to the end of a block -> the block

    def get_num_free_blocks(self):
        return len(self.unused)

    def blocks_for(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def add_request(self, request_id, tokens):
        assert request_id not in self.tokens
        self.tokens[request_id] = [int(token) for token in tokens]

    def record_token(self, request_id, token):
        assert request_id in self.blocks
        self.tokens[request_id].append(token)

    def hits(self, request_id):
        found = []
        if self.caching:
            tokens = self.tokens[request_id]
            for end in range(self.block_size, len(tokens), self.block_size):  # never the last token
                if tuple(tokens[:end]) not in self.cached:
                    break
                found.append(self.cached[tuple(tokens[:end])])
        return found

    def start_of(self, request_id):
        """Cached blocks, and tokens not to be computed."""
        if request_id in self.swapped:
            return [], self.swapped[request_id]
        hits = self.hits(request_id)
        return hits, len(hits) * self.block_size

    def preview(self, request_id):
        assert request_id not in self.blocks
        hits, cached = self.start_of(request_id)
        new = self.blocks_for(len(self.tokens[request_id])) - len(hits)
        return AdmissionPreview(cached, new + len(set(hits) & set(self.unused)))

    def holders(self, block):
        return sum(block in blocks for blocks in self.blocks.values())

    def give_back(self, request_id):
        for block in self.blocks.pop(request_id):
            if not self.holders(block):
                self.unused.append(block)
        del self.lengths[request_id]

    def free(self, request_id):
        if request_id not in self.tokens:
            raise UnknownRequestError(request_id)
        if request_id in self.blocks:
            self.give_back(request_id)
        self.swapped.pop(request_id, None)
        del self.tokens[request_id]

    def preempt(self, request_id):
        if self.swapping:
            self.swapped[request_id] = self.lengths[request_id]
        self.give_back(request_id)

    def fork(self, parent, child):
        self.tokens[child] = list(self.tokens[parent])
        self.blocks[child] = list(self.blocks[parent])
        self.lengths[child] = self.lengths[parent]
        assert len(self.blocks) <= self.max_rows

    def take(self):
        cached = set(self.cached.values())
        block = next((block for block in self.unused if block not in cached), self.unused[0])
        self.unused.remove(block)
        self.cached = {prefix: b for prefix, b in self.cached.items() if b != block}
        return block

    def step(self, request_ids, counts, free=()):
        """(ok, tokens computed, tokens cached), a list each."""
        assert len(set(request_ids)) == len(request_ids)
        assert not set(free) & set(request_ids)
        for request_id in free:
            self.free(request_id)
        starts = {i: self.start_of(i) for i in request_ids if i not in self.blocks}
        answers, full = [], False
        for request_id, count in zip(request_ids, counts, strict=True):
            assert count >= 1
            hits, cached = starts.get(request_id, ([], 0))
            length = self.lengths.get(request_id, 0)
            held = self.blocks.get(request_id, hits)
            hits = [block for block in hits if block in self.unused]
            missing = self.blocks_for(length + cached + count) - len(held)
            copied = length % self.block_size != 0 and self.holders(held[-1]) > 1
            full |= missing + copied + len(hits) > len(self.unused)
            ok = (missing + copied + len(hits) == 0) or not full
            answers.append((ok, count if ok else 0, cached if ok else 0))
            if ok:
                self.swapped.pop(request_id, None)
                self.unused = [block for block in self.unused if block not in hits]
                held = list(held)
                if copied:
                    held[-1] = self.take()
                self.blocks[request_id] = held + [self.take() for _ in range(missing)]
                self.lengths[request_id] = length + cached + count
                self.enter(request_id)
        assert len(self.blocks) <= self.max_rows
        return tuple(map(list, zip(*answers, strict=True))) if answers else ([], [], [])

    def enter(self, request_id):
        tokens, blocks = self.tokens[request_id], self.blocks[request_id]
        for i in range(self.lengths[request_id] // self.block_size if self.caching else 0):
            if blocks[i] not in self.cached.values():
                self.cached.setdefault(tuple(tokens[: (i + 1) * self.block_size]), blocks[i])
