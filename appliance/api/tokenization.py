"""POST /tokenize and /detokenize, in the shapes of vLLM, SGLang, llama.cpp and TGI."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from appliance.api.admission import check_model
from appliance.api.body import read_request
from appliance.api.chat import tokenize_chat
from appliance.api.context import SERVICES
from appliance.api.off_loop import TEXT_POOL, off_loop
from appliance.api.schema import ChatRequest, TokenizeRequest, detokenize_decoder, tokenize_decoder
from appliance.api.status import json_response
from appliance.errors import InvalidRequest
from appliance.text.load import TextModel
from appliance.text.tokenizer import decode

_SOURCES = ("prompt", "content", "inputs", "messages")


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a text or a conversation: `tokens`, `count`, `max_model_len`, and with `return_token_strs` or `with_pieces` their spelling."""
    services = request.app[SERVICES]
    body = await read_request(request, tokenize_decoder, services.settings.server.max_body_bytes)
    check_model(services, body.model)
    given = [name for name in _SOURCES if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"exactly one of {', '.join(_SOURCES)} must be given, not {', '.join(given) or 'none'}", param=given[1] if given else "prompt"
        )
    size = len(getattr(body, given[0])) if given != ["messages"] else sum(len(str(message.content)) for message in body.messages or ())
    ids = await off_loop(request.app[TEXT_POOL], size, lambda: _ids(services.text, body))
    facts = services.engine.ready
    reply: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": None if facts is None else facts.context_length}
    tokenizer = services.text.tokenizer
    if body.return_token_strs:
        reply["token_strs"] = [tokenizer.token_name(token_id) for token_id in ids]
    if body.with_pieces:
        table = tokenizer.token_bytes(skip_special=False)
        reply["tokens"] = [{"id": token_id, "piece": _piece(table[token_id])} for token_id in ids]
    return json_response(reply)


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids, under each name by which a peer returns it."""
    services = request.app[SERVICES]
    body = await read_request(request, detokenize_decoder, services.settings.server.max_body_bytes)
    check_model(services, body.model)
    skip = bool(body.skip_special_tokens)
    text = await off_loop(request.app[TEXT_POOL], len(body.tokens), lambda: decode(services.text.tokenizer, body.tokens, skip_special=skip))
    return json_response({"prompt": text, "content": text, "text": text})


def _ids(text: TextModel, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        chat = ChatRequest(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
        )
        return tokenize_chat(text, chat)
    if body.content is not None:  # llama.cpp adds special tokens only when asked
        return text.tokenizer.encode(body.content, add_special_tokens=bool(body.add_special))
    plain = body.prompt if body.prompt is not None else body.inputs
    assert plain is not None  # checked by the handler
    return text.tokenizer.encode(plain, add_special_tokens=body.add_special_tokens is not False)


def _piece(raw: bytes) -> str | list[int]:
    """llama.cpp's convention: text, or the bytes where they are no UTF-8 by themselves."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
