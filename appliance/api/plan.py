"""A validated request in the form in which it is run: prompts, sampling per choice, how its text is cut. Common to both endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.api import admission
from appliance.api.exchange import Exchange
from appliance.api.sampling import mint_seed, sampling_of
from appliance.api.schema import SamplingFields
from appliance.api.services import Services
from appliance.engine.client import SequenceRequest
from appliance.engine.wire import Ready
from appliance.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Plan:
    """What `submit` hands to the engine, and how its output becomes text. Choice i belongs to prompt i // n."""

    requests: tuple[SequenceRequest, ...]
    num_prompt_tokens: int  # every prompt counted once
    stop: tuple[str, ...]
    named_stop_ids: frozenset[int]  # the client's own
    include_stop: bool
    skip_special: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool


def refuse_unsupported(fields: SamplingFields) -> None:
    """Raises InvalidRequest for extras that are understood but not served yet, naming the field."""
    if fields.response_format is not None and fields.response_format.type != "text":
        raise InvalidRequest(f"response_format {fields.response_format.type!r} is not supported yet; only text is", param="response_format")
    for param in ("structured_outputs", "prompt_logprobs", "allowed_token_ids", "bad_words"):
        if getattr(fields, param) not in (None, False, [], {}):
            raise InvalidRequest(f"{param} is not supported yet", param=param)


def build_plan(
    services: Services,
    exchange: Exchange,
    fields: SamplingFields,
    facts: Ready,
    prompts: Sequence[list[int]],
    *,
    prompt_param: str,
    max_tokens: int | None,
    num_logprobs: int | None,
) -> Plan:
    """The plan for tokenized `prompts`. Notes the request's numbers in `exchange`.

    Raises InvalidRequest, ContextLengthExceeded, or Unavailable when the queue is full.
    """
    admission.check_ids(fields, facts)
    seed = fields.seed if fields.seed is not None else mint_seed()
    deadline_at = exchange.received_at + services.settings.server.request_timeout_seconds
    n = fields.n or 1
    requests: list[SequenceRequest] = []
    num_prompt_tokens = 0
    for full_prompt in prompts:
        ids = full_prompt[-fields.truncate_prompt_tokens :] if fields.truncate_prompt_tokens else full_prompt
        admission.check_prompt_ids(ids, facts, prompt_param)
        num_prompt_tokens += len(ids)
        room = admission.room_for_output(len(ids), max_tokens, facts, prompt_param)
        for _ in range(n):
            sampling = sampling_of(fields, services.text, seed=seed, index=len(requests), max_tokens=room, num_logprobs=num_logprobs)
            requests.append(
                SequenceRequest(
                    prompt_ids=ids,
                    sampling=sampling,
                    deadline_at=deadline_at,
                    priority=fields.priority or 0,
                    key_id=exchange.key_id,
                    cache_salt=fields.cache_salt or "",
                )
            )
    admission.check_room(services, facts, len(requests))
    exchange.seed = seed
    exchange.num_choices = len(requests)
    exchange.num_prompt_tokens = num_prompt_tokens
    exchange.max_tokens = max(request.sampling.max_tokens for request in requests)
    return Plan(
        requests=tuple(requests),
        num_prompt_tokens=num_prompt_tokens,
        stop=admission.stop_strings(fields),
        named_stop_ids=frozenset(fields.stop_token_ids or ()),
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special=fields.skip_special_tokens is not False,
        stream=bool(fields.stream),
        include_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        return_token_ids=bool(fields.return_token_ids),
    )
