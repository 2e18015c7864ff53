"""From a request's fields to the engine's Sampling, one for each choice."""

from __future__ import annotations

import hashlib
import secrets

from appliance.api.schema import SamplingFields
from appliance.engine.wire import Sampling
from appliance.text.load import TextModel

_SMALLEST_TOP_P = 1e-6  # top_p = 0 means "the likeliest token only"; the engine takes shares above 0
_GREEDY_BELOW = 1e-5  # a lower temperature draws the likeliest token anyway, and logits over it may overflow
_SMALLEST_PENALTY = 1e-2  # 100 is the largest: lower ones would overflow logits to infinity


def mint_seed() -> int:
    """64 random bits, signed."""
    return secrets.randbits(64) - (1 << 63)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the request's own for the first, for others 64 bits of its SHA-256, so that choices differ and repeat."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def sampling_of(fields: SamplingFields, text: TextModel, *, seed: int, index: int, max_tokens: int, num_logprobs: int | None) -> Sampling:
    """How choice `index` is sampled. The model's end ids count as stop ids unless `ignore_eos`."""
    ends = set(fields.stop_token_ids or ())
    if not fields.ignore_eos:
        ends.update(text.eos_ids)
    top_k = fields.top_k if fields.top_k is not None and fields.top_k > 0 else 0
    temperature = _or(fields.temperature, 1.0)
    return Sampling(
        max_tokens=max_tokens,
        seed=choice_seed(seed, index),
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=top_k,
        top_p=max(_or(fields.top_p, 1.0), _SMALLEST_TOP_P),
        min_p=_or(fields.min_p, 0.0),
        repetition_penalty=max(_or(fields.repetition_penalty, 1.0), _SMALLEST_PENALTY),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        logit_bias=dict(fields.logit_bias or {}),
        min_tokens=min(fields.min_tokens or 0, max_tokens),
        stop_token_ids=tuple(sorted(ends)),
        num_logprobs=num_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
