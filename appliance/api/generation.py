"""The running choices of one request: submits them, merges what they produce, turns ids into text, and leaves none behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import msgspec

from appliance.api.exchange import Exchange, Progress
from appliance.api.plan import Plan
from appliance.api.services import Services
from appliance.engine.client import Delta, Generation
from appliance.engine.wire import TokenLogprobs
from appliance.errors import ApplianceError, DeadlineExceeded, EngineFailed, Unavailable
from appliance.text.detokenizer import Detokenizer
from appliance.text.tokenizer import decode

LEAST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token's log-probability, and those of its likeliest rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one choice gained: certain text, and the tokens counted since the last piece."""

    choice: int
    text: str
    token_ids: list[int]
    scores: list[TokenScore] | None
    finish_reason: str | None  # stop or length; None while it goes on
    stop_reason: str | int | None = None  # the stop string or the stop token id that the client named; None for the model's own end


class Sink(Protocol):
    """Takes a request's output on the event loop, inside the engine client's wake-up: no task wakes for a token."""

    blocked: bool  # nothing is handed over, and nothing taken from the engine's client, until `advance` is called with this false

    def take(self, pieces: list[Piece], ended: bool) -> None:
        """Pieces that were ready together. `ended`: nothing follows. What it raises ends the request."""

    def fail(self, error: Exception) -> None:
        """The request ends with `error`; nothing follows."""


class Choices:
    """The sequences of one plan, from submission to the last token. One owner; call `close` whatever happened."""

    __slots__ = ("_closed", "_exchange", "_monotonic", "_plan", "_running", "_services", "_sink")

    def __init__(self, services: Services, exchange: Exchange, plan: Plan, sink: Sink) -> None:
        self._exchange = exchange
        self._running: list[_Choice] = []
        self._services = services
        self._monotonic = services.clock.monotonic
        self._plan = plan
        self._sink = sink
        self._closed = False

    def submit(self) -> None:
        """Hand every choice to the engine. Raises Unavailable or EngineFailed; what was submitted before is then aborted by `close`."""
        plan, services = self._plan, self._services
        for request in plan.requests:
            at = services.clock.monotonic()  # before the engine's first event: one that restarts says so while it takes the request
            generation = services.engine.submit(request)
            progress = self._exchange.submitted(generation, at)
            detokenizer = Detokenizer(services.text.tokenizer, stop=plan.stop, include_stop=plan.include_stop, skip_special=plan.skip_special)
            stop_ids = frozenset(request.sampling.stop_token_ids)
            self._running.append(_Choice(progress, generation, detokenizer, stop_ids, plan))
        services.observer.on_admitted(plan.num_prompt_tokens, sum(request.sampling.max_tokens for request in plan.requests))
        if self._exchange.texts is not None:
            prompts = {id(request.prompt_ids): request.prompt_ids for request in plan.requests}  # choices of one prompt share its list
            self._exchange.texts.prompts += [decode(services.text.tokenizer, ids, skip_special=False) for ids in prompts.values()]
        listener = self.advance
        for choice in self._running:
            choice.generation.listen(listener, every_token=plan.stream or bool(plan.stop))

    def advance(self) -> None:
        """Take what is ready of every choice and hand it to the sink, unless that is blocked. Never raises."""
        if self._sink.blocked or self._closed:
            return
        try:
            self._advance()
        except Exception as error:  # must reach the handler, whatever it is
            self.close()
            self._sink.fail(error)

    def close(self) -> None:
        """Abort what still runs; what had come and was not taken yet is generated all the same, and counted. Idempotent."""
        self._closed = True
        running, self._running = self._running, []
        for choice in running:
            if not choice.done:
                choice.done = True
                self._note(choice, choice.generation.take())
                choice.generation.abort()

    def _note(self, choice: _Choice, delta: Delta) -> None:
        """Times and counts of `delta`, for the ledger and the record."""
        if delta.events:
            self._exchange.note_events(choice.progress, delta.events)
        if delta.token_times:
            self._exchange.note_tokens(choice.progress, delta.token_times)

    def _advance(self) -> None:
        exchange = self._exchange
        monotonic = self._monotonic
        began = monotonic()
        pieces: list[Piece] = []
        ended = False
        for choice in self._running:
            delta = choice.generation.take()
            self._note(choice, delta)
            if delta.error is not None or delta.finish_reason in ("abort", "deadline", "error"):
                raise _error_of(delta)
            piece = choice.take(delta)
            if piece is None:
                continue
            if piece.finish_reason is not None:
                ended = True
                exchange.choice_ended(choice.index)
                if exchange.finish_reason is None or choice.index == 0:
                    exchange.finish_reason = piece.finish_reason
            if exchange.texts is not None:
                exchange.texts.add(choice.index, piece.text)
            pieces.append(piece)
        if not pieces:
            return
        if ended:
            self._running = [choice for choice in self._running if not choice.done]
            self._closed = not self._running
        self._sink.take(pieces, self._closed)
        exchange.detokenized(monotonic() - began)


class _Choice:
    """One sequence and its text."""

    __slots__ = ("_detokenizer", "_include_stop", "_named_stop_ids", "_stop_ids", "done", "generation", "index", "progress")

    def __init__(self, progress: Progress, generation: Generation, detokenizer: Detokenizer, stop_ids: frozenset[int], plan: Plan) -> None:
        self.progress = progress
        self.index = progress.choice
        self.generation = generation
        self.done = False
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids
        self._include_stop = plan.include_stop
        self._named_stop_ids = plan.named_stop_ids

    def take(self, delta: Delta) -> Piece | None:
        """The piece in `delta`; None for one without tokens or end. Tells the engine when a stop string ended the text."""
        ids = delta.token_ids
        if not ids and delta.finish_reason is None:
            return None
        detokenizer = self._detokenizer
        before = detokenizer.num_tokens
        stop_id = ids[-1] if ids and ids[-1] in self._stop_ids else None
        text = detokenizer.push(ids[:-1] if stop_id is not None and not self._include_stop else ids)
        scores = None if delta.logprobs is None else _scores(ids, delta.logprobs)
        if detokenizer.stop_reason is not None:
            counted = detokenizer.num_tokens - before
            self.done = True
            if delta.finish_reason is None or counted < len(ids):
                self.generation.finish(detokenizer.num_tokens)
            return Piece(self.index, text, ids[:counted], scores and scores[:counted], "stop", detokenizer.stop_reason)
        if delta.finish_reason is None:
            return Piece(self.index, text, ids, scores, None)
        self.done = True
        text += detokenizer.flush()
        reason = "length" if delta.finish_reason == "length" else "stop"
        return Piece(self.index, text, ids, scores, reason, stop_id if stop_id in self._named_stop_ids else None)


def _scores(ids: list[int], logprobs: list[TokenLogprobs]) -> list[TokenScore]:
    return [
        TokenScore(
            token_id,
            _finite(entry.logprob),
            tuple((top_id, _finite(value)) for top_id, value in zip(entry.top_ids, entry.top_logprobs, strict=True)),
        )
        for token_id, entry in zip(ids, logprobs, strict=False)
    ]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _error_of(delta: Delta) -> ApplianceError:
    if isinstance(delta.error, ApplianceError):
        return delta.error
    if delta.error is not None:
        raise delta.error  # a fault of our own: the middleware logs it and answers 500
    if delta.finish_reason == "deadline":
        return DeadlineExceeded("the request's deadline passed before it finished")
    if delta.finish_reason == "abort":
        return Unavailable("the server ended this request while stopping", code="aborted", retry_after_seconds=5)
    return EngineFailed("the engine ended this request with an error")
