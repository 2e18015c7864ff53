"""The step loop over a simulated device that checks every context it reads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from engine_driver import Driver, make_driver
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runner import VOCAB_SIZE, expected_output

from appliance.engine.wire import Abort, Finish, Rejected

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


@DEPTHS
def test_every_sequence_gets_the_tokens_of_its_context_alone(depth: int) -> None:
    """Batched, chunked and mixed: each output is what the sequence would have had by itself."""
    driver, rng = make_driver(depth=depth), random.Random(1)
    wanted = {}
    for sequence_id in range(20):
        prompt, num = prompt_of(rng, rng.randint(1, 70)), rng.randint(1, 30)
        driver.submit(sequence_id, prompt, max_tokens=num)
        wanted[sequence_id] = expected_output(prompt, sequence_id, num)
    driver.run()
    assert driver.outputs == wanted
    assert set(driver.ends.values()) == {"length"}
    assert driver.runner.largest_step <= 32


@DEPTHS
def test_a_tiny_pool_preempts_and_still_gives_the_same_tokens(depth: int) -> None:
    """With blocks for two sequences and eight running, the newest are recomputed, and nothing shows in the outputs."""
    driver, rng = make_driver(depth=depth, num_blocks=24, context_length=96), random.Random(2)
    wanted = {}
    for sequence_id in range(12):
        prompt = prompt_of(rng, rng.randint(5, 40))
        driver.submit(sequence_id, prompt, max_tokens=40)
        wanted[sequence_id] = expected_output(prompt, sequence_id, 40)
    driver.run()
    assert driver.outputs == wanted
    assert sum(stats.num_preemptions for stats in driver.stats) > 0
    assert any(event.kind == "preempted" for event in driver.events)
    assert any(event.kind == "resumed" for event in driver.events)


@DEPTHS
def test_a_shared_prefix_is_computed_once(depth: int) -> None:
    """The second sequence of a common prefix takes its blocks from the cache, all but the last token's."""
    driver = make_driver(depth=depth)
    prompt = prompt_of(random.Random(3), 40)
    driver.submit(1, prompt, max_tokens=2)
    driver.run()
    before = driver.runner.num_computed_tokens
    driver.submit(2, prompt, max_tokens=2, seed=1)
    driver.run()
    assert driver.outputs[1] == driver.outputs[2]
    assert driver.runner.num_computed_tokens - before == 4 + 1  # 36 of 40 tokens lie in full blocks before the last token; one decode
    assert sum(stats.prefix_hit_tokens for stats in driver.stats) == 36
    (event,) = [event for event in driver.events if event.sequence_id == 2 and event.kind == "scheduled"]
    assert event.value == 36


def test_chunks_fill_the_sizes_that_graphs_replay() -> None:
    """With sizes given, a step's prompt tokens make up one of them as long as enough prompt is left."""
    driver, rng = make_driver(chunk_token_sizes=(4, 10, 24), max_num_batched_tokens=30), random.Random(6)
    prompts = [prompt_of(rng, 50) for _ in range(4)]
    for sequence_id, prompt in enumerate(prompts):
        driver.submit(sequence_id, prompt, max_tokens=3)
    driver.run()
    assert driver.outputs == {index: expected_output(prompt, index, 3) for index, prompt in enumerate(prompts)}
    sizes = [stats.num_prefill_tokens for stats in driver.stats if stats.num_prefill_tokens]
    assert set(sizes[:-1]) <= {4, 10, 24}
    assert sizes[0] == 24


def test_a_cache_salt_keeps_prefixes_apart() -> None:
    """Equal prompts under different salts share nothing."""
    driver = make_driver()
    prompt = prompt_of(random.Random(4), 40)
    for sequence_id, salt in enumerate(["", "a", "b"]):
        driver.submit(sequence_id, prompt, cache_salt=salt)
        driver.run()
    assert sum(stats.prefix_hit_tokens for stats in driver.stats) == 0


@DEPTHS
def test_a_stop_token_ends_a_sequence_and_what_ran_beyond_is_surplus(depth: int) -> None:
    """The stop token is reported, nothing after it; with a step in flight one token is discarded and counted."""
    driver = make_driver(depth=depth)
    output = expected_output([1, 2, 3], 9, 20)
    stop = next(token for token in output[3:] if token not in output[:3])
    driver.submit(9, [1, 2, 3], max_tokens=20, stop_token_ids=(stop,))
    driver.run()
    assert driver.outputs[9] == expected_output([1, 2, 3], 9, 20, (stop,))
    assert driver.ends == {9: "stop"}
    assert sum(stats.num_surplus_tokens for stats in driver.stats) == (1 if depth and len(driver.outputs[9]) < 20 else 0)


@DEPTHS
def test_an_aborted_sequence_is_out_by_the_second_step_and_its_blocks_return(depth: int) -> None:
    """Two steps after an abort no batch holds the sequence, and its blocks are free."""
    driver = make_driver(depth=depth)
    driver.submit(1, [1] * 10, max_tokens=100)
    driver.submit(2, [2] * 10, max_tokens=100)
    for _ in range(6):
        driver.step()
    used = driver.engine.pool.num_used
    driver.engine.abort(Abort(1))
    driver.engine.abort(Abort(1))
    driver.engine.abort(Abort(77))
    driver.step()
    driver.step()
    assert driver.ends == {1: "abort"}
    assert driver.stats[-1].num_sequences == 1
    assert driver.engine.pool.num_used < used
    assert sum(stats.num_aborted for stats in driver.stats) == 1
    driver.run()


def test_finish_discards_what_lies_beyond_the_stop_string() -> None:
    """The server's Finish ends the sequence once; the tokens after it count as surplus."""
    driver = make_driver()
    driver.submit(1, [1] * 4, max_tokens=50)
    for _ in range(6):
        driver.step()
    driver.engine.finish(Finish(1, 3))
    driver.run()
    assert driver.ends == {1: "finish"}
    assert sum(stats.num_surplus_tokens for stats in driver.stats) == len(driver.outputs[1]) - 3


def test_deadlines_end_running_and_waiting_sequences() -> None:
    """A deadline that has passed ends a sequence with its own reason; one far away changes nothing."""
    driver = make_driver(max_num_seqs=1)
    past, future = time.monotonic() - 1, time.monotonic() + 1000
    driver.submit(1, [1, 2], deadline_at=future)
    driver.submit(2, [1, 2], deadline_at=past)
    driver.run()
    assert driver.ends == {1: "length", 2: "deadline"}


def test_too_long_prompts_and_a_full_queue_are_rejected() -> None:
    """The reply names the reason; nothing is queued."""
    driver = make_driver(max_waiting=1)
    rejected = driver.submit(1, [1] * 128)
    assert isinstance(rejected, Rejected)
    assert rejected.code == "context_length_exceeded"
    assert driver.submit(2, [1]) is None
    rejected = driver.submit(3, [1])
    assert isinstance(rejected, Rejected)
    assert rejected.code == "queue_full"
    driver.run()
    assert driver.ends == {2: "length"}


def test_a_resumed_sequence_goes_on_behind_its_outputs() -> None:
    """Submitted with the outputs it had before a crash, it makes exactly the rest."""
    driver = make_driver()
    output = expected_output([5, 6], 3, 20)
    driver.submit(3, [5, 6], outputs=output[:7], max_tokens=20)
    driver.run()
    assert driver.outputs[3] == output[7:]


def test_a_suspect_runs_alone() -> None:
    """While a sequence marked alone runs, no other is in the batch."""
    driver = make_driver()
    driver.submit(1, [1] * 5)
    driver.submit(2, [2] * 5, alone=True)
    driver.submit(3, [3] * 5)
    driver.run()
    assert sorted(driver.ends) == [1, 2, 3]
    running: set[int] = set()
    for event in driver.events:
        if event.kind == "scheduled":
            running.add(event.sequence_id)
    assert running == {1, 2, 3}
    assert max(stats.num_sequences for stats in driver.stats) == 1


def test_keys_share_the_engine_whatever_their_queue_lengths() -> None:
    """A key with one request does not wait for another key's twenty."""
    driver = make_driver(max_num_seqs=1)
    for sequence_id in range(20):
        driver.submit(sequence_id, [1] * 8, key_id="greedy")
    driver.submit(100, [2] * 8, key_id="modest")
    driver.run()
    order = [event.sequence_id for event in driver.events if event.kind == "scheduled"]
    assert order.index(100) <= 2


def test_lower_priority_numbers_run_first() -> None:
    """Among those that wait, priority decides before age."""
    driver = make_driver(max_num_seqs=1)
    driver.submit(0, [1] * 4)
    driver.step()
    driver.submit(1, [1] * 4, priority=5)
    driver.submit(2, [1] * 4, priority=-5)
    driver.run()
    order = [event.sequence_id for event in driver.events if event.kind == "scheduled"]
    assert order == [0, 2, 1]


def test_kv_waste_stays_under_four_percent() -> None:
    """Slots of referenced blocks that hold no token, over a run of lengths 100-1,024 in and out with blocks of 16."""
    driver = make_driver(
        depth=1, num_blocks=1200, block_size=16, context_length=2100, max_num_seqs=16, max_num_batched_tokens=512, prefix_caching=False
    )
    driver.runner.launch = _launch_without_checks(driver)
    rng = random.Random(5)
    for sequence_id in range(24):
        driver.submit(sequence_id, prompt_of(rng, rng.randint(100, 1024)), max_tokens=rng.randint(100, 1024))
    for _ in range(20_000):
        if not driver.engine.has_work:
            break
        driver.step()
    slots = sum(stats.num_used_blocks for stats in driver.stats) * 16
    tokens = sum(stats.num_used_tokens for stats in driver.stats)
    assert 0 <= 1 - tokens / slots < 0.04


def _launch_without_checks(driver: Driver) -> Callable[..., object]:
    """The simulated launch in O(rows): this test reads sizes, not contents."""
    from appliance.engine.model_runner import LaunchedStep

    def launch(plan: object) -> LaunchedStep:
        sequences = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks if chunk.final)]
        return LaunchedStep(plan, sequences, [sequence.id for sequence in sequences], [], [1] * len(sequences), None, graph_hit=False)

    return launch


@settings(max_examples=60, deadline=None)
@given(data=st.data(), depth=st.integers(0, 1), num_blocks=st.integers(10, 40), caching=st.booleans())
def test_any_schedule_of_arrivals_aborts_and_finishes_keeps_the_contract(data: st.DataObject, depth: int, num_blocks: int, caching: bool) -> None:
    """Whatever arrives and leaves whenever: one end each, prefixes of the right tokens, a whole pool, an empty one at the end."""
    driver = make_driver(
        depth=depth,
        num_blocks=num_blocks,
        context_length=num_blocks * 4,
        prefix_caching=caching,
        max_num_batched_tokens=data.draw(st.integers(8, 40)),
    )
    wanted: dict[int, list[int]] = {}
    cut: set[int] = set()
    for sequence_id in range(data.draw(st.integers(1, 12))):
        prompt = [data.draw(st.integers(0, 2)) for _ in range(data.draw(st.integers(1, num_blocks * 2)))]
        num = data.draw(st.integers(1, 20))
        if driver.submit(sequence_id, prompt, max_tokens=num) is None:
            room = num_blocks * 4 - len(prompt)
            wanted[sequence_id] = expected_output(prompt, sequence_id, min(num, room))
        for _ in range(data.draw(st.integers(0, 4))):
            driver.step()
            driver.engine.pool.check_integrity()
        if wanted and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(sorted(wanted)))
            if victim not in driver.ends:
                cut.add(victim)
            driver.engine.abort(Abort(victim)) if data.draw(st.booleans()) else driver.engine.finish(Finish(victim, 0))
    driver.run()
    assert sorted(driver.ends) == sorted(wanted)
    for sequence_id, output in wanted.items():
        got = driver.outputs.get(sequence_id, [])
        assert got == (output[: len(got)] if sequence_id in cut else output)
