"""The supervisor with real processes: how they start, end, hang, are given up, and what others hear of it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_harness import FAST, Harness, collect, gone, harness, request
from fake_engine import expected_tokens

from appliance.clock import SystemClock
from appliance.engine.child import spawn
from appliance.engine.client import SequenceRequest
from appliance.engine.supervisor import SupervisedEngine
from appliance.engine.wire import Sampling, Start
from appliance.errors import ContextLengthExceeded, EngineFailed, Unavailable
from appliance.events import StepStats


def tokens_of(first: int, num_tokens: int) -> list[int]:
    """The first tokens of `request(first)`."""
    return expected_tokens([first, 5, 7, 11], first * 31, num_tokens)


async def test_an_engine_starts_serves_and_stops(tmp_path: Path) -> None:
    """From started over ready to stopped, each with the pid; tokens, steps and gaps arrive, and stderr passes through."""
    async with harness(tmp_path, {"rest": {"stderr": "hello from the engine"}}) as h:
        assert h.engine.state == "ready"
        assert h.engine.ready is not None
        assert h.engine.ready.device == "fake"
        collected = await collect(h.engine.submit(request(1, 10)))
        assert (collected.token_ids, collected.finish_reason) == (tokens_of(1, 10), "length")
        assert h.engine.heartbeat is not None
        assert sum(count for _, count in h.observer.gaps) == 9
        assert all(seconds >= 0 for seconds, _ in h.observer.gaps)  # steps that are read together arrive in one instant
        assert h.observer.num_steps >= 10
        assert h.stderr == b"hello from the engine\n"
    assert h.observer.kinds() == ["started", "ready", "stopped"]
    assert {event.pid for event in h.observer.events} == set(h.pids())
    assert h.engine.state == "stopped"


async def test_while_it_loads_requests_are_refused_with_a_time(tmp_path: Path) -> None:
    """Before the first ready engine submit raises Unavailable with Retry-After, and wait_ready's timeout names the phase."""
    async with harness(tmp_path, {"rest": {"load_seconds": 0.5}}, ready=False) as h:
        with pytest.raises(Unavailable) as refused:
            h.engine.submit(request(1))
        assert refused.value.code == "loading"
        assert refused.value.retry_after_seconds is not None
        with pytest.raises(TimeoutError, match="phase"):
            await h.engine.wait_ready(0.05)
        assert h.engine.state == "starting"
        await h.engine.wait_ready(5.0)


async def test_a_prompt_without_room_is_refused_at_once(tmp_path: Path) -> None:
    """A prompt that fills the context raises ContextLengthExceeded without asking the engine."""
    async with harness(tmp_path, {"rest": {"context_length": 4}}) as h:
        with pytest.raises(ContextLengthExceeded, match="4 tokens"):
            h.engine.submit(request(1))
        assert h.submits() == []


async def test_the_engines_rejections_arrive(tmp_path: Path) -> None:
    """Rejected by the engine, a sequence ends with the error of that code and the others go on."""
    async with harness(tmp_path, {"rest": {"reject": {"1": "context_length_exceeded", "2": "queue_full"}}}) as h:
        one, two, three = await asyncio.gather(*(collect(h.engine.submit(request(i))) for i in (1, 2, 3)))
        assert isinstance(one.error, ContextLengthExceeded)
        assert isinstance(two.error, Unavailable)
        assert three.token_ids == tokens_of(3, 20)
        assert h.engine.num_in_flight == 0


ENDS: list[tuple[dict[str, Any], str, str]] = [
    ({"then": "kill"}, "crashed", "killed by SIGKILL"),
    ({"then": "exit"}, "crashed", "exit code 3; its last words: RuntimeError: CUDA error: an illegal memory access"),
    ({"then": "garbage"}, "crashed", "broken frame"),
    ({"then": "half_frame"}, "crashed", "killed by SIGKILL"),
    ({"then": "close", "no_eof": True}, "crashed", "killed by SIGKILL"),
    ({"then": "hang", "deadline_seconds": 0.3}, "hung", "in its phase 'step', whose deadline is 0.3 s"),
    ({"then": "freeze"}, "hung", "no sign of life"),
]


@pytest.mark.parametrize(("life", "kind", "detail"), ENDS, ids=[life["then"] for life, _, _ in ENDS])
async def test_however_the_engine_ends_streams_go_on(tmp_path: Path, life: dict[str, Any], kind: str, detail: str) -> None:
    """Each way to end is noticed and named, the process is gone, and every stream has the tokens it would have had, once."""
    limits = dataclasses.replace(FAST, silence=0.8)
    async with harness(tmp_path, {"lives": [{"after_tokens": 17, **life}]}, limits=limits) as h:
        first_pid = h.engine.pid
        results = await asyncio.gather(*(collect(h.engine.submit(request(i))) for i in range(1, 5)))
        for first, collected in enumerate(results, 1):
            assert collected.token_ids == tokens_of(first, 20)
            assert collected.kinds() == ["scheduled", "prefilled", "engine_restart", "resumed"]
        event = h.observer.of(kind)
        assert detail in event.detail
        assert (event.pid, event.num_in_flight) == (first_pid, 4)
        assert h.observer.kinds() == ["started", "ready", kind, "restarting", "started", "ready"]
        assert first_pid is not None
        assert gone(first_pid)


async def test_the_event_says_the_engines_own_words(tmp_path: Path) -> None:
    """A Failure that a restart may cure is a crash with its message."""
    async with harness(tmp_path, {"lives": [{"fail": ["CUDA is busy", False]}]}) as h:
        assert "CUDA is busy" in h.observer.of("crashed").detail
        assert h.observer.kinds() == ["started", "crashed", "restarting", "started", "ready"]


async def test_a_permanent_failure_is_final(tmp_path: Path) -> None:
    """Failure(permanent) ends in state failed at once; wait_ready and submit raise EngineFailed with the engine's words."""
    async with harness(tmp_path, {"rest": {"fail": ["no such model: x.gguf", True]}}, ready=False) as h:
        with pytest.raises(EngineFailed, match=r"no such model: x\.gguf"):
            await h.engine.wait_ready(5.0)
        with pytest.raises(EngineFailed, match=r"no such model: x\.gguf"):
            h.engine.submit(request(1))
        assert h.engine.state == "failed"
        assert h.observer.kinds() == ["started", "crashed", "failed"]
        assert len(h.pids()) == 1


async def test_a_command_that_does_not_exist_fails_at_once(tmp_path: Path) -> None:
    """An engine that cannot be spawned is a failure with the reason, not a hang."""
    h = Harness(tmp_path, {})
    engine = SupervisedEngine(
        Start(model_path="x", cache_dir="x"), clock=SystemClock(), observer=h.observer, command=("/nonexistent/engine",), limits=FAST
    )
    await engine.start()
    with pytest.raises(EngineFailed, match="/nonexistent/engine"):
        await engine.wait_ready(5.0)
    await engine.close()
    assert h.observer.kinds() == ["crashed", "failed"]


async def test_too_many_restarts_are_given_up(tmp_path: Path) -> None:
    """After max_restarts within the window the state is failed, and open sequences end with the last crash's words."""
    script = {"lives": [{"after_tokens": 3}], "rest": {"then_at_load": True, "then": "exit"}}
    async with harness(tmp_path, script, max_restarts=2) as h:
        collected = await collect(h.engine.submit(request(1)))
        assert isinstance(collected.error, EngineFailed)
        assert "illegal memory access" in str(collected.error)
        assert collected.token_ids == tokens_of(1, len(collected.token_ids))
        assert (h.engine.state, h.engine.num_in_flight, len(h.pids())) == ("failed", 0, 3)
        with pytest.raises(EngineFailed):
            h.engine.submit(request(2))
    assert h.observer.kinds()[-1] == "failed"


async def test_old_crashes_are_forgotten(tmp_path: Path) -> None:
    """Crashes that lie further apart than the window never add up to a failure."""
    limits = dataclasses.replace(FAST, restart_window=0.2)
    async with harness(tmp_path, {}, limits=limits, max_restarts=1) as h:
        for _ in range(3):
            os.kill(h.pids()[-1], signal.SIGKILL)
            await h.until("restarting")
            h.observer.events.clear()
            await h.engine.wait_ready(5.0)
            await asyncio.sleep(0.25)
        assert h.engine.state == "ready"


async def test_a_slow_load_is_no_hang_but_a_stuck_one_is(tmp_path: Path) -> None:
    """While heartbeats come, a load may last until its phase's deadline, and no longer."""
    limits = dataclasses.replace(FAST, loading_silence=1.0, silence=1.0)
    script = {"lives": [{"load_seconds": 60, "load_deadline_seconds": 0.5}, {"load_seconds": 1.3}]}
    async with harness(tmp_path, script, limits=limits) as h:
        assert h.observer.kinds() == ["started", "hung", "restarting", "started", "ready"]
        assert "'load', whose deadline is 0.5 s" in h.observer.of("hung").detail


async def test_a_silent_start_is_a_hang(tmp_path: Path) -> None:
    """A process that never says anything is killed after the loading silence."""
    limits = dataclasses.replace(FAST, loading_silence=1.0)
    async with harness(tmp_path, {"lives": [{"heartbeat_seconds": 60, "load_seconds": 60}]}, limits=limits) as h:
        assert "no sign of life" in h.observer.of("hung").detail


async def test_steps_that_end_are_no_hang(tmp_path: Path) -> None:
    """Many steps, each within its deadline, are no hang though heartbeats are rarer than the deadline."""
    async with harness(tmp_path, {"rest": {"deadline_seconds": 0.5, "step_seconds": 0.04, "heartbeat_seconds": 0.9}}) as h:
        collected = await collect(h.engine.submit(request(1, 30)))
        assert collected.token_ids == tokens_of(1, 30)
    assert "hung" not in h.observer.kinds()


async def test_a_pause_of_the_machine_is_not_the_engines_fault(tmp_path: Path) -> None:
    """Server and engine stopped together for longer than every limit: the engine gets its time anew, and its stream goes on."""
    limits = dataclasses.replace(FAST, silence=0.9)
    async with harness(tmp_path, {"rest": {"deadline_seconds": 0.9, "step_seconds": 0.02}}, limits=limits) as h:
        generation = h.engine.submit(request(1))
        await generation.next()
        pid = h.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.3)  # noqa: ASYNC251 - to stop the loop is the test
        asyncio.get_running_loop().call_later(0.1, os.kill, pid, signal.SIGCONT)
        collected = await collect(generation)
        assert collected.finish_reason == "length"
    assert h.observer.kinds() == ["started", "ready", "stopped"]


async def test_a_faulty_observer_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An observer that raises is logged; the engine and its streams do not notice."""
    async with harness(tmp_path, {}) as h:

        def on_step(stats: StepStats, gaps: object) -> None:
            raise KeyError(stats.step)

        h.observer.on_step = on_step  # type: ignore[method-assign]
        assert (await collect(h.engine.submit(request(1, 5)))).token_ids == tokens_of(1, 5)
    assert "the observer failed on a step" in caplog.text
    assert "crashed" not in h.observer.kinds()


async def test_a_flood_of_long_prompts_waits_its_turn(tmp_path: Path) -> None:
    """Megabytes of prompts go out as the engine reads them: what is encoded but unsent stays bounded, and all are served."""
    async with harness(tmp_path, {"rest": {"context_length": 100_000, "step_seconds": 0.02}}) as h:
        prompt_ids = list(range(1, 60_001))
        sampling = Sampling(max_tokens=1, seed=1)
        generations = [h.engine.submit(SequenceRequest(prompt_ids=prompt_ids, sampling=sampling)) for _ in range(24)]
        connection = h.engine._connection
        assert connection is not None
        assert sum(map(len, connection._pending)) < 2 * len(prompt_ids) * 4 + 1_100_000
        assert not connection.writable
        for generation in generations:
            assert (await collect(generation)).token_ids == expected_tokens(prompt_ids, 1, 1)


async def test_an_empty_server_restarts_its_engine_too(tmp_path: Path) -> None:
    """A crash without any request is repaired before the next one comes."""
    async with harness(tmp_path, {}) as h:
        os.kill(h.pids()[0], signal.SIGKILL)
        await h.until("crashed")
        await h.engine.wait_ready(5.0)
        assert (await collect(h.engine.submit(request(1)))).token_ids == tokens_of(1, 20)


async def test_a_terminals_interrupt_does_not_reach_the_engine(tmp_path: Path) -> None:
    """The engine leads a session of its own."""
    async with harness(tmp_path, {}) as h:
        assert h.engine.pid is not None
        assert os.getsid(h.engine.pid) == h.engine.pid != os.getsid(0)


def test_the_kernel_ends_an_engine_whose_server_is_killed() -> None:
    """A process that called die_with_parent is gone once its parent got SIGKILL, though it reads no socket."""
    child = "from appliance.engine.child import die_with_parent; import time; die_with_parent(); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        pid = int((lines - {"up"}).pop())
        process.kill()
        process.stdout.read()  # until the last one that holds the pipe, the child, is gone
    deadline = time.monotonic() + 5.0
    while os.path.exists(f"/proc/{pid}") and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


def test_the_server_side_needs_no_torch() -> None:
    """Importing the client loads neither torch nor transformers nor numpy."""
    code = "import sys, appliance.engine.supervisor; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("told", "found"), [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.check=3", "glibc.malloc.check=3")])
def test_the_engines_malloc_asks_for_huge_pages(told: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the operator has tuned glibc himself; the rest of the environment goes over as it is."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("OF_THE_OPERATOR", "kept")
    if told is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", told)
    spawned = spawn((sys.executable, "-c", "import os; print(os.environ['GLIBC_TUNABLES'], os.environ['OF_THE_OPERATOR'])"))
    with open(spawned.stderr) as output, spawned.socket:
        assert output.read() == f"{found} kept\n"
    assert spawned.process.wait(20) == 0
