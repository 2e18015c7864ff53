"""Crashes of real processes under streams: no token lost, none twice, one end each."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from engine_harness import Collected, Harness, collect, eventually, harness, request
from fake_engine import expected_tokens

from appliance.clock import SystemClock
from appliance.errors import DeadlineExceeded, EngineFailed, Unavailable


def tokens_of(first: int, num_tokens: int) -> list[int]:
    """The first tokens of `request(first)`."""
    return expected_tokens([first, 5, 7, 11], first * 31, num_tokens)


def random_script(draw: random.Random) -> dict[str, Any]:
    """Two to four lives that end early, in any way, at any token."""
    lives = []
    for _ in range(draw.randint(2, 4)):
        then = draw.choice(["kill", "exit", "garbage", "half_frame", "close"])
        lives.append({"after_tokens": draw.randint(0, 120), "then": then, "max_num_seqs": draw.choice([3, 64]), "announce": draw.random() < 0.5})
    return {"lives": lives}


async def _client(h: Harness, draw: random.Random, first: int) -> tuple[int, int, Collected]:
    """One request after a while; some leave early, some finish at a stop string."""
    await asyncio.sleep(draw.random() * 0.15)
    num_tokens = draw.randint(1, 60)
    generation = h.engine.submit(request(first, num_tokens))
    behaviour, limit = draw.choice(["read", "read", "read", "abort", "finish"]), draw.randint(0, num_tokens)
    collected = Collected()
    async with asyncio.timeout(20.0):
        while not collected.add(await generation.next()):
            if behaviour != "read" and len(collected.token_ids) >= limit:
                generation.abort() if behaviour == "abort" else generation.finish(len(collected.token_ids))
    return first, num_tokens, collected


async def _random_crashes(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    async with harness(folder, random_script(draw), max_restarts=10) as h:
        results = await asyncio.gather(*(_client(h, draw, first) for first in range(1, 16)))
        for first, num_tokens, collected in results:
            assert collected.error is None
            expected = tokens_of(first, num_tokens)
            assert collected.token_ids == expected[: len(collected.token_ids)]
            assert collected.finish_reason in ("length", "abort", "finish")
            assert collected.finish_reason != "length" or collected.token_ids == expected
            unresumed = collected.kinds().count("engine_restart") - collected.kinds().count("resumed")
            assert unresumed == 0 or (unresumed == 1 and collected.finish_reason != "length")
        assert h.engine.num_in_flight == 0
        assert (await collect(h.engine.submit(request(99)))).token_ids == tokens_of(99, 20)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("seed", range(6))
def test_random_crashes_lose_and_double_nothing(tmp_path: Path, seed: int, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Fifteen clients, some leaving early, over two to four crashes: what each has read is what an uncrashed engine would have said."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_random_crashes(tmp_path, seed))


async def test_sigkill_in_mid_stream(tmp_path: Path) -> None:
    """SIGKILL from outside while tokens flow: every stream goes on where it was."""
    async with harness(tmp_path, {}) as h:
        tasks = [asyncio.create_task(collect(h.engine.submit(request(i, 150)))) for i in range(1, 9)]
        await eventually(lambda: h.observer.num_steps >= 40)
        os.kill(h.pids()[0], signal.SIGKILL)
        for first, collected in enumerate(await asyncio.gather(*tasks), 1):
            assert (collected.token_ids, collected.finish_reason) == (tokens_of(first, 150), "length")
            assert collected.kinds().count("engine_restart") == 1
        resumed = [outputs for life, _, outputs, _ in h.submits() if life == 1]
        assert min(resumed) >= 30, "they are resumed, not begun again"


async def test_deadlines_hold_while_the_engine_is_down(tmp_path: Path) -> None:
    """A deadline that passes during a restart ends its sequence in time; one without is resumed."""
    async with harness(tmp_path, {"lives": [{"after_tokens": 10}, {"load_seconds": 2.0}]}) as h:
        clock = SystemClock()
        deadline = clock.monotonic() + 0.5
        hurried, patient = h.engine.submit(request(1, deadline_at=deadline)), h.engine.submit(request(2))
        collected = await collect(hurried)
        late = clock.monotonic() - deadline
        assert isinstance(collected.error, DeadlineExceeded)
        assert 0.0 <= late < 1.0
        assert h.engine.state == "restarting"
        assert collected.token_ids == tokens_of(1, len(collected.token_ids))
        assert (await collect(patient)).token_ids == tokens_of(2, 20)
        assert [first for life, first, _, _ in h.submits() if life == 1] == [2]


async def test_submissions_wait_for_a_restart_within_limits(tmp_path: Path) -> None:
    """While the engine restarts, submit accepts up to max_waiting and refuses more with Retry-After; the accepted ones are served."""
    async with harness(tmp_path, {"lives": [{}, {"load_seconds": 0.3}]}, max_waiting=3) as h:
        os.kill(h.pids()[0], signal.SIGKILL)
        await h.until("crashed")
        generations = [h.engine.submit(request(i)) for i in range(1, 4)]
        with pytest.raises(Unavailable) as refused:
            h.engine.submit(request(4))
        assert refused.value.retry_after_seconds is not None
        for first, generation in enumerate(generations, 1):
            collected = await collect(generation)
            assert collected.token_ids == tokens_of(first, 20)
            assert collected.kinds()[:3] == ["engine_restart", "resumed", "queued"]


@pytest.mark.parametrize("announce", [True, False])
@pytest.mark.parametrize("poison_at", [0, 7])
async def test_a_poisoned_request_fails_alone(tmp_path: Path, announce: bool, poison_at: int) -> None:
    """A request that kills the engine, in its prefill or later, gets 500 at the third crash; the others lose nothing."""
    life = {"poison": 66, "poison_at": poison_at, "announce": announce, "then": "exit"}
    async with harness(tmp_path, {"rest": life}) as h:
        innocent = [asyncio.create_task(collect(h.engine.submit(request(i, 60)))) for i in (1, 2, 3)]
        await asyncio.sleep(0.01)
        collected = await collect(h.engine.submit(request(66, 60)))
        assert isinstance(collected.error, EngineFailed)
        assert "illegal memory access" in str(collected.error)
        assert collected.token_ids == tokens_of(66, poison_at)
        for first, other in enumerate(await asyncio.gather(*innocent), 1):
            assert (other.token_ids, other.finish_reason) == (tokens_of(first, 60), "length")
        assert h.observer.kinds().count("crashed") == 3
        assert h.engine.state == "ready"
        poison_submits = [alone for _, first, _, alone in h.submits() if first == 66]
        assert poison_submits == [False, False, True]


async def test_poisoned_requests_one_after_another_do_not_end_the_node(tmp_path: Path) -> None:
    """Crashes that a convicted request explains do not use up the restarts, as long as other requests are served."""
    async with harness(tmp_path, {"rest": {"poison": 66}}, max_restarts=5) as h:
        for first in range(1, 4):
            served, poisoned = await asyncio.gather(*(collect(h.engine.submit(request(i))) for i in (first, 66)))
            assert isinstance(poisoned.error, EngineFailed)
            assert served.token_ids == tokens_of(first, 20)
        assert h.observer.kinds().count("crashed") == 9
        assert h.engine.state == "ready"


async def test_an_engine_that_dies_of_everything_is_given_up(tmp_path: Path) -> None:
    """If no request is ever served, convictions do not excuse the engine: it fails after max_restarts."""
    async with harness(tmp_path, {"rest": {"after_tokens": 0}}, max_restarts=5) as h:
        results = await asyncio.gather(*(collect(h.engine.submit(request(i))) for i in range(1, 5)))
        assert all(isinstance(collected.error, EngineFailed) for collected in results)
        assert h.engine.state == "failed"
        assert len(h.pids()) == 6


async def test_a_third_crash_without_guilt_costs_nothing(tmp_path: Path) -> None:
    """Four crashes for reasons of its own never end a stream: whoever survives alone is cleared."""
    async with harness(tmp_path, {}, max_restarts=10) as h:
        task = asyncio.create_task(collect(h.engine.submit(request(1, 400))))
        for life in range(4):
            seen = h.observer.num_steps
            await eventually(lambda seen=seen: h.observer.num_steps >= seen + 15)  # type: ignore[misc]
            os.kill(h.pids()[-1], signal.SIGKILL)
            await eventually(lambda life=life: len(h.pids()) > life + 1)  # type: ignore[misc]
        collected = await task
        assert (collected.token_ids, collected.finish_reason) == (tokens_of(1, 400), "length")
