"""A cache manager of the same interface in plain Python sets, for scheduling without arrays."""

from pyagent_kv_jax.errors import UnknownRequestError


class FakeManager:
    """``step`` as the contract has it: free, then serve in order; once one does not fit, refuse who wants blocks."""

    def __init__(self, num_blocks, block_size, max_rows=10**6):
        self.num_blocks, self.block_size, self.max_rows = num_blocks, block_size, max_rows
        self.unused = list(range(num_blocks))
        self.blocks, self.lengths = {}, {}

    def get_num_free_blocks(self):
        return len(self.unused)

    def free(self, request_id):
        if request_id not in self.blocks:
            raise UnknownRequestError(request_id)
        self.unused += self.blocks.pop(request_id)
        del self.lengths[request_id]

    def step(self, request_ids, counts, free=()):
        assert len(set(request_ids)) == len(request_ids)
        assert not set(free) & set(request_ids)
        for request_id in free:
            self.free(request_id)
        ok, full = [], False
        for request_id, count in zip(request_ids, counts, strict=True):
            assert count >= 1
            length = self.lengths.get(request_id, 0) + count
            missing = -(-length // self.block_size) - len(self.blocks.get(request_id, []))
            full |= missing > len(self.unused)
            ok.append(missing == 0 or not full)
            if ok[-1]:
                taken = [self.unused.pop() for _ in range(missing)]
                self.blocks[request_id] = self.blocks.get(request_id, []) + taken
                self.lengths[request_id] = length
        assert len(self.blocks) <= self.max_rows
        return ok
