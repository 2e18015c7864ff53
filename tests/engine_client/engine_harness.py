"""What the tests of the engine client share: a scripted engine behind the real supervisor, and an observer that remembers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from appliance.clock import Clock, SystemClock
from appliance.engine.client import Delta, Generation, SequenceRequest
from appliance.engine.supervisor import SupervisedEngine, SupervisorLimits
from appliance.engine.wire import Sampling, SequenceEvent, Start, TokenLogprobs
from appliance.events import EngineEvent, StepStats

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
FAST = SupervisorLimits(first_backoff=0.01, max_backoff=0.05, watch_interval=0.02, close=2.0)


class RecordingObserver:
    """Remembers all it is told."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.gaps: list[tuple[float, int]] = []
        self.num_steps = 0
        self.changed = asyncio.Event()

    def on_step(self, stats: StepStats, gaps: Sequence[tuple[float, int]]) -> None:
        self.num_steps += 1
        self.gaps.extend(gaps)

    def on_engine_event(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.changed.set()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def of(self, kind: str) -> EngineEvent:
        return next(event for event in self.events if event.kind == kind)


@dataclasses.dataclass
class Collected:
    """A generation taken to its end."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    token_times: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    events: list[SequenceEvent] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    num_ends: int = 0

    def add(self, delta: Delta) -> bool:
        """Take one delta; True if it was the end."""
        assert len(delta.token_ids) == len(delta.token_times)
        self.token_ids += delta.token_ids
        self.token_times += delta.token_times
        self.logprobs += delta.logprobs or []
        self.events += delta.events
        self.finish_reason, self.error = delta.finish_reason, delta.error
        return delta.finish_reason is not None or delta.error is not None

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


async def collect(generation: Generation, *, limit_seconds: float = 20.0) -> Collected:
    """All of a generation. Fails if it takes longer than `limit_seconds`."""
    collected = Collected()
    async with asyncio.timeout(limit_seconds):
        while not collected.add(await generation.next()):
            pass
    return collected


async def eventually(condition: Callable[[], bool], *, limit_seconds: float = 10.0) -> None:
    """Wait for what has no event of its own. Fails if it takes longer than `limit_seconds`."""
    async with asyncio.timeout(limit_seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def gone(pid: int) -> bool:
    """Whether no such process is left, not even as a zombie."""
    return not os.path.exists(f"/proc/{pid}")


def request(first: int, max_tokens: int = 20, **fields: Any) -> SequenceRequest:
    """A request whose prompt starts with `first`."""
    sampling = Sampling(max_tokens=max_tokens, seed=first * 31, **fields.pop("sampling", {}))
    return SequenceRequest(prompt_ids=[first, 5, 7, 11], sampling=sampling, **fields)


class Harness:
    """A supervised fake engine and its records."""

    def __init__(
        self,
        folder: Path,
        script: dict[str, Any],
        *,
        clock: Clock | None = None,
        limits: SupervisorLimits = FAST,
        max_restarts: int = 5,
        **start: Any,
    ) -> None:
        self.script_path = folder / "script.json"
        self.script_path.write_text(json.dumps(script))
        self.observer = RecordingObserver()
        self.stderr = bytearray()
        command = (sys.executable, "-P", str(FAKE_ENGINE), "--script", str(self.script_path))
        frame = Start(**{"model_path": "fake", "cache_dir": str(folder), **start})
        self.engine = SupervisedEngine(
            frame,
            clock=clock or SystemClock(),
            observer=self.observer,
            command=command,
            max_restarts=max_restarts,
            limits=limits,
            pass_on_stderr=self.stderr.extend,
        )

    def submits(self) -> list[tuple[int, int, int, bool]]:
        """(life, first prompt id, number of outputs resumed with, alone) of each Submit that an engine received."""
        path = self.script_path.with_suffix(".submits")
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def pids(self) -> list[int]:
        """Of all engine processes so far."""
        return [int(line) for line in self.script_path.with_suffix(".lives").read_text().split()]

    async def until(self, kind: str, seconds: float = 10.0) -> EngineEvent:
        """Wait for an engine event."""
        async with asyncio.timeout(seconds):
            while kind not in self.observer.kinds():
                self.observer.changed.clear()
                await self.observer.changed.wait()
        return self.observer.of(kind)


@asynccontextmanager
async def harness(folder: Path, script: dict[str, Any], *, ready: bool = True, **options: Any) -> AsyncIterator[Harness]:
    """A started harness, ready unless told otherwise; closed at the end."""
    running = Harness(folder, script, **options)
    await running.engine.start()
    try:
        if ready:
            await running.engine.wait_ready(10.0)
        yield running
    finally:
        await running.engine.close()
