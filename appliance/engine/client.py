"""The server's only door to the engine: starts the process, supervises it, submits sequences, replays them after a crash. Torch-free, asyncio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from appliance.engine.costs import Bill
from appliance.engine.wire import Heartbeat, Ready, Sampling, SequenceEvent, TokenLogprobs
from appliance.events import EngineEvent, StepStats


class SequenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence as the API asks for it."""

    prompt_ids: list[int]
    sampling: Sampling
    deadline_at: float | None = None  # CLOCK_MONOTONIC
    priority: int = 0
    key_id: str = ""
    cache_salt: str = ""


class Delta(msgspec.Struct, frozen=True):
    """What a sequence gained since the last look: everything that is ready at once, in order."""

    token_ids: list[int]
    token_times: list[float]  # CLOCK_MONOTONIC at which the server received each
    logprobs: list[TokenLogprobs] | None
    events: list[SequenceEvent]  # also "engine_restart" (replay begun) and "resumed", made by the client
    finish_reason: str | None  # stop, length, abort, deadline, finish; None while it goes on
    error: Exception | None  # an ApplianceError with which the request must end; beside finish_reason "deadline" a DeadlineExceeded


class Generation(Protocol):
    """One running sequence, owned by the handler that submitted it."""

    sequence_id: int
    num_cached_tokens: int
    num_preemptions: int
    num_restarts: int
    bill: Bill  # complete once it has ended

    async def next(self) -> Delta:
        """Wait until there is something, then take all of it. After a Delta with a finish_reason or an error only that end comes again."""

    def take(self) -> Delta:
        """All that there is, without waiting; an empty Delta if there is nothing."""

    def listen(self, listener: Callable[[], None], *, every_token: bool) -> None:
        """Have `listener` called, instead of waiting in `next`, whenever there is something to take.

        It runs on the event loop, never inside a call of ours, at most once a tick however much came and however many generations share it.
        Without `every_token` it is called for the first token, events and the end; the tokens between wait for one of these.
        """

    def abort(self) -> None:
        """The client is gone: out of the batch by the second step. Idempotent; harmless after the end."""

    def finish(self, num_tokens: int) -> None:
        """A stop string ended the text after `num_tokens` outputs: what the engine samples beyond is surplus. Ends it at once, with reason finish."""


class EngineObserver(Protocol):
    """What the client reports as it happens, on the event loop. Implemented by the metrics recorder (and the store, for events)."""

    def on_step(self, stats: StepStats, gaps: Sequence[tuple[float, int]]) -> None:
        """A step was done, with these inter-token latencies, grouped: (seconds, how many sequences)."""

    def on_engine_event(self, event: EngineEvent) -> None:
        """The process started, became ready, crashed, ..."""


class EngineClient(Protocol):
    """Interface of the client; `SupervisedEngine` is the real one."""

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or stopped."""

    @property
    def ready(self) -> Ready | None:
        """Facts of the newest engine that became ready."""

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The newest heartbeat."""

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""

    @property
    def num_in_flight(self) -> int:
        """Open sequences, waiting ones included."""

    async def start(self) -> None:
        """Spawn the process and return; readiness comes later."""

    async def wait_ready(self, timeout_seconds: float | None = None) -> Ready:
        """Facts of the engine once it serves. Raises EngineFailed with its own words if it cannot."""

    def submit(self, request: SequenceRequest) -> Generation:
        """Hand a sequence to the engine; while it restarts, the sequence waits. Raises Unavailable (loading, queue full) or EngineFailed."""

    async def close(self) -> None:
        """End the process (its socket closes; SIGKILL after five seconds) and every open generation with an error."""
