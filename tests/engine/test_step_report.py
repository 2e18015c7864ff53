"""What a step reports beyond its tokens: chunks, contexts, the prefill backlog, busy time, and the lives of KV blocks."""

from __future__ import annotations

import random

import pytest
from engine_driver import Driver, make_driver
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.engine.block_pool import BlockPool
from appliance.engine.wire import Abort


def _prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(50), k=length)


def _bits(value: int) -> int:
    return value.bit_length()


def test_a_block_that_nobody_can_find_ends_with_its_sequence() -> None:
    """Freed without a hash its content is gone: one life of 700 ms, no reuse, no idle time."""
    pool = BlockPool(4)
    pool.now = 1000
    blocks = pool.allocate(2)
    pool.now = 1700
    pool.free(blocks)
    ends = pool.take_ends()
    assert ends is not None
    assert (ends.lifetimes, ends.lifetime_seconds) == (((_bits(700), 2),), pytest.approx(1.4))
    assert (ends.reuses, ends.num_reuses, ends.idles) == (((0, 2),), 0, ())
    assert pool.take_ends() is None
    assert (pool.num_allocated, pool.num_reused, pool.num_evicted) == (2, 0, 0)


def test_a_cached_block_lives_until_it_is_evicted() -> None:
    """Found three times, idle for the last 5 s: its life is told when another takes the block, not when its first owner leaves."""
    pool = BlockPool(1)
    pool.now = 0
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    pool.free([block])
    assert pool.take_ends() is None
    for at in (100, 200, 1000):
        pool.now = at
        pool.share(pool.lookup([b"key"]))
        pool.free([block])
    assert (pool.num_findable, pool.num_cached) == (1, 1)
    pool.now = 6000
    pool.allocate(1)
    ends = pool.take_ends()
    assert ends is not None
    assert (ends.lifetimes, ends.lifetime_seconds) == (((_bits(6000), 1),), 6.0)
    assert (ends.idles, ends.idle_seconds) == (((_bits(5000), 1),), 5.0)
    assert (ends.reuses, ends.num_reuses) == (((_bits(3), 1),), 3)
    assert (pool.num_reused, pool.num_evicted, pool.num_findable) == (3, 1, 0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0, 1]))
def test_the_sums_of_all_reports_are_the_engines_work(seed: int, depth: int) -> None:
    """Over any run: chunks are the prefill tokens, every block handed out ended or is still cached, the backlog ends at zero."""
    chance = random.Random(seed)
    driver = make_driver(depth=depth, num_blocks=24)
    num_sequences = chance.randrange(1, 12)
    for number in range(num_sequences):
        driver.submit(number, _prompt(chance.randrange(1, 60), chance.randrange(3)), max_tokens=chance.randrange(1, 12))
        if chance.random() < 0.3:
            driver.step()
        if chance.random() < 0.1:
            driver.engine.abort(Abort(chance.randrange(number + 1)))
    driver.run()
    pool = driver.engine.pool
    for stats in driver.stats:
        assert sum(length for _, _, length, _ in stats.chunks) == stats.num_prefill_tokens
        assert stats.num_sampled_tokens == stats.num_decode_tokens + sum(final for *_, final in stats.chunks)
        assert stats.num_context_tokens >= 2 * stats.num_decode_tokens
        assert (stats.busy_seconds > 0) == (stats.num_sequences > 0)
    assert driver.stats[-1].num_backlog_tokens == 0
    assert sum(stats.num_allocated_blocks for stats in driver.stats) == pool.num_allocated
    ended = sum(count for stats in driver.stats if stats.block_ends for _, count in stats.block_ends.lifetimes)
    assert ended == pool.num_allocated - pool.num_cached
    evicted = sum(count for stats in driver.stats if stats.block_ends for _, count in stats.block_ends.idles)
    assert evicted == pool.num_evicted == sum(stats.num_evicted_blocks for stats in driver.stats)


def test_the_backlog_is_what_waits_and_what_is_left_of_prompts() -> None:
    """Three prompts of 40 at 32 tokens a step: 120 less what was computed, until none is left."""
    driver = make_driver()
    for number in range(3):
        driver.submit(number, _prompt(40, number), max_tokens=4)
    seen = []
    while driver.engine.has_work:
        driver.step()
        seen.append(driver.stats[-1].num_backlog_tokens)
    computed = [sum(stats.num_prefill_tokens for stats in driver.stats[: index + 1]) for index in range(len(seen))]
    assert seen == [120 - done for done in computed]
    assert seen[0] == 88


def test_decodes_report_their_contexts() -> None:
    """A sequence of 10 prompt tokens attends to 11, 12, 13 positions in its three decodes."""
    driver: Driver = make_driver()
    driver.submit(1, _prompt(10), max_tokens=4)
    driver.run()
    assert [stats.num_context_tokens for stats in driver.stats if stats.num_decode_tokens] == [11, 12, 13]
    (chunk,) = [chunk for stats in driver.stats for chunk in stats.chunks]
    assert chunk == (1, 0, 10, True)


def test_free_memory_is_read_now_and_then() -> None:
    """The driver is asked once a second, not at every step; what it said goes with each report."""
    answers = iter([111, 222])
    driver: Driver = make_driver()
    driver.engine._read_free_bytes = lambda: next(answers)
    driver.submit(1, _prompt(10), max_tokens=6)
    driver.run()
    assert len(driver.stats) > 3
    assert {stats.free_bytes for stats in driver.stats} == {111}
