"""One open sequence on the server's side: what it asked for, every token received, and what its handler has not taken yet. Torch-free."""

from __future__ import annotations

import array
import asyncio
import enum
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from appliance.engine.client import Delta, SequenceRequest
from appliance.engine.costs import Bill
from appliance.engine.wire import Sampling, SequenceEvent, Submit, TokenLogprobs, pack_ids

_logger = logging.getLogger(__name__)


class Stage(enum.IntEnum):
    """Where a sequence is, as far as the server knows. It counts as in flight at a crash from RUNNING on, but not while PREEMPTED."""

    HELD = 0  # not (or no longer) sent: no engine, no room on the socket, or it waits for its turn after a crash
    SENT = 1  # in the engine's waiting queue
    RUNNING = 2  # in the engine's batch
    PREEMPTED = 3  # was in the batch, lost its blocks
    ENDED = 4


class Owner(Protocol):
    """Who acts on what a handler asks of its sequence; the `SequenceTable`."""

    def abort(self, sequence: OpenSequence) -> None:
        """End `sequence` as aborted."""

    def finish(self, sequence: OpenSequence, num_tokens: int) -> None:
        """End `sequence` after `num_tokens` outputs."""


class Wakeups:
    """The listeners that have something to take: each is called once, in the next tick of the event loop.

    One callback of the loop serves every stream of a step, and what several frames of one read brought is taken together.
    """

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due: dict[Callable[[], None], None] = {}

    def add(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the next tick. On the event loop only."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due[listener] = None

    def _run(self) -> None:
        due, self._due = self._due, {}
        for listener in due:
            try:
                listener()
            except Exception:  # the others must have theirs
                _logger.exception("a listener failed")


class OpenSequence:
    """The `Generation` that a handler owns. Its fields are written by the SequenceTable alone; the handler calls the methods of its side.

    Tokens: `outputs` holds all received since the first submission, `_taken` counts those the handler has; what lies between is pending.

        outputs  [0 ........ _taken ........ len(outputs))
                  delivered   pending, with `_times` and `_logprobs` beside it
    """

    __slots__ = (
        "_error",
        "_events",
        "_finish_reason",
        "_listener",
        "_logprobs",
        "_owner",
        "_taken",
        "_times",
        "_waiter",
        "_wakeups",
        "bill",
        "cache_salt",
        "deadline_at",
        "hears_tokens",
        "key_id",
        "last_token_at",
        "num_cached_tokens",
        "num_crashes",
        "num_preemptions",
        "num_restarts",
        "outputs",
        "prefilled",
        "priority",
        "prompt_ids",
        "queued_at",
        "replaying",
        "sampling",
        "sequence_id",
        "settled",
        "stage",
        "wants_logprobs",
        "was_scheduled",
    )

    def __init__(self, owner: Owner, sequence_id: int, request: SequenceRequest, queued_at: float, wakeups: Wakeups) -> None:
        self.sequence_id = sequence_id
        self.prompt_ids = pack_ids(request.prompt_ids)
        self.sampling = request.sampling
        self.wants_logprobs = request.sampling.num_logprobs is not None
        self.deadline_at = request.deadline_at
        self.priority = request.priority
        self.key_id = request.key_id
        self.cache_salt = request.cache_salt
        self.queued_at = queued_at
        self.outputs = array.array("i")
        self.last_token_at = 0.0  # 0.0: no token yet
        self.stage = Stage.HELD
        self.was_scheduled = False  # in any engine's batch, ever
        self.prefilled = False  # its prompt was complete once: from then on a restart is no queueing or prefill of its own
        self.replaying = False  # between the crash and the first sign of life after it
        self.settled = False  # RUNNING and not replaying: the short path for a token
        self.num_crashes = 0  # at which it was in flight and of which it has not been cleared
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_restarts = 0
        self.bill = Bill()
        self.hears_tokens = True  # every one wakes its reader, not only the first
        self._owner = owner
        self._wakeups = wakeups
        self._listener: Callable[[], None] | None = None
        self._taken = 0
        self._times: list[float] = []
        self._logprobs: list[TokenLogprobs] = []
        self._events: list[SequenceEvent] = []
        self._finish_reason: str | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    # The handler's side.

    async def next(self) -> Delta:
        """Everything that is pending, as soon as there is something. After the end: the end again, without tokens. Cancelling it loses nothing."""
        while not (self._times or self._events or self.stage is Stage.ENDED):
            if self._waiter is not None:
                raise RuntimeError(f"sequence {self.sequence_id} is being awaited twice")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    def take(self) -> Delta:
        """All that there is, without waiting; an empty Delta if there is nothing."""
        times, events, outputs = self._times, self._events, self.outputs
        token_ids: list[int] = []
        if times:
            token_ids = [outputs[-1]] if len(times) == 1 else outputs[self._taken :].tolist()
            self._taken = len(outputs)
            self._times = []
        if events:
            self._events = []
        logprobs = None
        if self.wants_logprobs:
            logprobs, self._logprobs = self._logprobs, []
        return Delta(token_ids, times, logprobs, events, self._finish_reason, self._error)

    def listen(self, listener: Callable[[], None], *, every_token: bool) -> None:
        """Have `listener` called whenever there is something to take; see `Generation.listen`."""
        if self._times or self._events or self.stage is Stage.ENDED:
            self._wakeups.add(listener)
        if self.stage is not Stage.ENDED:
            self._listener = listener
            self.hears_tokens = every_token

    def abort(self) -> None:
        """The client is gone. Idempotent; harmless after the end."""
        self._owner.abort(self)

    def finish(self, num_tokens: int) -> None:
        """The text ended after `num_tokens` outputs; pending ones beyond are dropped. Idempotent; harmless after the end."""
        self._owner.finish(self, num_tokens)

    # The table's side.

    def submit_frame(self, *, probe_tokens: int | None = None) -> Submit:
        """This sequence from where it stands. With `probe_tokens` it runs alone, and only for that many tokens more."""
        sampling = self.sampling if probe_tokens is None else _shortened(self.sampling, len(self.outputs) + probe_tokens)
        return Submit(
            sequence_id=self.sequence_id,
            prompt_ids=self.prompt_ids,
            output_ids=self.outputs.tobytes(),
            sampling=sampling,
            deadline_at=self.deadline_at,
            queued_at=self.queued_at,
            priority=self.priority,
            key_id=self.key_id,
            cache_salt=self.cache_salt,
            alone=probe_tokens is not None,
        )

    def add_token(self, token_id: int, at: float) -> None:
        """Append one received token."""
        self.outputs.append(token_id)
        self._times.append(at)
        if self.hears_tokens or not self._taken:
            self._wake()

    def add_logprobs(self, logprobs: TokenLogprobs) -> None:
        """Append those of the token that is added next to it."""
        self._logprobs.append(logprobs)

    def add_event(self, event: SequenceEvent) -> None:
        """Pass on one event."""
        self._events.append(event)
        self._wake()

    def end(self, finish_reason: str | None, error: Exception | None = None) -> None:
        """End it. The caller has checked that it was open."""
        self.stage = Stage.ENDED
        self.settled = False
        self._finish_reason = finish_reason
        self._error = error
        self._wake()
        self._listener = None  # which holds this sequence: a circle would keep both, and the request, until garbage is collected

    def truncate(self, num_tokens: int) -> None:
        """Drop pending tokens beyond `num_tokens`; what the handler has taken stays."""
        length = max(num_tokens, self._taken)
        del self.outputs[length:]
        del self._times[length - self._taken :]
        del self._logprobs[length - self._taken :]

    def stopped_by_own_rules(self, context_length: int) -> str | None:
        """`length` or `stop` if the outputs end it already, so that a crash between token and end cannot make it longer."""
        num_outputs = len(self.outputs)
        if num_outputs >= self.sampling.max_tokens or (num_outputs and len(self.prompt_ids) // 4 + num_outputs >= context_length):
            return "length"
        if num_outputs and num_outputs >= self.sampling.min_tokens and self.outputs[-1] in self.sampling.stop_token_ids:
            return "stop"
        return None

    def _wake(self) -> None:
        if self._listener is not None:
            self._wakeups.add(self._listener)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _shortened(sampling: Sampling, max_tokens: int) -> Sampling:
    return msgspec.structs.replace(sampling, max_tokens=min(max_tokens, sampling.max_tokens))
