"""The `EngineClient`: starts the engine process, watches and restarts it, and keeps every open sequence alive across its crashes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appliance.clock import Clock
from appliance.engine.child import ENGINE_COMMAND, Child, Spawned, write_stderr
from appliance.engine.client import EngineObserver, Generation, SequenceRequest
from appliance.engine.connection import EngineConnection
from appliance.engine.replay import SequenceTable
from appliance.engine.wire import Events, Failure, FromEngine, Heartbeat, Ready, Rejected, Start, StepOutput
from appliance.errors import ContextLengthExceeded, EngineFailed, Unavailable
from appliance.events import EngineEvent, StepStats

_logger = logging.getLogger(__name__)
_EOF_SECONDS = 0.25  # a dead process's last frames (a Failure, say) are read before its exit counts; its socket ends at once unless it leaked
_LEAVE_SECONDS = 1.0  # for an engine that said why it goes, or closed its socket, to end by itself and write its last words


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Times of the supervision, in seconds.

    A silent engine counts as hung after `silence` while it serves and `loading_silence` before. Heartbeats come once a second from a thread of
    their own, but that thread needs the GIL and a core: on 2 loaded cores a second's delay is common, and loading CUDA's libraries from a cold
    disk holds the GIL for many. A false alarm costs a restart and the recomputation of every open sequence, a late one only the difference, so
    both limits are well above what is normal. A stuck step is found by its own deadline, whatever the heartbeats say.
    """

    restart_window: float = 600.0
    first_backoff: float = 0.1
    max_backoff: float = 5.0
    silence: float = 10.0
    loading_silence: float = 30.0
    watch_interval: float = 0.1
    close: float = 5.0


@dataclass(frozen=True, slots=True)
class _End:
    """How one life of the engine process ended."""

    kind: str  # crashed, hung, stopped: an EngineEvent's
    detail: str | None = None  # None: what its exit says
    permanent: bool = False
    grace_seconds: float = 0.0


class SupervisedEngine:
    """Owns the engine process and all open sequences. All of it runs on one event loop (asyncio's or uvloop's).

    States: starting until the first engine is ready; ready; restarting from a crash to the next ready engine; failed for good; stopped.
    """

    def __init__(
        self,
        start: Start,
        *,
        clock: Clock,
        observer: EngineObserver,
        command: Sequence[str] = ENGINE_COMMAND,
        max_restarts: int = 5,
        limits: SupervisorLimits | None = None,
        pass_on_stderr: Callable[[bytes], None] = write_stderr,
        spawned: Spawned | None = None,
    ) -> None:
        """`spawned`: a process of `command` that was started ahead; it becomes the first."""
        self.state = "starting"
        self.ready: Ready | None = None
        self.heartbeat: Heartbeat | None = None
        self.pid: int | None = None
        self._start = start
        self._clock = clock
        self._observer = observer
        self._command = tuple(command)
        self._max_restarts = max_restarts
        self._limits = limits or SupervisorLimits()
        self._pass_on_stderr = pass_on_stderr
        self._spawned = spawned
        self._table = SequenceTable(start.max_waiting)
        self._connection: EngineConnection | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._life: asyncio.Future[_End] | None = None  # of the current process
        self._closing = asyncio.Event()
        self._state_waiters: set[asyncio.Future[None]] = set()
        self._failure = ""  # the engine's words once the state is failed
        self._crash_times: list[float] = []
        self._num_completed = 0  # of the table, when the first of these crashes came
        self._heard_at = self._stepped_at = self._watched_at = self._excused_at = 0.0
        self._watch_handle: asyncio.TimerHandle | None = None

    @property
    def num_in_flight(self) -> int:
        """Open sequences, waiting ones included."""
        return len(self._table)

    @property
    def num_restarts(self) -> int:
        """Crashes within the restart window that count against `max_restarts`."""
        return len(self._crash_times)

    def set_serving_watts(self, watts: float | None) -> None:
        """The device's power while it works, from now on; what sequences take is priced with it. None: not known."""
        self._table.costs.watts = watts

    # EngineClient

    async def start(self) -> None:
        """Spawn the process and return; readiness comes later."""
        if self._supervision is not None:
            raise RuntimeError("the engine was started before")
        self._watched_at = self._clock.monotonic()
        self._watch_later()
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")

    async def wait_ready(self, timeout_seconds: float | None = None) -> Ready:
        """Facts of the engine once it serves. Raises EngineFailed with its own words if it cannot, TimeoutError with the phase it is in."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.state not in ("ready", "failed", "stopped"):
                    waiter = asyncio.get_running_loop().create_future()
                    self._state_waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._state_waiters.discard(waiter)
        except TimeoutError:
            phase = self.heartbeat.phase if self.heartbeat else "start"
            raise TimeoutError(f"the engine is not ready after {timeout_seconds} s; it is in its phase {phase!r}") from None
        if self.state == "ready" and self.ready is not None:
            return self.ready
        raise EngineFailed(self._failure or "the engine was stopped")

    def submit(self, request: SequenceRequest) -> Generation:
        """Hand a sequence to the engine; while it restarts, the sequence waits. Raises Unavailable, ContextLengthExceeded or EngineFailed."""
        if self.state == "failed":
            raise EngineFailed(self._failure)
        if self.state == "stopped" or self._closing.is_set():
            raise Unavailable("the server is shutting down", code="shutting_down")
        if self.ready is None:
            raise Unavailable("the model is loading", code="loading", retry_after_seconds=self._seconds_to_ready())
        if len(request.prompt_ids) >= self.ready.context_length:
            limit = self.ready.context_length
            raise ContextLengthExceeded(f"the prompt has {len(request.prompt_ids)} tokens; with room for one more the context holds {limit}")
        return self._table.submit(request, self._clock.monotonic(), restarting=self.state == "restarting")

    async def close(self) -> None:
        """End the process (its socket closes; SIGKILL after `limits.close` seconds) and every open sequence with Unavailable. Idempotent."""
        self._closing.set()
        self._table.end_all(lambda: Unavailable("the server is shutting down", code="shutting_down"))
        if self._life is not None and not self._life.done():
            self._life.set_result(_End("stopped", grace_seconds=self._limits.close))
        if self._supervision is not None:
            await asyncio.shield(self._supervision)
        if self._watch_handle is not None:
            self._watch_handle.cancel()
        if self.state != "failed":
            self._set_state("stopped")

    # The life of processes.

    async def _supervise(self) -> None:
        try:
            while not self._closing.is_set():
                end = await self._live()
                if self._closing.is_set():
                    return
                now = self._clock.monotonic()
                if self._gives_up(end, now):
                    self._fail(end.detail or "the engine crashed")
                    return
                delay = min(self._limits.max_backoff, self._limits.first_backoff * 2.0 ** (len(self._crash_times) - 1))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), delay)
                if not self._closing.is_set():
                    self._report("restarting", f"restart {len(self._crash_times)} of at most {self._max_restarts}, after {delay:.1f} s")
        except Exception as error:  # a fault of ours: no handler may be left waiting for it
            _logger.exception("engine supervision failed")
            self._fail(f"engine supervision failed: {error!r}")

    async def _live(self) -> _End:
        """Spawn one process, serve until it ends, clear it away. Returns how it ended, with `detail` filled in."""
        source, self._spawned = self._spawned or self._command, None
        try:
            child = Child(source, self._pass_on_stderr)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | PermissionError)
            end = _End("crashed", f"cannot start {self._command[0]}: {error}", permanent=missing)
            self._record_end(end, 0, self._clock.monotonic())
            return end
        try:
            end, lost_at = await self._serve(child)
            if not await child.end(end.grace_seconds):
                end = _End(end.kind, f"process {child.pid} is stuck in the kernel and cannot be killed", permanent=True)
        except BaseException:  # cancelled, or a fault of ours: the process must not stay
            child.kill()
            raise
        end = _End(end.kind, end.detail or child.describe_exit(), end.permanent)
        self._connection = self._life = self.pid = None
        self._record_end(end, child.pid, lost_at)
        return end

    async def _serve(self, child: Child) -> tuple[_End, float]:
        """Talk to one process until it is lost or closed. Returns how and when (monotonic); by then its socket is closed."""
        loop = asyncio.get_running_loop()
        self.pid, self.heartbeat = child.pid, None
        self._heard_at = self._stepped_at = self._clock.monotonic()
        life: asyncio.Future[_End] = loop.create_future()
        self._life = life
        connection = EngineConnection(self._on_messages, self._on_writable, self._on_lost)
        self._connection = connection
        await loop.create_unix_connection(lambda: connection, sock=child.socket)
        connection.send(self._start)
        self._report("started", " ".join(self._command))
        child.exited.add_done_callback(lambda _: loop.call_later(_EOF_SECONDS, self._end_life, life, _End("crashed")))
        if self._closing.is_set():
            self._end_life(life, _End("stopped", grace_seconds=self._limits.close))
        end = await life
        lost_at = self._clock.monotonic()
        if self.state == "ready":
            self._set_state("restarting")
        connection.close()
        return end, lost_at

    def _record_end(self, end: _End, pid: int, lost_at: float) -> None:
        self._report(end.kind, end.detail or "", pid)
        if end.kind == "stopped":
            return
        if not self._crash_times:
            self._num_completed = self._table.num_completed
        self._crash_times.append(self._clock.monotonic())
        convicted = self._table.detach(lost_at, end.detail or "")
        if convicted and self._table.num_completed > self._num_completed:
            # One request explains these crashes and others were served in between: they say nothing against the engine. Without the second
            # condition an engine that dies of every request would restart for ever.
            self._crash_times = self._crash_times[-1:]

    def _gives_up(self, end: _End, now: float) -> bool:
        self._crash_times = [at for at in self._crash_times if at > now - self._limits.restart_window]
        return end.permanent or len(self._crash_times) > self._max_restarts

    def _fail(self, words: str) -> None:
        self._failure = words
        self._set_state("failed")
        self._table.end_all(lambda: EngineFailed(words))
        self._report("failed", words)

    def _end_life(self, life: asyncio.Future[_End], end: _End) -> None:
        if not life.done():
            life.set_result(end)

    # What comes from the socket.

    def _on_messages(self, messages: list[FromEngine]) -> None:
        now = self._heard_at = self._clock.monotonic()
        for message in messages:
            if isinstance(message, StepOutput):
                self._stepped_at = now
                gaps = self._table.on_step(message, now)
                self._observe(message.stats, gaps)
            elif isinstance(message, Heartbeat):
                self.heartbeat = message
            elif isinstance(message, Events):
                self._table.on_events(message.events, ahead=True)
            elif isinstance(message, Rejected):
                self._table.on_rejected(message, now)
            elif isinstance(message, Ready):
                self._on_ready(message, now)
            elif isinstance(message, Failure):
                self._lose(_End("crashed", message.message, message.permanent, _LEAVE_SECONDS))

    def _on_ready(self, ready: Ready, now: float) -> None:
        self.ready = ready
        if self.state == "ready" or self._connection is None:
            return
        self._report("ready", f"{ready.device}, {ready.dtype}, loaded in {ready.load_seconds:.1f} s")
        self._table.attach(self._connection, ready, now)
        self._set_state("ready")

    def _on_writable(self) -> None:
        self._table.pump(self._clock.monotonic())

    def _on_lost(self, reason: str | None) -> None:
        self._lose(_End("crashed", reason, grace_seconds=_LEAVE_SECONDS if reason is None else 0.0))

    def _lose(self, end: _End) -> None:
        if self._life is not None:
            self._end_life(self._life, end)

    # Watching.

    def _watch_later(self) -> None:
        self._watch_handle = asyncio.get_running_loop().call_later(self._limits.watch_interval, self._watch)

    def _watch(self) -> None:
        now = self._clock.monotonic()
        # Whatever stopped this loop (a paused virtual machine, a frozen cgroup, no core) has likely stopped the engine too: its time counts anew.
        starved = now - self._watched_at > 1.0 + self._limits.watch_interval
        self._watched_at = now
        if starved:
            self._heard_at = self._excused_at = now
        elif self._life is not None and not self._life.done() and (why := self._hung(now)) is not None:
            self._lose(_End("hung", why))
        self._table.on_tick(now)
        if not self._closing.is_set():
            self._watch_later()

    def _hung(self, now: float) -> str | None:
        beat = self.heartbeat
        serving = beat is not None and beat.phase in ("idle", "step")
        silent = now - self._heard_at
        if silent > (self._limits.silence if serving else self._limits.loading_silence):
            return f"no sign of life for {silent:.1f} s in its phase {beat.phase if beat else 'start'!r}"
        if beat is None:
            return None
        # A step's output is newer news than the heartbeat before it.
        since = max(beat.phase_started_at, self._excused_at, self._stepped_at if beat.phase == "step" else 0.0)
        if now - since > beat.phase_deadline_seconds:
            return f"{now - since:.1f} s in its phase {beat.phase!r}, whose deadline is {beat.phase_deadline_seconds:g} s"
        return None

    # Telling others.

    def _set_state(self, state: str) -> None:
        self.state = state
        for waiter in self._state_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _observe(self, stats: StepStats, gaps: list[tuple[float, int]]) -> None:
        try:
            self._observer.on_step(stats, gaps)
        except Exception:  # a fault in the metrics must not pass for one of the engine
            _logger.exception("the observer failed on a step")

    def _report(self, kind: str, detail: str, pid: int | None = None) -> None:
        event = EngineEvent(kind, self._clock.wall(), detail, self.pid or 0 if pid is None else pid, self.num_in_flight)
        try:
            self._observer.on_engine_event(event)
        except Exception:
            _logger.exception("the observer failed on the engine event %s", kind)

    def _seconds_to_ready(self) -> float:
        """An estimate from the load's progress, 1-60 s."""
        beat = self.heartbeat
        if beat is None or beat.progress < 0.02:
            return 5.0
        elapsed = max(0.0, self._clock.monotonic() - beat.phase_started_at)
        return min(60.0, max(1.0, math.ceil(elapsed * (1.0 - beat.progress) / beat.progress)))
