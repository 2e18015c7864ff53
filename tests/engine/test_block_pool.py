"""The block pool: nothing lost, nothing owned twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.engine.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Random owners allocate, register, look up, share and free; a plain model says what must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.owners: list[list[int]] = []
        self.num_keys = 0

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
            assert self.pool.num_free == free
        else:
            self.owners.append(self.pool.allocate(count))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.integers(0, 20))
    def register(self, data: st.DataObject, key: int) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.pool.register(data.draw(st.sampled_from(owner)), b"%d" % key)

    @rule(keys=st.lists(st.integers(0, 20), max_size=4))
    def share_prefix(self, keys: list[int]) -> None:
        blocks = self.pool.lookup(b"%d" % key for key in keys)
        if blocks and len(set(blocks)) == len(blocks):
            self.pool.share(blocks)
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(range(len(self.owners))))
        self.pool.free(self.owners.pop(owner))

    @invariant()
    def is_whole(self) -> None:
        self.pool.check_integrity()
        owned = {block for owner in self.owners for block in owner}
        assert self.pool.num_used == len(owned)
        assert self.pool.num_free + self.pool.num_used == 12


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


@given(st.integers(1, 10))
def test_a_freed_block_stays_findable_until_it_is_reused(num_blocks: int) -> None:
    """A registered block that was freed is found again, and is gone once its memory was handed out anew."""
    pool = BlockPool(num_blocks)
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    pool.free([block])
    assert pool.lookup([b"key"]) == [block]
    assert pool.num_cached == 1
    pool.allocate(num_blocks)
    assert pool.lookup([b"key"]) == []


def test_the_least_recently_freed_prefix_is_evicted_first_and_its_tail_before_its_head() -> None:
    """With no empty block left, eviction follows the order of freeing, tails first."""
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for index, block in enumerate(old + new):
        pool.register(block, b"%d" % index)
    pool.free(old)
    pool.free(new)
    assert pool.allocate(3) == [old[1], old[0], new[1]]
    assert pool.lookup([b"2"]) == [new[0]]


def test_a_second_block_of_the_same_content_is_not_registered() -> None:
    """Two sequences that compute the same block keep both, and only the first is findable."""
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"key")
    pool.register(second, b"key")
    pool.free([first])
    pool.free([second])
    pool.check_integrity()
    assert pool.lookup([b"key"]) == [first]
    assert pool.num_cached == 1
