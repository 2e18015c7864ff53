"""Server-sent events, from byte templates: only text and token lists are encoded per chunk, everything else is there already.

Shapes: the specification's `chat.completion.chunk` and streamed `text_completion` objects.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from appliance.api.generation import Piece
from appliance.api.usage import Usage

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
CHAT_TEXT = (b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null')  # around the text of a delta that holds nothing else
COMPLETION_TEXT = (b'"text":', b',"logprobs":null,"finish_reason":null')
_encoder = msgspec.json.Encoder()
encode = _encoder.encode


class ChunkTemplates:
    """The constant bytes around what changes, for one stream. `begin` opens the first choice, `end` closes the object."""

    def __init__(self, *, reply_id: str, kind: str, created: int, model: str, include_usage: bool) -> None:
        self._head = (
            b'data: {"id":' + encode(reply_id) + b',"object":' + encode(kind) + b',"created":%d,"model":' % created + encode(model) + b',"choices":['
        )
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def frame(self, choice: int, members: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """What stands before and behind the one value, between `members`, that changes from chunk to chunk of a choice."""
        return b'%b{"index":%d,%b' % (self._head, choice, members[0]), _joined(members[1], self._end)

    def chunk(self, choice: int, body: bytes) -> bytes:
        """One event for one choice; `body` holds its members behind the index."""
        return b'%b{"index":%d,%b%b' % (self._head, choice, body, self._end)

    def usage(self, usage: Usage) -> bytes:
        """The last event before DONE: no choices, the usage of the whole request."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"


@lru_cache(maxsize=16)
def _joined(first: bytes, second: bytes) -> bytes:
    """One object for all streams, which stays in the processor's caches."""
    return first + second


def chat_role() -> bytes:
    """The first delta of a choice."""
    return b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


def chat_delta(piece: Piece, logprobs: dict[str, Any] | None) -> bytes:
    """A delta with text."""
    if logprobs is None:
        return CHAT_TEXT[0] + encode(piece.text) + CHAT_TEXT[1]
    return b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (encode(piece.text), encode(logprobs))


def chat_finish(piece: Piece) -> bytes:
    """The delta that ends a choice."""
    return b'"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b' % (encode(piece.finish_reason), encode(piece.stop_reason))


def completion_text(text: str, logprobs: dict[str, Any] | None) -> bytes:
    """A piece of a completion."""
    if logprobs is None:
        return COMPLETION_TEXT[0] + encode(text) + COMPLETION_TEXT[1]
    return b'"text":%b,"logprobs":%b,"finish_reason":null' % (encode(text), encode(logprobs))


def completion_finish(piece: Piece) -> bytes:
    """The end of a completion's choice."""
    return b'"text":"","logprobs":null,"finish_reason":%b,"stop_reason":%b' % (encode(piece.finish_reason), encode(piece.stop_reason))


def token_ids_member(token_ids: list[int]) -> bytes:
    """The extra member of `return_token_ids`, to be put behind a body."""
    return b',"token_ids":' + encode(token_ids)


def error_event(body: bytes) -> bytes:
    """An error after the first byte."""
    return b"data: %b\n\n" % body
