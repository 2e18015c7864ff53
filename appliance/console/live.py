"""The machine once a second, for as long as anyone looks: no viewer, no work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from appliance.clock import Clock
from appliance.errors import Unavailable
from appliance.metrics.hardware import HardwareReading
from appliance.metrics.live import EngineView
from appliance.metrics.recorder import Recorder
from appliance.metrics.sampler import Sampler

MAX_VIEWERS = 64
_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
Frames = asyncio.Queue[bytes | None]


class LiveFeed:
    """Publishes one JSON frame a period to all viewers. One task, which runs while there is a viewer; one event loop."""

    def __init__(
        self,
        recorder: Recorder,
        engine: EngineView,
        *,
        clock: Clock,
        hardware: Callable[[], HardwareReading | None] = lambda: None,
        scaling: Callable[[], dict[str, Any] | None] = lambda: None,
        period_seconds: float = 1.0,
    ) -> None:
        self._recorder = recorder
        self._engine = engine
        self._clock = clock
        self._hardware = hardware
        self._scaling = scaling
        self._period = period_seconds
        self._started = clock.monotonic()
        self._viewers: set[Frames] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Frames]:
        """A queue of frames for the length of the block; None is the last one. A viewer that does not keep up misses frames. Raises Unavailable."""
        if self._closed or len(self._viewers) >= MAX_VIEWERS:
            raise Unavailable(f"{len(self._viewers)} viewers already watch" if not self._closed else "the server is stopping", retry_after_seconds=5)
        frames: Frames = asyncio.Queue(maxsize=2)
        frames.put_nowait(_encode(self.frame(None)))  # at once what is known without a period to measure over
        self._viewers.add(frames)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield frames
        finally:
            self._viewers.discard(frames)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = None

    def frame(self, sampler: Sampler | None) -> dict[str, Any]:
        """The machine now; with a `sampler`, also what happened since its last call."""
        snapshot = self._recorder.snapshot()
        hardware = self._hardware()
        return {
            "at_wall": snapshot.at_wall,
            "uptime_seconds": self._clock.monotonic() - self._started,
            "engine": self._engine_json(),
            "fast": snapshot.fast,
            "slow": snapshot.slow,
            "num_running": snapshot.num_running,
            "num_waiting": snapshot.num_waiting,
            "oldest_waiting_age_seconds": snapshot.oldest_waiting_age_seconds,
            "predicted_ttft_seconds": self._recorder.predicted_ttft_seconds(snapshot.at),
            "sample": None if sampler is None else sampler.take(hardware),
            "hardware": None if hardware is None else _hardware_json(hardware),
            "scaling": self._scaling(),
        }

    async def close(self) -> None:
        """End every viewer's queue."""
        self._closed = True
        for frames in self._viewers:
            _put(frames, None)

    def _engine_json(self) -> dict[str, Any]:
        engine = self._engine
        heartbeat = None if engine.heartbeat is None else msgspec.to_builtins(engine.heartbeat)
        if heartbeat is not None:
            heartbeat["phase_seconds"] = self._clock.monotonic() - heartbeat["phase_started_at"]
        return {"state": engine.state, "num_in_flight": engine.num_in_flight, "heartbeat": heartbeat, "ready": engine.ready}

    async def _run(self) -> None:
        sampler = Sampler(self._recorder)
        try:
            while True:
                await asyncio.sleep(self._period)
                frame = _encode(self.frame(sampler))
                for frames in self._viewers:
                    _put(frames, frame)
        except Exception:  # of a frame that cannot be made: viewers are let go and may come back, rather than wait for ever
            _log.exception("the console's live feed failed")
            self._task = None
            for frames in self._viewers:
                _put(frames, None)


def _put(frames: Frames, frame: bytes | None) -> None:
    if frames.full():
        frames.get_nowait()
    frames.put_nowait(frame)


def _hardware_json(reading: HardwareReading) -> dict[str, Any]:
    return {
        "num_cpus": reading.num_cpus,
        "memory_bytes": reading.memory_bytes,
        "disk_free_bytes": reading.disk_free_bytes,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "throttle_reasons": sorted(gpu.throttle_reasons),
                "num_xid_errors": gpu.num_xid_errors,
            }
            for gpu in reading.gpus
        ],
    }
