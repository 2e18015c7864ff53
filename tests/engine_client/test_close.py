"""The end of the supervisor: no process, descriptor, task or handler is left behind, whenever it comes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from engine_harness import FAST, Harness, collect, eventually, gone, harness, request

from appliance.errors import Unavailable


def open_descriptors() -> set[str]:
    """What this process has open, by target; a listing's own descriptor aside."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nothing_is_left_after_crashes_and_close(tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """After three crashes and a close there is no process, no descriptor and no task that was not there before."""

    async def live() -> None:
        warm_up = tmp_path / "warm_up"
        warm_up.mkdir()
        async with harness(warm_up, {}):
            pass  # libuv opens one descriptor for the loop's life with its first socket
        before = open_descriptors()
        script = {"lives": [{"after_tokens": 5}, {"after_tokens": 5, "then": "close"}, {"then_at_load": True}]}
        async with harness(tmp_path, script) as h:
            await collect(h.engine.submit(request(1)))
        await asyncio.sleep(0)
        assert all(gone(pid) for pid in h.pids())
        assert len(h.pids()) == 4
        assert open_descriptors() == before
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(live())


async def test_open_generations_end_with_unavailable(tmp_path: Path) -> None:
    """Running and waiting handlers are released at once, each with one 503, and later submissions get one too."""
    async with harness(tmp_path, {"rest": {"max_num_seqs": 1, "step_seconds": 0.01}}) as h:
        tasks = [asyncio.create_task(collect(h.engine.submit(request(i, 1000)))) for i in (1, 2)]
        await asyncio.sleep(0.05)
        await h.engine.close()
        for collected in await asyncio.gather(*tasks):
            assert isinstance(collected.error, Unavailable)
        with pytest.raises(Unavailable, match="shutting down"):
            h.engine.submit(request(3))
        assert h.engine.num_in_flight == 0


async def test_an_engine_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    """An engine that ignores the end of its socket gets SIGKILL after the limit, and close returns then."""
    limits = dataclasses.replace(FAST, close=0.3)
    async with harness(tmp_path, {"rest": {"no_eof": True}}, limits=limits) as h:
        began = time.monotonic()
        await h.engine.close()
        assert 0.3 <= time.monotonic() - began < 2.0
        assert gone(h.pids()[0])
        assert h.observer.of("stopped").detail == "killed by SIGKILL"


@pytest.mark.parametrize("moment", ["before start", "at start", "loading", "backing off", "failed"])
async def test_close_comes_at_any_moment(tmp_path: Path, moment: str) -> None:
    """Before the first spawn, during a load, in a backoff or after a failure: close returns soon, twice, and leaves no process."""
    rest = {"failed": {"fail": ["no", True]}, "backing off": {"exit": 1}}.get(moment, {"load_seconds": 60})
    limits = dataclasses.replace(FAST, close=0.2, first_backoff=30.0, max_backoff=30.0)
    h = Harness(tmp_path, {"rest": rest}, limits=limits)
    if moment != "before start":
        await h.engine.start()
    if moment in ("loading", "backing off", "failed"):
        await h.until({"loading": "started", "backing off": "crashed", "failed": "failed"}[moment])
    if moment == "loading":
        await asyncio.sleep(0.15)
    async with asyncio.timeout(3.0):
        await h.engine.close()
        await h.engine.close()
    assert h.engine.state == ("failed" if moment == "failed" else "stopped")
    if h.script_path.with_suffix(".lives").exists():
        assert all(gone(pid) for pid in h.pids())


async def test_those_who_wait_for_readiness_are_released(tmp_path: Path) -> None:
    """wait_ready ends with an error when the engine is stopped before it was ready."""
    async with harness(tmp_path, {"rest": {"load_seconds": 60, "no_eof": True}}, ready=False, limits=dataclasses.replace(FAST, close=0.1)) as h:
        task = asyncio.create_task(h.engine.wait_ready())
        await h.until("started")
        await h.engine.close()
        with pytest.raises(Exception, match="stopped"):
            await task


async def test_what_the_engine_has_spawned_goes_with_it(tmp_path: Path) -> None:
    """Processes of the engine's group, such as compilers, do not outlive it, nor does their hold on stderr delay anything."""
    async with harness(tmp_path, {"rest": {"leave_child": True}}) as h:
        grandchild = int(h.stderr.split()[0])
        assert not gone(grandchild)
        os.kill(h.pids()[0], signal.SIGKILL)
        await h.until("restarting")
        await eventually(lambda: gone(grandchild) or Path(f"/proc/{grandchild}/stat").read_text().split()[2] == "Z")
