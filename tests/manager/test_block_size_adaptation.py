"""Block sizes that change under live requests: the same content, and prefixes that are still found."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from pyagent_kv_jax import OutOfBlocksError
from tests.manager.test_manager_machine import LONG, ManagerMachine


class ChangingMachine(ManagerMachine):
    """Every way to change a manager, and its block size besides."""

    page_size = 2

    @rule(size=st.sampled_from([2, 4, 6, 8]))
    def change_block_size(self, size: int) -> None:
        before = self.manager.config
        try:
            self.manager.change_block_size(size)
        except OutOfBlocksError:
            assert self.manager.config == before
            return
        assert self.manager.config.block_size == size
        if size != before.block_size:  # what was reserved has been given back
            for known in self.requests.values():
                known.reserved = None


TestChangingMachine = ChangingMachine.TestCase
TestChangingMachine.settings = settings(
    max_examples=300 if LONG else 4,
    stateful_step_count=200 if LONG else 30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
