"""Ids of requests: the server's own, and what a client may call its."""

from __future__ import annotations

import re
import secrets
import uuid

MAX_CLIENT_ID_LENGTH = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")


def mint_request_id(wall: float) -> uuid.UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random. Sorts by time, so it makes a good primary key."""
    milliseconds = int(wall * 1000) & ((1 << 48) - 1)
    value = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return uuid.UUID(int=value)


def clean_client_id(value: str | None) -> str | None:
    """A client's X-Request-Id without anything that could break a header, a log line or a page; None if nothing is left."""
    if not value:
        return None
    return _UNSAFE.sub("", value[: 4 * MAX_CLIENT_ID_LENGTH])[:MAX_CLIENT_ID_LENGTH] or None
