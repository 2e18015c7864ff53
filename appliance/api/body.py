"""Reading the body of a request."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from appliance.api.off_loop import TEXT_POOL, off_loop
from appliance.api.schema import decode
from appliance.errors import ClientGone, InvalidRequest, PayloadTooLarge, UnsupportedMediaType

T = TypeVar("T", bound=msgspec.Struct)


async def read_request(request: web.Request, decoder: msgspec.json.Decoder[T], max_bytes: int) -> T:
    """The decoded body. Raises PayloadTooLarge before reading where the length is announced, UnsupportedMediaType, InvalidRequest, ClientGone."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    if "Content-Type" in request.headers and not _is_json(request.content_type):
        raise UnsupportedMediaType(f"the body must be application/json, not {request.content_type[:64]}")
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise _too_large(max_bytes) from error
    except HttpProcessingError as error:
        raise InvalidRequest(f"the body cannot be read: {error.message}") from error
    except web.RequestPayloadError as error:  # it is not what Content-Encoding says
        request.content.feed_eof()  # or aiohttp would read on after the reply, and log what it meets as a fault of ours
        raise InvalidRequest("the body cannot be read: it does not match its Content-Encoding") from error
    except ConnectionError as error:
        raise ClientGone("the client disconnected before its request was complete") from error
    # Decoding costs about 1/30 of tokenizing as many bytes.
    return await off_loop(request.app[TEXT_POOL], len(body) // 30, lambda: decode(decoder, body))


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is over this server's limit of {max_bytes} bytes")
