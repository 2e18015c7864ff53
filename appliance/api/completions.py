"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from aiohttp import web

from appliance.api import admission, sse
from appliance.api.body import read_request
from appliance.api.context import EXCHANGE, SERVICES
from appliance.api.generation import Piece
from appliance.api.logprobs import completion_logprobs
from appliance.api.off_loop import TEXT_POOL, off_loop
from appliance.api.plan import Plan, build_plan, refuse_unsupported
from appliance.api.reply import reply
from appliance.api.schema import CompletionRequest, completion_decoder
from appliance.api.services import Services
from appliance.api.usage import Usage
from appliance.errors import InvalidRequest
from appliance.text.load import TextModel
from appliance.text.tokenizer import decode

_IDS_PER_CHARACTER = 4  # checking an id costs about a quarter of templating and tokenizing a character


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue texts or token ids, streamed or whole."""
    services, exchange = request.app[SERVICES], request[EXCHANGE]
    body = await read_request(request, completion_decoder, services.settings.server.max_body_bytes)
    exchange.stream = bool(body.stream)
    prompts = prompts_of(body.prompt)
    _check(services, body, len(prompts))
    facts = admission.engine_facts(services)
    exchange.admit()
    ids = await off_loop(request.app[TEXT_POOL], _size(prompts), lambda: tokenize_prompts(services.text, body, prompts))
    plan = build_plan(services, exchange, body, facts, ids, prompt_param="prompt", max_tokens=body.max_tokens, num_logprobs=body.logprobs)
    echoes = _echoes(services.text, plan, body, prompts) if body.echo else None
    renderer = _CompletionRenderer(services, f"cmpl-{exchange.id}", int(exchange.received_wall), plan, echoes)
    return await reply(request, services, exchange, plan, renderer)


def prompts_of(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The four shapes of `prompt` as a list of texts or lists of ids. Raises InvalidRequest for an empty or mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    kinds = {type(entry) for entry in prompt}
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if int in kinds:
        raise InvalidRequest("prompt mixes token ids with texts or lists", param="prompt")
    return cast("list[str | list[int]]", prompt)


def tokenize_prompts(text: TextModel, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """The ids of every prompt. Thread-safe."""
    special = body.add_special_tokens is not False
    return [text.tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt for prompt in prompts]


def _echoes(text: TextModel, plan: Plan, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> list[str]:
    """What `echo` puts before each choice: the prompt as it was given; where it was ids or was truncated, as it is run."""
    n = body.n or 1
    echoes: list[str] = []
    for index, request in enumerate(plan.requests):
        prompt = prompts[index // n]
        given = isinstance(prompt, str) and not body.truncate_prompt_tokens
        echoes.append(cast("str", prompt) if given else decode(text.tokenizer, request.prompt_ids, skip_special=False))
    return echoes


def _check(services: Services, body: CompletionRequest, num_prompts: int) -> None:
    """Everything that needs no tokens."""
    admission.check_model(services, body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not supported beyond n", param="best_of")
    if body.suffix:
        raise InvalidRequest("suffix is not supported", param="suffix")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo with logprobs is not supported: there are no logprobs of the prompt", param="logprobs")
    refuse_unsupported(body)
    admission.check_caps(services, body, num_prompts=num_prompts, num_logprobs=body.logprobs, logprobs_param="logprobs")


def _size(prompts: Sequence[str | list[int]]) -> int:
    """Characters to be tokenized, or their worth."""
    return sum(len(prompt) if isinstance(prompt, str) else len(prompt) // _IDS_PER_CHARACTER for prompt in prompts)


class _CompletionRenderer:
    """text_completion, whole and streamed."""

    def __init__(self, services: Services, reply_id: str, created: int, plan: Plan, echoes: list[str] | None) -> None:
        self._id = reply_id
        self._created = created
        self._model = services.model_name
        self._tokenizer = services.text.tokenizer
        self._return_token_ids = plan.return_token_ids
        self.text_members = None if plan.return_token_ids else sse.COMPLETION_TEXT
        self._echoes = echoes
        self._offsets = [0] * len(plan.requests)
        self.templates = sse.ChunkTemplates(
            reply_id=reply_id, kind="text_completion", created=created, model=self._model, include_usage=plan.include_usage
        )

    def opening(self, choice: int) -> bytes | None:
        return None if self._echoes is None else sse.completion_text(self._echoes[choice], None)

    def bodies(self, piece: Piece) -> list[bytes]:
        bodies: list[bytes] = []
        if piece.text or piece.scores or (self._return_token_ids and piece.token_ids):
            body = sse.completion_text(piece.text, self._logprobs(piece))
            bodies.append(body + sse.token_ids_member(piece.token_ids) if self._return_token_ids else body)
        if piece.finish_reason is not None:
            bodies.append(sse.completion_finish(piece))
        return bodies

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(pieces)],
            "usage": usage,
            "system_fingerprint": None,
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        scores = [score for piece in pieces for score in piece.scores or ()]
        echo = "" if self._echoes is None else self._echoes[index]
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + "".join([piece.text for piece in pieces]),
            "logprobs": None if pieces[-1].scores is None else completion_logprobs(self._tokenizer, scores, 0)[0],
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.scores is None:
            return None
        logprobs, self._offsets[piece.choice] = completion_logprobs(self._tokenizer, piece.scores, self._offsets[piece.choice])
        return logprobs
