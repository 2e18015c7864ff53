"""One generation request on its way through the server: its ledger, its counts, and in the end its RequestRecord."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from appliance.api.services import Services
from appliance.engine.client import Generation
from appliance.engine.wire import SequenceEvent
from appliance.errors import ApplianceError
from appliance.events import LedgerState, RequestRecord, RequestUse
from appliance.logs import Texts
from appliance.metrics.ledger import Ledger

_SERVER = 0  # the ledger's lane for what the server does itself; choice i has lane i + 1
_STATE_OF_EVENT = {
    "queued": LedgerState.QUEUED,
    "scheduled": LedgerState.PREFILL,
    "prefill": LedgerState.PREFILL,
    "prefill_wait": LedgerState.PREFILL_WAIT,
    "prefilled": LedgerState.DECODE,
    "preempted": LedgerState.PREEMPTED,
    "resumed": LedgerState.PREFILL,  # it computes its lost blocks again; the next token makes it DECODE
    "engine_restart": LedgerState.ENGINE_RESTART,
}


class Progress:
    """What one choice has generated. Slotted, as is all that a token touches: its price is cache lines rather than instructions."""

    __slots__ = ("choice", "decoding", "first_at", "last_at", "max_itl", "num_tokens")

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.first_at = 0.0  # 0.0 before its first token
        self.last_at = 0.0
        self.max_itl = -1.0  # less than any gap
        self.decoding = False  # the ledger knows


class Exchange:
    """Mutable state of one request, owned by its handler. `close` builds the record and reports it, once, whatever happened."""

    __slots__ = (
        "_detokenize_seconds",
        "_progress",
        "_record",
        "_services",
        "_ttft",
        "client_request_id",
        "endpoint",
        "error",
        "finish_reason",
        "generations",
        "id",
        "key_id",
        "ledger",
        "max_tokens",
        "model",
        "num_choices",
        "num_prompt_tokens",
        "num_unwritten_tokens",
        "num_written_tokens",
        "received_at",
        "received_wall",
        "seed",
        "stream",
        "texts",
    )

    def __init__(self, services: Services, *, request_id: str, client_request_id: str | None, endpoint: str, received_at: float) -> None:
        self._services = services
        self.id = request_id
        self.client_request_id = client_request_id
        self.endpoint = endpoint
        self.received_at = received_at
        self.received_wall = services.clock.wall()
        self.ledger = Ledger(services.clock, received_at, keep_intervals=services.tracing.on)
        self.texts = Texts() if services.settings.log.prompts else None
        self.model = services.model_name
        self.key_id = ""
        self.stream = False
        self.num_choices = 1
        self.num_prompt_tokens = 0
        self.num_written_tokens = 0
        self.num_unwritten_tokens = 0  # in a reply that is built whole and not yet written
        self.seed: int | None = None
        self.max_tokens: int | None = None
        self.finish_reason: str | None = None
        self.error: ApplianceError | None = None
        self.generations: list[Generation] = []
        self._progress: list[Progress] = []  # by choice
        self._detokenize_seconds = 0.0  # noted by `detokenized`
        self._ttft: float | None = None
        self._record: RequestRecord | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; of several choices on one prompt, the one that found most."""
        return max((generation.num_cached_tokens for generation in self.generations), default=0)

    def admit(self) -> None:
        """Validated; what follows is template and tokens, then the engine's queue."""
        self.ledger.enter(LedgerState.ADMITTED)

    def submitted(self, generation: Generation, at: float) -> Progress:
        """The next choice went into the engine's hands at `at`. Returns what `note_events` and `note_tokens` want to know it by."""
        self.generations.append(generation)
        self.ledger.enter(LedgerState.QUEUED, at, choice=len(self.generations))
        progress = Progress(len(self._progress))
        self._progress.append(progress)
        return progress

    def note_events(self, progress: Progress, events: Iterable[SequenceEvent]) -> None:
        """What the engine says about a choice, each at its own time."""
        for event in events:
            state = _STATE_OF_EVENT.get(event.kind)
            if state is not None:
                self.ledger.enter(state, event.at, progress.choice + 1)
                progress.decoding = state is LedgerState.DECODE

    def note_tokens(self, progress: Progress, times: Sequence[float]) -> None:
        """Tokens of a choice reached the server at `times` (not empty)."""
        progress.num_tokens += len(times)
        last = progress.last_at
        if last:
            for at in times:
                if at - last > progress.max_itl:
                    progress.max_itl = at - last
                last = at
            progress.last_at = last
        else:
            self._note_first(progress, times)
        if not progress.decoding:  # an engine that sends no events, or a token behind a replay
            progress.decoding = True
            self.ledger.enter(LedgerState.DECODE, times[-1], progress.choice + 1)

    def _note_first(self, progress: Progress, times: Sequence[float]) -> None:
        progress.first_at, progress.last_at = times[0], times[-1]
        progress.max_itl = max((after - before for before, after in itertools.pairwise(times)), default=-1.0)
        if self._ttft is None:
            self._ttft = max(0.0, times[0] - self.received_at)
            self._services.observer.on_first_token(self._ttft, self.endpoint, self.id)
        else:
            self._services.observer.on_other_first_token()

    def detokenized(self, seconds: float) -> None:
        """Of the time since the newest token, which counts as decoding, the server has spent `seconds` on text and its writing.

        A change of state for every token would cost more than the work that it times; `close` moves the sum.
        """
        self._detokenize_seconds += seconds

    def detokenizing(self) -> None:
        """From now on the server builds a whole reply."""
        self.ledger.enter(LedgerState.DETOKENIZE, choice=_SERVER)

    def writing(self) -> None:
        """From now on the client is to take what is ready."""
        self.ledger.enter(LedgerState.WRITE_BLOCKED, choice=_SERVER)

    def written(self, num_tokens: int) -> None:
        """The client took it; the choices decide again what the request is doing."""
        self.num_written_tokens += num_tokens
        self.ledger.leave(choice=_SERVER)

    def choice_ended(self, choice: int) -> None:
        """No more tokens of this choice."""
        self.ledger.leave(choice=choice + 1)

    def close(self, status: int) -> RequestRecord:
        """End the request with `status`, or with its error's. Reports to the observer and the store. Idempotent."""
        if self._record is not None:
            return self._record
        states = self.ledger.close()
        moved = min(self._detokenize_seconds, states[LedgerState.DECODE])
        states[LedgerState.DECODE] -= moved
        states[LedgerState.DETOKENIZE] += moved
        error = self.error
        self._record = record = RequestRecord(
            id=self.id,
            client_request_id=self.client_request_id,
            endpoint=self.endpoint,
            model=self.model,
            key_id=self.key_id,
            stream=self.stream,
            received_wall=self.received_wall,
            duration_seconds=self.ledger.duration_seconds,
            status=error.status if error is not None else status,
            finish_reason=self.finish_reason if error is None else ("abort" if error.status == 499 else "error"),
            error_code=None if error is None else (error.code or error.type),
            num_choices=self.num_choices,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_generated_tokens=sum(progress.num_tokens for progress in self._progress),
            num_written_tokens=self.num_written_tokens,
            ttft_seconds=self._ttft,
            tpot_seconds=self._tpot(),
            max_itl_seconds=max((progress.max_itl for progress in self._progress if progress.max_itl >= 0.0), default=None),
            num_preemptions=sum(generation.num_preemptions for generation in self.generations),
            num_engine_restarts=max((generation.num_restarts for generation in self.generations), default=0),
            states=states,
            seed=self.seed,
            max_tokens=self.max_tokens,
            joules=self._joules(),
        )
        use = RequestUse(
            engine_seconds=sum(generation.bill.seconds for generation in self.generations),
            num_longest_tokens=max((progress.num_tokens for progress in self._progress), default=0),
        )
        if error is not None and error.status in (429, 503) and self._ttft is None:  # the engine's own refusal included
            self._services.observer.on_rejected(error.code or error.type)
        self._services.observer.on_request(record, use)
        self._services.on_record(record)
        return record

    def _joules(self) -> float | None:
        """Energy of its choices; None where the device's power is not known."""
        joules = [generation.bill.joules for generation in self.generations if generation.bill.joules is not None]
        return sum(joules) if joules else None

    def _tpot(self) -> float | None:
        if not self._progress or (first := self._progress[0]).num_tokens < 2:
            return None
        return (first.last_at - first.first_at) / (first.num_tokens - 1)
