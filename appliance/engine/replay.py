"""The table of open sequences: dispatches what the engine says, and after a crash submits every sequence again from where it stood.

Pure of I/O: frames go out through a `Link`, time is an argument. One owner, the supervisor, on the event loop.
"""

from __future__ import annotations

import collections
import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

from appliance.engine.client import SequenceRequest
from appliance.engine.costs import CostMeter
from appliance.engine.generation import OpenSequence, Stage, Wakeups
from appliance.engine.wire import Abort, Finish, Ready, Rejected, SequenceEvent, StepOutput, Submit, TokenLogprobs, unpack_ids
from appliance.errors import ApplianceError, ContextLengthExceeded, DeadlineExceeded, EngineFailed, Unavailable
from appliance.events import StepStats

SUSPECT_CRASHES = 2  # in flight at so many crashes, a sequence must run alone before it may run beside others
# Tokens that a suspect must gain alone to be cleared. It is resumed at the very position of the crash, so what kills the engine does so in
# the first step or two; two more cover an engine that runs one step ahead of its output. 255 innocent neighbours cost 255 short prefills this
# way, where running each to its end would stop the node for minutes.
PROBE_TOKENS = 4
MAX_SEQUENCE_ID = 2**31 - 1  # ids are int32 on the wire


class Link(Protocol):
    """The way to a ready engine."""

    @property
    def writable(self) -> bool:
        """False while so much is buffered that large frames should wait."""

    def send(self, message: Submit | Abort | Finish) -> None:
        """Queue one frame; ignored once the connection is lost."""


class SequenceTable:
    """All sequences that have not ended. Each ends exactly once, by `_end`.

    `max_waiting` bounds both the sequences never scheduled yet (beyond it `submit` raises Unavailable) and those in the engine's queue at
    any time, so that a replay of running and waiting ones together does not overflow that queue.
    """

    def __init__(self, max_waiting: int) -> None:
        self.costs = CostMeter()
        self.num_stale_tokens = 0  # for sequences that had ended here
        self.num_completed = 0  # ended by themselves, or cleared while alone: signs of an engine that works
        self._max_waiting = max_waiting
        self._open: dict[int, OpenSequence] = {}
        self._held: collections.OrderedDict[int, OpenSequence] = collections.OrderedDict()
        self._suspects: list[OpenSequence] = []  # held, newest last
        self._probe_id: int | None = None  # the suspect that has the engine for itself, until the engine reports its end
        self._num_unscheduled = 0  # sent to this engine, not in its batch yet
        self._num_never_scheduled = 0
        self._link: Link | None = None
        self._max_num_seqs = self._context_length = 0  # the newest engine's
        self._queue_full = False  # the engine said so, until it schedules one more or the next tick
        self._announces = False  # this engine says what it schedules before it launches the step
        self._wakeups = Wakeups()
        self._ids = itertools.count(1)
        self._end_times: collections.deque[float] = collections.deque(maxlen=64)

    def __len__(self) -> int:
        return len(self._open)

    # What handlers ask.

    def submit(self, request: SequenceRequest, now: float, *, restarting: bool) -> OpenSequence:
        """Open a sequence and send it when it may go. Raises Unavailable when too many wait."""
        if self._num_never_scheduled >= self._max_waiting:
            raise Unavailable(
                f"the queue is full: {self._num_never_scheduled} requests wait", code="queue_full", retry_after_seconds=self.retry_after(now)
            )
        sequence = OpenSequence(self, self._next_id(), request, now, self._wakeups)
        self._open[sequence.sequence_id] = self._held[sequence.sequence_id] = sequence
        self._num_never_scheduled += 1
        if restarting:
            _begin_replay(sequence, now)
        self.pump(now)
        return sequence

    def abort(self, sequence: OpenSequence) -> None:
        """End it here at once; the engine hears of it if it has it."""
        self._end_and_tell(sequence, Abort(sequence.sequence_id), "abort")

    def finish(self, sequence: OpenSequence, num_tokens: int) -> None:
        """End it here at once after `num_tokens` outputs; the engine hears of it if it has it."""
        if sequence.stage is not Stage.ENDED:
            sequence.truncate(num_tokens)
            self.num_completed += 1
        self._end_and_tell(sequence, Finish(sequence.sequence_id, num_tokens), "finish")

    def retry_after(self, now: float) -> float:
        """Seconds until the waiting ones are likely served: their number over the rate at which the last 64 ended; 1-60."""
        if len(self._end_times) < 2 or now <= self._end_times[0]:
            return 1.0
        rate = (len(self._end_times) - 1) / (now - self._end_times[0])
        return min(60.0, max(1.0, self._num_never_scheduled / rate))

    # What the engine says.

    def on_step(self, step: StepOutput, now: float) -> list[tuple[float, int]]:
        """Hand out one step's tokens, events and ends. Returns the inter-token gaps, grouped: (seconds, number of sequences).

        Raises ValueError if the arrays do not match. Events come first ("scheduled" goes ahead of the token that it led to), ends last.
        """
        self.on_events(step.events)
        self._charge(step.stats)  # who was preempted is in it no more, who was resumed is again
        open_, logprobs = self._open, step.logprobs
        last_times: dict[float, int] = {}
        for sequence_id, token_id in zip(unpack_ids(step.sequence_ids), unpack_ids(step.token_ids), strict=True):
            sequence = open_.get(sequence_id)
            if sequence is None or sequence.stage is Stage.HELD:
                self.num_stale_tokens += 1
                continue
            if sequence.wants_logprobs and not self._add_logprobs(sequence, logprobs):
                continue
            if not sequence.settled:
                self._settle(sequence, now)
            last = sequence.last_token_at
            last_times[last] = last_times.get(last, 0) + 1
            sequence.last_token_at = now
            sequence.add_token(token_id, now)
        for sequence_id, reason, detail in step.finished:
            self._on_finished(sequence_id, reason, detail, now)
        last_times.pop(0.0, None)
        if self._held or self._suspects:
            self.pump(now)
        return [(now - last, count) for last, count in last_times.items()]

    def on_events(self, events: Iterable[SequenceEvent], *, ahead: bool = False) -> None:
        """Take note of events and pass them on. `ahead`: they came before the step that they speak of was launched."""
        self._announces = self._announces or ahead
        for event in events:
            sequence = self._open.get(event.sequence_id)
            if sequence is None or sequence.stage is Stage.HELD:
                continue
            if event.kind == "scheduled":
                self._mark_running(sequence)
                if not sequence.prefilled:
                    sequence.num_cached_tokens = event.value
            elif event.kind == "prefilled":
                sequence.prefilled = True
                if sequence.replaying:
                    _end_replay(sequence, event.at)
                    continue
            elif event.kind == "preempted":
                sequence.num_preemptions += 1
                sequence.stage, sequence.settled = Stage.PREEMPTED, False
                self.costs.leave(sequence.bill)
            elif event.kind == "resumed":
                self._mark_running(sequence)
            if not sequence.replaying:
                sequence.add_event(event)

    def on_rejected(self, rejected: Rejected, now: float) -> None:
        """End a sequence that the engine will not run. One that was accepted before waits for its turn instead of ending for a full queue."""
        self._release_probe(rejected.sequence_id)
        sequence = self._open.get(rejected.sequence_id)
        if sequence is None:
            return
        if rejected.code == "queue_full" and (sequence.was_scheduled or sequence.num_restarts):
            self._leave_engine(sequence)
            self._held[sequence.sequence_id] = sequence
            self._queue_full = True
            return
        error: ApplianceError = ContextLengthExceeded(rejected.message)
        if rejected.code != "context_length_exceeded":
            error = Unavailable(rejected.message, code=rejected.code, retry_after_seconds=self.retry_after(now))
        self._end(sequence, None, error)
        self.pump(now)

    # Engines coming and going.

    def attach(self, link: Link, ready: Ready, now: float) -> None:
        """A fresh engine is ready: send what is held."""
        self._link, self._announces, self._queue_full = link, False, False
        self._max_num_seqs, self._context_length = ready.max_num_seqs, ready.context_length
        self.costs.costs = ready.costs
        self.pump(now)

    def detach(self, now: float, cause: str) -> bool:
        """The engine is gone: hold every sequence for the next one. Returns True if a suspect that ran alone was convicted (and ended).

        `cause` is what the engine died of, in words. A conviction explains the crashes before it, so the other suspects are cleared.
        """
        probe_id, self._probe_id, self._link = self._probe_id, None, None
        convict = self._open.get(probe_id) if probe_id is not None else None
        for sequence in self._in_flight():
            sequence.num_crashes += 1
        self._num_unscheduled = 0
        if convict is not None:
            message = f"the engine crashed at this request {convict.num_crashes} times, at last while it ran alone: {cause}"
            self._end(convict, None, EngineFailed(message))
        sequences = sorted(self._open.values(), key=lambda sequence: not sequence.was_scheduled)  # stable: first come, first resumed
        self._held.clear()
        self._suspects.clear()
        for sequence in sequences:
            if (reason := sequence.stopped_by_own_rules(self._context_length)) is not None:
                self._end(sequence, reason)
                continue
            self.costs.leave(sequence.bill)
            sequence.stage, sequence.settled = Stage.HELD, False
            sequence.num_restarts += 1
            if not sequence.replaying:
                _begin_replay(sequence, now)
            if convict is not None:
                sequence.num_crashes = min(sequence.num_crashes, SUSPECT_CRASHES - 1)
            if sequence.num_crashes >= SUSPECT_CRASHES:
                self._suspects.append(sequence)
            else:
                self._held[sequence.sequence_id] = sequence
        self._suspects.sort(key=lambda sequence: sequence.queued_at)
        return convict is not None

    def pump(self, now: float) -> None:
        """Send what may go: suspects one at a time, the newest first since it came last before the crashes; then the others."""
        link = self._link
        if link is None or self._probe_id is not None:
            return
        if self._suspects:
            if link.writable:
                sequence = self._suspects.pop()
                self._probe_id = sequence.sequence_id
                self._send(link, sequence, now, probe_tokens=PROBE_TOKENS)
            return
        while self._held and not self._queue_full and self._num_unscheduled < self._max_waiting and link.writable:
            _, sequence = self._held.popitem(last=False)
            self._send(link, sequence, now)

    def on_tick(self, now: float) -> None:
        """End sequences whose deadline has passed, even if the engine is down, stuck, or busy with a suspect. Then try again to send."""
        for sequence in [s for s in self._open.values() if s.deadline_at is not None and s.deadline_at <= now]:
            self._end_and_tell(sequence, Abort(sequence.sequence_id), "deadline", _deadline_error(sequence))
        self._queue_full = False
        self.pump(now)

    def end_all(self, error: Callable[[], ApplianceError]) -> None:
        """End every sequence with an error of its own."""
        for sequence in list(self._open.values()):
            self._end(sequence, None, error())

    # Steps of the above.

    def _charge(self, stats: StepStats) -> None:
        """Split the step's time over its sequences."""
        costs = self.costs
        costs.charge_step(stats)
        for sequence_id, start, length, final in stats.chunks:
            sequence = self._open.get(sequence_id)
            if sequence is None or sequence.stage is Stage.HELD:
                continue
            costs.charge_chunk(sequence.bill, start, length)
            if final and sequence.stage is not Stage.PREEMPTED:  # else it lost its blocks before this step was read
                costs.join(sequence.bill, start + length)

    def _next_id(self) -> int:
        sequence_id = next(self._ids)
        while sequence_id > MAX_SEQUENCE_ID or sequence_id in self._open:
            if sequence_id > MAX_SEQUENCE_ID:
                self._ids = itertools.count(1)
            sequence_id = next(self._ids)
        return sequence_id

    def _send(self, link: Link, sequence: OpenSequence, now: float, *, probe_tokens: int | None = None) -> None:
        sequence.stage = Stage.SENT
        self._num_unscheduled += 1
        link.send(sequence.submit_frame(probe_tokens=probe_tokens))
        if sequence.replaying and not sequence.prefilled:
            _end_replay(sequence, now)  # it queues and prefills like any other, and its handler hears so
            sequence.add_event(SequenceEvent(sequence.sequence_id, "queued", now))

    def _settle(self, sequence: OpenSequence, now: float) -> None:
        if sequence.stage is Stage.SENT:
            self._mark_running(sequence)  # a preempted one is not: this token is of a step that was under way when it lost its blocks
        sequence.prefilled = True
        if sequence.replaying:
            _end_replay(sequence, now)
        sequence.settled = sequence.stage is Stage.RUNNING

    def _add_logprobs(self, sequence: OpenSequence, logprobs: dict[int, TokenLogprobs] | None) -> bool:
        entry = None if logprobs is None else logprobs.get(sequence.sequence_id)
        if entry is None:  # tokens and log-probabilities would be out of step from here on
            error = EngineFailed(f"the engine sent no log-probabilities for token {len(sequence.outputs)}")
            self._end_and_tell(sequence, Abort(sequence.sequence_id), None, error)
            return False
        sequence.add_logprobs(entry)
        return True

    def _mark_running(self, sequence: OpenSequence) -> None:
        if sequence.stage is Stage.SENT:
            self._num_unscheduled -= 1
            self._queue_full = False
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            self._num_never_scheduled -= 1
        sequence.stage = Stage.RUNNING

    def _in_flight(self) -> list[OpenSequence]:
        """The sequences that may have been in the engine's batch when it died.

        An engine that announces what it schedules leaves no doubt. Of another, the newest step's "scheduled" events died with it: whoever
        could have been let in counts too, in the order of the queue.
        """
        running = [s for s in self._open.values() if s.stage is Stage.RUNNING]
        room = self._max_num_seqs - len(running)
        if self._announces or room <= 0 or not self._num_unscheduled:
            return running
        sent = (s for s in self._open.values() if s.stage is Stage.SENT)
        return running + heapq.nsmallest(room, sent, key=lambda s: (s.priority, s.queued_at))

    def _on_finished(self, sequence_id: int, reason: str, detail: str, now: float) -> None:
        was_probe = self._release_probe(sequence_id)
        sequence = self._open.get(sequence_id)
        if sequence is None:
            return
        if was_probe and reason == "length" and sequence.stopped_by_own_rules(self._context_length) is None:
            self._clear_suspect(sequence, now)
            return
        error: ApplianceError | None = None
        if reason == "deadline":
            error = _deadline_error(sequence)
        elif reason == "error":
            code, _, message = detail.partition(": ")
            error = ContextLengthExceeded(message) if code == "context_length_exceeded" else EngineFailed(detail or "the engine gave this request up")
        else:
            self.num_completed += 1
        self._end_times.append(now)
        self._end(sequence, None if reason == "error" else reason, error)

    def _clear_suspect(self, sequence: OpenSequence, now: float) -> None:
        """It survived alone: from now on it is as suspect as one that saw a single crash, and goes on with the others."""
        self.num_completed += 1
        self._leave_engine(sequence)
        sequence.num_crashes = SUSPECT_CRASHES - 1
        _begin_replay(sequence, now)
        self._held[sequence.sequence_id] = sequence
        self._held.move_to_end(sequence.sequence_id, last=False)

    def _release_probe(self, sequence_id: int) -> bool:
        if self._probe_id != sequence_id:
            return False
        self._probe_id = None
        return True

    def _leave_engine(self, sequence: OpenSequence) -> None:
        if sequence.stage is Stage.SENT:
            self._num_unscheduled -= 1
        self.costs.leave(sequence.bill)
        sequence.stage, sequence.settled = Stage.HELD, False

    def _end_and_tell(self, sequence: OpenSequence, frame: Abort | Finish, reason: str | None, error: ApplianceError | None = None) -> None:
        if sequence.stage is Stage.ENDED:
            return
        engine_has_it = sequence.stage is not Stage.HELD
        self._end(sequence, reason, error)
        if engine_has_it and self._link is not None:
            self._link.send(frame)

    def _end(self, sequence: OpenSequence, reason: str | None, error: ApplianceError | None = None) -> None:
        del self._open[sequence.sequence_id]
        if sequence.stage is Stage.HELD:
            self._held.pop(sequence.sequence_id, None)
            if sequence in self._suspects:
                self._suspects.remove(sequence)
        elif sequence.stage is Stage.SENT and self._link is not None:
            self._num_unscheduled -= 1
        if not sequence.was_scheduled:
            self._num_never_scheduled -= 1
        self.costs.leave(sequence.bill)
        sequence.end(reason, error)


def _begin_replay(sequence: OpenSequence, now: float) -> None:
    sequence.replaying = True
    sequence.add_event(SequenceEvent(sequence.sequence_id, "engine_restart", now))


def _end_replay(sequence: OpenSequence, now: float) -> None:
    sequence.replaying = False
    sequence.add_event(SequenceEvent(sequence.sequence_id, "resumed", now))


def _deadline_error(sequence: OpenSequence) -> DeadlineExceeded:
    return DeadlineExceeded(f"the request's deadline passed after {len(sequence.outputs)} generated tokens")
