"""The bodies of requests, as the OpenAI specification has them, with the extras that users of other servers send.

Unknown fields never fail a request. Fields typed `Any` are accepted and ignored, or refused by name in `refusals`. A violation names its field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from appliance.errors import InvalidRequest

INT64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Natural = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

T = TypeVar("T", bound=msgspec.Struct)


class ContentPart(msgspec.Struct):
    """One part of a message; `text` and `refusal` parts have text, others are refused."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class StreamOptions(msgspec.Struct):
    """`include_usage`: a last chunk with the usage of the whole request."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`text`, `json_object` or `json_schema`."""

    type: str
    json_schema: Any = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat and completions share: how to sample, when to stop, how to deliver."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Natural | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Bias] | None = None
    seed: INT64 | None = None
    user: str | None = None
    # Extras of other servers, acted on.
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    stop_token_ids: list[TokenId] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Natural | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None
    request_id: str | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    return_token_ids: bool | None = None
    # Accepted in form, refused by name when they ask for something.
    prompt_logprobs: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    structured_outputs: Any = None
    response_format: ResponseFormat | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Natural | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    # The specification's fields that do not apply here.
    metadata: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Count | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize, in the shapes of vLLM (`prompt` or `messages`), llama.cpp (`content`) and TGI (`inputs`)."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    inputs: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None
    skip_special_tokens: bool | None = None


chat_decoder = msgspec.json.Decoder(ChatRequest)
completion_decoder = msgspec.json.Decoder(CompletionRequest)
tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The request in `body`. Raises InvalidRequest that names the field at fault (`param`), or says that the body is no proper JSON.

    A name given twice in one object is refused: a proxy that reads the first and a server that reads the last would disagree on the request.
    """
    try:
        request = decoder.decode(body)
        json.loads(body, object_pairs_hook=_refuse_duplicates)
    except InvalidRequest:
        raise
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"invalid request body: {error}", param=_param(str(error))) from error
    except RecursionError as error:
        raise InvalidRequest("invalid request body: the JSON is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"invalid request body: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (msgspec.DecodeError, ValueError) as error:
        hint = "; an escape such as \\ud800 must be half of a surrogate pair" if b"\\u" in body else ""
        raise InvalidRequest(f"invalid request body: {error}{hint}") from error
    return request


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({name for name, _ in pairs}) < len(pairs):
        names: Sequence[str] = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise InvalidRequest(f"invalid request body: the name {twice[:64]!r} occurs twice in one object", param=twice[:64])


_PATH = re.compile(r"at (?:`key` in )?`\$\.?([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]+)`")


def _param(message: str) -> str | None:
    """`Expected `int`, got `str` - at `$.messages[0].role`` -> messages[0].role."""
    path = match[1] if (match := _PATH.search(message)) else ""
    if missing := _MISSING.search(message):
        path = f"{path}.{missing[1]}" if path else missing[1]
    return path.removesuffix("[...]") or None
