"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from appliance.api import admission, sse
from appliance.api.body import read_request
from appliance.api.context import EXCHANGE, SERVICES
from appliance.api.generation import Piece
from appliance.api.logprobs import chat_logprobs
from appliance.api.off_loop import TEXT_POOL, off_loop
from appliance.api.plan import build_plan, refuse_unsupported
from appliance.api.reply import reply
from appliance.api.schema import ChatRequest, Message, chat_decoder
from appliance.api.services import Services
from appliance.api.usage import Usage
from appliance.errors import InvalidRequest
from appliance.text.load import TextModel

_TEXT_PARTS = ("text", "input_text", "refusal")
_MAX_TEMPLATE_KWARGS = 32


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, streamed or whole."""
    services, exchange = request.app[SERVICES], request[EXCHANGE]
    chat = await read_request(request, chat_decoder, services.settings.server.max_body_bytes)
    exchange.stream = bool(chat.stream)
    num_logprobs = _check(services, chat)
    facts = admission.engine_facts(services)
    exchange.admit()
    ids = await off_loop(request.app[TEXT_POOL], _size(chat.messages), lambda: tokenize_chat(services.text, chat))
    limit = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    plan = build_plan(services, exchange, chat, facts, [ids], prompt_param="messages", max_tokens=limit, num_logprobs=num_logprobs)
    renderer = _ChatRenderer(services, f"chatcmpl-{exchange.id}", int(exchange.received_wall), plan.include_usage, plan.return_token_ids)
    return await reply(request, services, exchange, plan, renderer)


def tokenize_chat(text: TextModel, chat: ChatRequest) -> list[int]:
    """The prompt's ids. Thread-safe. Raises InvalidRequest where the template refuses or there is none."""
    if text.chat_template is None:
        raise InvalidRequest("this model has no chat template: use /v1/completions, or start the server with one", param="messages")
    extra = dict(chat.chat_template_kwargs or {})
    if chat.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", chat.reasoning_effort)
    prompt = text.chat_template.render(
        [flatten(message, index) for index, message in enumerate(chat.messages)],
        add_generation_prompt=chat.add_generation_prompt is not False,
        continue_final_message=bool(chat.continue_final_message),
        extra=extra,
    )
    # The template writes BOS itself where the model wants it.
    return text.tokenizer.encode(prompt, add_special_tokens=bool(chat.add_special_tokens))


def flatten(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: content as one string, absent fields absent, arguments of tool calls as objects."""
    flat: dict[str, Any] = {"role": message.role}
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type not in _TEXT_PARTS:
                raise InvalidRequest(
                    f"content of type {part.type[:64]!r} is not supported; only text is", param=f"messages[{index}].content[{number}]"
                )
        content = "\n".join([part.text or part.refusal or "" for part in content])
    flat["content"] = content
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            flat[name] = value
    if message.tool_calls:
        flat["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return flat


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Clients send arguments as a JSON string; templates print them with `tojson`, which wants the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments: Any = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _check(services: Services, chat: ChatRequest) -> int | None:
    """Everything that needs no tokens. Returns num_logprobs for the engine."""
    admission.check_model(services, chat.model)
    if not chat.messages:
        raise InvalidRequest("messages must have at least one message", param="messages")
    if chat.tools and chat.tool_choice != "none":
        raise InvalidRequest('tools are not supported yet; send tool_choice "none" to have them ignored', param="tools")
    if chat.tool_choice not in (None, "none", "auto"):
        raise InvalidRequest('tool_choice is not supported yet, but "none" is', param="tool_choice")
    if chat.functions and chat.function_call != "none":
        raise InvalidRequest("functions are not supported", param="functions")
    if chat.modalities is not None and any(modality != "text" for modality in chat.modalities):
        raise InvalidRequest("modalities: only text is supported", param="modalities")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs = true", param="top_logprobs")
    if chat.continue_final_message and chat.add_generation_prompt:
        raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other", param="continue_final_message")
    if len(chat.chat_template_kwargs or ()) > _MAX_TEMPLATE_KWARGS:
        raise InvalidRequest(f"chat_template_kwargs has more than {_MAX_TEMPLATE_KWARGS} entries", param="chat_template_kwargs")
    refuse_unsupported(chat)
    num_logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    admission.check_caps(services, chat, num_prompts=1, num_logprobs=num_logprobs, logprobs_param="top_logprobs")
    return num_logprobs


def _size(messages: Sequence[Message]) -> int:
    """Characters to be templated and tokenized; a message counts for some itself."""
    size = 0
    for message in messages:
        size += 20
        if isinstance(message.content, str):
            size += len(message.content)
        elif message.content is not None:
            size += sum(len(part.text or "") for part in message.content)
    return size


class _ChatRenderer:
    """chat.completion and its chunks."""

    def __init__(self, services: Services, reply_id: str, created: int, include_usage: bool, return_token_ids: bool) -> None:
        self._id = reply_id
        self._created = created
        self._model = services.model_name
        self._tokenizer = services.text.tokenizer
        self._return_token_ids = return_token_ids
        self.text_members = None if return_token_ids else sse.CHAT_TEXT
        self.templates = sse.ChunkTemplates(
            reply_id=reply_id, kind="chat.completion.chunk", created=created, model=self._model, include_usage=include_usage
        )

    def opening(self, choice: int) -> bytes:
        return sse.chat_role()

    def bodies(self, piece: Piece) -> list[bytes]:
        bodies: list[bytes] = []
        if piece.text or piece.scores or (self._return_token_ids and piece.token_ids):
            body = sse.chat_delta(piece, None if piece.scores is None else chat_logprobs(self._tokenizer, piece.scores))
            bodies.append(body + sse.token_ids_member(piece.token_ids) if self._return_token_ids else body)
        if piece.finish_reason is not None:
            bodies.append(sse.chat_finish(piece))
        return bodies

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(pieces)],
            "usage": usage,
            "system_fingerprint": None,
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        scores = [score for piece in pieces for score in piece.scores or ()]
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join([piece.text for piece in pieces]), "refusal": None},
            "logprobs": None if pieces[-1].scores is None else chat_logprobs(self._tokenizer, scores),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice
