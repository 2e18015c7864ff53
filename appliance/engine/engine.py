"""The step loop: schedule, launch, collect, report. On CUDA a step is launched before the one before it is read; on CPU each is read at once."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.engine.block_pool import BlockPool
from appliance.engine.chunk_policy import ChunkPolicy
from appliance.engine.model_runner import LaunchedStep, ModelRunner, StepResult
from appliance.engine.scheduler import Scheduler, SchedulerLimits, StepPlan
from appliance.engine.sequence import Sequence
from appliance.engine.wire import Abort, Events, Finish, Rejected, SequenceEvent, StepOutput, Submit, TokenLogprobs, pack_ids
from appliance.events import StepStats

_FREE_BYTES_SECONDS = 1.0  # between readings of the device's free memory: each asks the driver


@dataclass(slots=True)
class _Report:
    """What is told to the server with the next frame."""

    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[tuple[int, str, str]] = field(default_factory=list)
    events: list[SequenceEvent] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    num_aborted: int = 0
    num_surplus: int = 0
    num_preemptions: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.sequence_ids or self.finished or self.events)


@dataclass(slots=True)
class _InFlight:
    launched: LaunchedStep
    started_at: float
    schedule_seconds: float
    launch_seconds: float
    num_ended: int


class Engine:
    """Sequences in, StepOutputs out. Single-threaded; `depth` is how many steps may be launched before the oldest is read (0 on CPU, 1 on CUDA)."""

    def __init__(
        self,
        runner: ModelRunner,
        limits: SchedulerLimits,
        pool: BlockPool,
        chunk_policy: ChunkPolicy,
        *,
        depth: int,
        announce: Callable[[Events], None] = lambda _: None,
        free_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`announce` is told who enters the batch before the step that might die of it; `free_bytes` gives the device's free memory."""
        self.runner = runner
        self.limits = limits
        self.pool = pool
        self.scheduler = Scheduler(limits, pool)
        self.chunk_policy = chunk_policy
        self._depth = depth
        self._announce = announce
        self._read_free_bytes = free_bytes
        self._free_bytes, self._free_read_at = 0, float("-inf")
        self._sequences: dict[int, Sequence] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._in_flight: deque[_InFlight] = deque()
        self._report = _Report()
        self._num_steps = 0
        self._num_ended = 0  # sequences, ever: while it stands still, nobody in a launched step can have ended
        self._last_done_at = 0.0
        self._pool_totals = (0, 0, 0)  # blocks allocated, reused and evicted, as last reported

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._sequences or self._in_flight or not self._report.is_empty)

    def submit(self, message: Submit) -> Rejected | None:
        """Queue a sequence, or say why not."""
        sequence = Sequence(message, self.scheduler.next_arrival(), self.limits.context_length)
        num_tokens = len(sequence.token_ids)
        if num_tokens >= self.limits.context_length:
            text = f"{num_tokens} tokens leave no room for an output within the context length of {self.limits.context_length}"
            return Rejected(message.sequence_id, "context_length_exceeded", text)
        if len(self.scheduler.waiting) >= self.limits.max_waiting:
            return Rejected(message.sequence_id, "queue_full", f"{self.limits.max_waiting} sequences are waiting already")
        self._sequences[sequence.id] = sequence
        if sequence.deadline_at is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_at, sequence.id))
        self.scheduler.add(sequence)
        return None

    def abort(self, message: Abort) -> None:
        """End a sequence whose client is gone. Unknown ids are ignored: it ended while the message was on its way."""
        if (sequence := self._sequences.get(message.sequence_id)) is not None:
            self._report.num_aborted += 1
            self._end(sequence, "abort")

    def finish(self, message: Finish) -> None:
        """End a sequence after `num_tokens` outputs; what lies beyond is surplus."""
        if (sequence := self._sequences.get(message.sequence_id)) is not None:
            self._report.num_surplus += max(sequence.num_outputs - message.num_tokens, 0)
            self._end(sequence, "finish")

    def step(self) -> StepOutput | None:
        """Launch the next step if there is one, read the oldest one that is due, and report. None: nothing to say."""
        started_at = time.monotonic()
        self.pool.now = int(started_at * 1000)
        self._expire(started_at)
        self.scheduler.chunk_budget = self.chunk_policy.budget
        plan = self.scheduler.schedule(started_at)
        if plan is not None:
            if plan.new_rows:
                self._announce(Events(tuple(plan.events)))
            else:
                self._report.events.extend(plan.events)
            self._report.num_preemptions += plan.num_preemptions
            if plan.decodes or plan.chunks:
                self._launch(plan, started_at)
            else:
                plan = None
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._depth):
            return None if self._report.is_empty else self._output(None, started_at, 0.0, time.monotonic(), 0.0)
        oldest = self._in_flight.popleft()
        waiting_from = time.monotonic()
        result = self.runner.collect(oldest.launched)
        done_at = time.monotonic()
        self._process(oldest.launched, result, done_at, oldest.num_ended)
        busy_seconds = self._learn(oldest, done_at)
        return self._output(oldest, oldest.started_at, done_at - waiting_from, done_at, busy_seconds)

    def _launch(self, plan: StepPlan, started_at: float) -> None:
        scheduled_at = time.monotonic()
        launched = self.runner.launch(plan)
        self._in_flight.append(_InFlight(launched, started_at, scheduled_at - started_at, time.monotonic() - scheduled_at, self._num_ended))

    def _process(self, launched: LaunchedStep, result: StepResult, now: float, num_ended_before: int) -> None:
        """Append each sequence's token; what is due less often than at every token is `_milestone`'s."""
        report = self._report
        sequences, token_ids, sequence_ids = launched.sequences, result.token_ids, launched.sequence_ids
        if self._num_ended != num_ended_before:
            kept = [(sequence, token_id) for sequence, token_id in zip(sequences, token_ids, strict=True) if not sequence.ended]
            report.num_surplus += len(sequences) - len(kept)
            sequences, token_ids = [sequence for sequence, _ in kept], [token_id for _, token_id in kept]
            sequence_ids = [sequence.id for sequence in sequences]
        report.sequence_ids.extend(sequence_ids)
        report.token_ids.extend(token_ids)
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            known = sequence.token_ids
            known.append(token_id)
            if len(known) >= sequence.check_at or token_id in sequence.sampling.stop_token_ids:
                self._milestone(sequence, token_id, now)
        report.logprobs.update(result.logprobs)

    def _milestone(self, sequence: Sequence, token_id: int, now: float) -> None:
        num_known, block_size = len(sequence.token_ids), self.limits.block_size
        if num_known == sequence.num_prompt + 1:
            self._report.events.append(SequenceEvent(sequence.id, "prefilled", now, sequence.num_cached))
        if sequence.row is not None and num_known // block_size > sequence.num_registered:
            self.scheduler.register_blocks(sequence)
        sequence.check_at = sequence.max_tokens
        if self.limits.prefix_caching:
            sequence.check_at = min((num_known // block_size + 1) * block_size, sequence.max_tokens)
        if (reason := self._finish_reason(sequence, token_id)) is not None:
            self._end(sequence, reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        sampling = sequence.sampling
        if token_id in sampling.stop_token_ids and sequence.num_outputs > sampling.min_tokens:
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_tokens else None

    def _end(self, sequence: Sequence, reason: str, detail: str = "") -> None:
        del self._sequences[sequence.id]
        sequence.ended = True
        self._num_ended += 1
        self.scheduler.finish(sequence)
        self.runner.forget(sequence)
        self._report.finished.append((sequence.id, reason, detail))

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, sequence_id = heapq.heappop(self._deadlines)
            if (sequence := self._sequences.get(sequence_id)) is not None:
                where = "running" if sequence.row is not None else "waiting"
                self._end(sequence, "deadline", f"the deadline passed while it was {where}")

    def _learn(self, step: _InFlight, done_at: float) -> float:
        """Feed the chunk policy with the time this step took beyond the one before it; returns that time."""
        plan = step.launched.plan
        seconds = done_at - max(step.started_at, self._last_done_at)
        self._last_done_at = done_at
        self.chunk_policy.observe(len(plan.decodes), plan.num_prefill_tokens, seconds)
        return seconds

    def _output(self, step: _InFlight | None, started_at: float, wait_seconds: float, done_at: float, busy_seconds: float) -> StepOutput:
        report, self._report = self._report, _Report()
        scheduler, pool = self.scheduler, self.pool
        oldest = scheduler.waiting.oldest_queued_at()
        plan = step.launched.plan if step else StepPlan()
        self._num_steps += step is not None
        query, hit = scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens
        scheduler.prefix_query_tokens = scheduler.prefix_hit_tokens = 0
        num_used_tokens, num_backlog_tokens = scheduler.count_tokens()
        before, self._pool_totals = self._pool_totals, (pool.num_allocated, pool.num_reused, pool.num_evicted)
        packed_sequences, packed_tokens = pack_ids(report.sequence_ids), pack_ids(report.token_ids)
        now = time.monotonic()
        if now - self._free_read_at >= _FREE_BYTES_SECONDS:
            self._free_bytes, self._free_read_at = self._read_free_bytes(), now
        stats = StepStats(
            step=self._num_steps,
            started_at=started_at,
            schedule_seconds=step.schedule_seconds if step else 0.0,
            launch_seconds=step.launch_seconds if step else 0.0,
            wait_seconds=wait_seconds,
            output_seconds=now - done_at,
            num_decode_tokens=len(plan.decodes),
            num_prefill_tokens=plan.num_prefill_tokens,
            num_sequences=len(plan.decodes) + len(plan.chunks),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            oldest_waiting_age_seconds=max(now - oldest, 0.0) if oldest is not None else 0.0,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            num_used_tokens=num_used_tokens,
            prefix_query_tokens=query,
            prefix_hit_tokens=hit,
            num_preemptions=report.num_preemptions,
            num_aborted=report.num_aborted,
            num_surplus_tokens=report.num_surplus,
            graph_hit=step.launched.graph_hit if step else False,
            free_bytes=self._free_bytes,
            busy_seconds=busy_seconds,
            num_context_tokens=plan.num_context_tokens,
            num_sampled_tokens=len(step.launched.sequences) if step else 0,
            num_backlog_tokens=num_backlog_tokens,
            num_findable_blocks=pool.num_findable,
            num_allocated_blocks=pool.num_allocated - before[0],
            num_reused_blocks=pool.num_reused - before[1],
            num_evicted_blocks=pool.num_evicted - before[2],
            chunks=tuple((chunk.sequence.id, chunk.start, chunk.length, chunk.final) for chunk in plan.chunks),
            block_ends=pool.take_ends(),
        )
        return StepOutput(
            stats=stats,
            sequence_ids=packed_sequences,
            token_ids=packed_tokens,
            finished=tuple(report.finished),
            events=tuple(report.events),
            logprobs=report.logprobs or None,
        )
