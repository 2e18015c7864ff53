"""Signed session cookies: what proves that a browser has shown an API key, without holding the key."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from appliance.clock import Clock
from appliance.errors import ConfigError, ConfigProblem

SESSION_SECONDS = 12 * 3600.0  # a working day; after it the key is asked for again
_SECRET_BYTES = 32
_CONTEXT = b"appliance console session 1\0"  # this secret signs nothing else, and a later format is another context
_MAX_COOKIE_CHARACTERS = 1024
_MAX_REVOKED = 10_000


class Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a cookie says. `name` is the API key's name, `nonce` makes each login's cookie its own."""

    name: str
    expires_wall: float
    nonce: str


class SessionCookies:
    """Issues and reads cookie values. A value is void once it expires, once it is revoked, and once its key is replaced or taken away.

    `digest_of(name)` is a digest of the key of that name, None if there is none. Revocations last as long as the process; what was issued before a
    restart ends with its expiry, or with the secret's file.
    """

    def __init__(self, secret: bytes, digest_of: Callable[[str], bytes | None], *, clock: Clock, lifetime_seconds: float = SESSION_SECONDS) -> None:
        self.lifetime_seconds = lifetime_seconds
        self._secret = secret
        self._digest_of = digest_of
        self._clock = clock
        self._revoked: dict[str, float] = {}  # nonce -> expiry

    def issue(self, name: str) -> str:
        """A cookie value for whoever has shown the key `name`."""
        digest = self._digest_of(name)
        if digest is None:
            raise ValueError(f"there is no API key named {name!r}")
        session = Session(name, self._clock.wall() + self.lifetime_seconds, secrets.token_urlsafe(16))
        payload = msgspec.json.encode(session)
        return f"{_text(payload)}.{_text(self._sign(payload, digest))}"

    def read(self, value: str) -> Session | None:
        """The session of a cookie value; None for any that does not count."""
        if len(value) > _MAX_COOKIE_CHARACTERS:
            return None
        encoded, _, signature = value.partition(".")
        try:
            payload, given = _bytes(encoded), _bytes(signature)
            session = msgspec.json.decode(payload, type=Session)
        except (ValueError, binascii.Error, msgspec.MsgspecError):
            return None
        digest = self._digest_of(session.name)
        if digest is None or not hmac.compare_digest(given, self._sign(payload, digest)):
            return None
        if session.expires_wall <= self._clock.wall() or session.nonce in self._revoked:
            return None
        return session

    def revoke(self, value: str) -> None:
        """Make a valid value void from now on."""
        session = self.read(value)
        if session is None:
            return
        now = self._clock.wall()
        if len(self._revoked) >= _MAX_REVOKED:
            self._revoked = {nonce: expires for nonce, expires in self._revoked.items() if expires > now}
        self._revoked[session.nonce] = session.expires_wall

    def _sign(self, payload: bytes, digest: bytes) -> bytes:
        return hmac.digest(self._secret, _CONTEXT + len(digest).to_bytes(2, "big") + digest + payload, "sha256")


def load_secret(path: Path) -> bytes:
    """The signing secret in the file `path`, made (mode 0600) if it is not there. Raises ConfigError where it cannot be used."""
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        else:
            secret = secrets.token_bytes(_SECRET_BYTES)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret)
    except OSError as error:
        raise _problem(path, f"a file that can be read and written ({error})") from error
    if len(secret) != _SECRET_BYTES:
        raise _problem(path, f"a file of {_SECRET_BYTES} bytes (delete it: a new one is made, and everyone logs in again)")
    return secret


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _problem(path: Path, allowed: str) -> ConfigError:
    return ConfigError([ConfigProblem("state_dir", str(path), allowed, "settings")])
