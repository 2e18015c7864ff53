"""Whether a request is let in: is the node serving, is there room, is it within the caps, does it fit the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

from appliance.api.schema import SamplingFields
from appliance.api.services import Services
from appliance.engine.wire import Ready
from appliance.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, NotFound, Unavailable

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters; a token's search for stop strings costs their number times their length
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_PROMPTS = 256
MAX_SEQUENCES = 1024  # prompts times n
_LONGEST_WAIT_SECONDS = 60.0


def why_not_ready(services: Services) -> Unavailable | EngineFailed | None:
    """The reason why a request would not be served now; None if it would. A restart counts: /ready says so while submitted requests wait."""
    state = services.engine.state
    if services.drain.draining:
        return Unavailable("the server is draining: it finishes open requests and stops", code="draining", retry_after_seconds=5)
    if state == "starting":
        return Unavailable(_loading_message(services), code="loading", retry_after_seconds=_seconds_to_load(services))
    if state == "restarting":
        return Unavailable("the engine is restarting", code="engine_restarting", retry_after_seconds=_seconds_to_load(services))
    if state == "failed":
        return EngineFailed("the engine has failed and will not be restarted; the server's log says why")
    if state != "ready" or services.engine.ready is None:
        return Unavailable(f"the engine is {state}", code="engine_stopped", retry_after_seconds=5)
    return None


def engine_facts(services: Services) -> Ready:
    """Facts of the engine that will serve. Raises Unavailable while draining or loading, EngineFailed. A restarting engine is waited for."""
    ready = services.engine.ready
    if services.engine.state == "restarting" and ready is not None and not services.drain.draining:
        return ready
    if (reason := why_not_ready(services)) is not None:
        raise reason
    assert ready is not None  # else why_not_ready had a reason
    return ready


def check_model(services: Services, model: str | None) -> None:
    """Raises NotFound for a model that is not served here."""
    if model is not None and model != services.model_name:
        raise NotFound(f"the model {model[:128]!r} does not exist; this node serves {services.model_name!r}", param="model", code="model_not_found")


def check_room(services: Services, facts: Ready, num_sequences: int) -> None:
    """Raises Unavailable when the engine's queue could not take so many more."""
    bound = services.settings.engine.max_waiting + facts.max_num_seqs
    in_flight = services.engine.num_in_flight
    if in_flight + num_sequences > bound:
        # One batch's worth of sequences per second is a guess on the safe side of most loads; what matters is that it grows with the backlog.
        wait = min(_LONGEST_WAIT_SECONDS, max(1.0, in_flight / max(1, facts.max_num_seqs)))
        raise Unavailable(
            f"the queue is full: {in_flight} sequences in flight, {bound} at most", code="queue_full", retry_after_seconds=math.ceil(wait)
        )


def check_caps(services: Services, fields: SamplingFields, *, num_prompts: int, num_logprobs: int | None, logprobs_param: str) -> None:
    """Raises InvalidRequest, naming the field, for numbers that would cost without bound."""
    server = services.settings.server
    n = fields.n or 1
    if n > server.max_choices:
        raise InvalidRequest(f"n = {n} is over this server's limit of {server.max_choices}", param="n")
    if num_prompts > MAX_PROMPTS or num_prompts * n > MAX_SEQUENCES:
        raise InvalidRequest(f"{num_prompts} prompts with n = {n}: at most {MAX_PROMPTS} prompts and {MAX_SEQUENCES} choices", param="prompt")
    if num_logprobs is not None and num_logprobs > server.max_logprobs:
        raise InvalidRequest(f"{logprobs_param} = {num_logprobs} is over this server's limit of {server.max_logprobs}", param=logprobs_param)
    _check_stops(fields)
    if len(fields.logit_bias or ()) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(fields.logit_bias or ())} entries, {MAX_LOGIT_BIAS} at most", param="logit_bias")
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequest("stream_options is only allowed with stream = true", param="stream_options")


def check_ids(fields: SamplingFields, facts: Ready) -> None:
    """Raises InvalidRequest for token ids that the model does not have."""
    for param, ids in (("logit_bias", fields.logit_bias or ()), ("stop_token_ids", fields.stop_token_ids or ())):
        if (worst := max(ids, default=0)) >= facts.vocab_size or min(ids, default=0) < 0:
            raise InvalidRequest(f"{param}: token id {worst} is not in 0-{facts.vocab_size - 1}", param=param)


def check_prompt_ids(ids: Sequence[int], facts: Ready, param: str) -> None:
    """Raises InvalidRequest for an empty prompt or ids that the model does not have."""
    if not ids:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param=param)
    if (worst := max(ids)) >= facts.vocab_size:
        raise InvalidRequest(f"{param}: token id {worst} is not in 0-{facts.vocab_size - 1}", param=param)


def room_for_output(num_prompt_tokens: int, asked: int | None, facts: Ready, param: str) -> int:
    """max_tokens: what was asked for, at most what fits behind the prompt. Raises ContextLengthExceeded if not even one token does."""
    room = facts.context_length - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens; this node holds at most {facts.context_length} tokens of prompt and output together",
            param=param,
        )
    return room if asked is None else min(asked, room)


def _check_stops(fields: SamplingFields) -> None:
    stops = stop_strings(fields)
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stops)} strings, {MAX_STOP_STRINGS} at most", param="stop")
    if any(not 1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise InvalidRequest(f"every stop string must have 1-{MAX_STOP_LENGTH} characters", param="stop")
    if len(fields.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} entries", param="stop_token_ids")


def stop_strings(fields: SamplingFields) -> tuple[str, ...]:
    """`stop` as a tuple; a single string is one."""
    if fields.stop is None:
        return ()
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)


def _loading_message(services: Services) -> str:
    heartbeat = services.engine.heartbeat
    if heartbeat is None:
        return "the engine is starting"
    share = f", {heartbeat.progress:.0%}" if heartbeat.progress else ""
    return f"the engine is starting ({heartbeat.phase}{share})"


def _seconds_to_load(services: Services) -> float:
    """What is left of the load, extrapolated from its progress; 5 s where nothing is known."""
    heartbeat = services.engine.heartbeat
    if heartbeat is None or not 0 < heartbeat.progress < 1:
        return 5.0
    spent = max(0.0, services.clock.monotonic() - heartbeat.phase_started_at)
    return float(math.ceil(min(_LONGEST_WAIT_SECONDS, max(1.0, spent * (1 - heartbeat.progress) / heartbeat.progress))))
