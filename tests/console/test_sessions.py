"""Session cookies: which values count, and the file of the secret that signs them."""

from __future__ import annotations

import base64
import hmac
import json
import stat
from pathlib import Path

import pytest

from appliance.clock import ManualClock
from appliance.console.sessions import SessionCookies, load_secret
from appliance.errors import ConfigError

SECRET = bytes(range(32))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def _cookies(clock: ManualClock, digests: dict[str, bytes] | None = None, secret: bytes = SECRET) -> SessionCookies:
    return SessionCookies(secret, (digests if digests is not None else {"alice": b"a" * 32}).get, clock=clock, lifetime_seconds=100.0)


def test_a_cookie_counts_until_it_expires(clock: ManualClock) -> None:
    """The value names its key for as long as it lives, and not a moment longer."""
    cookies = _cookies(clock)
    value = cookies.issue("alice")
    clock.advance(99.9)
    session = cookies.read(value)
    assert session is not None
    assert session.name == "alice"
    clock.advance(0.1)
    assert cookies.read(value) is None


def test_two_logins_have_two_cookies(clock: ManualClock) -> None:
    """Ending one session leaves the other one open, and what is ended stays so."""
    cookies = _cookies(clock)
    first, second = cookies.issue("alice"), cookies.issue("alice")
    assert first != second
    cookies.revoke(first)
    cookies.revoke("nonsense")
    assert cookies.read(first) is None
    assert cookies.read(second) is not None


def test_a_replaced_or_removed_key_voids_its_cookies(clock: ManualClock) -> None:
    """The signature covers the key's digest: nobody stays in with a key that is gone."""
    digests = {"alice": b"a" * 32}
    cookies = _cookies(clock, digests)
    value = cookies.issue("alice")
    digests["alice"] = b"b" * 32
    assert cookies.read(value) is None
    del digests["alice"]
    assert cookies.read(value) is None
    with pytest.raises(ValueError, match="alice"):
        cookies.issue("alice")


def test_no_other_value_counts(clock: ManualClock) -> None:
    """Changed in any byte, signed with another secret, cut, or plain rubbish: it is nobody's session."""
    cookies = _cookies(clock, {"alice": b"a" * 32, "root": b"r" * 32})
    value = cookies.issue("alice")
    payload, _, signature = value.partition(".")
    fields = json.loads(base64.urlsafe_b64decode(payload + "=="))
    for changes in ({"name": "root"}, {"expires_wall": 1e12}, {"nonce": "x"}, {"admin": True}):
        forged = base64.urlsafe_b64encode(json.dumps(fields | changes).encode()).decode().rstrip("=")
        assert cookies.read(f"{forged}.{signature}") is None
        other = hmac.digest(b"other secret", base64.urlsafe_b64decode(forged + "=" * (-len(forged) % 4)), "sha256")
        assert cookies.read(f"{forged}.{base64.urlsafe_b64encode(other).decode().rstrip('=')}") is None
    assert _cookies(clock, {"alice": b"a" * 32}, secret=b"x" * 32).read(value) is None
    damaged = ("", ".", value[:-2], value[2:], payload, f"{payload}.", f".{signature}", f"{value}.{value}", "....")
    for rubbish in (*damaged, "é.ü", "a" * 5000, value + "A" * 2000):
        assert cookies.read(rubbish) is None, rubbish


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    """A new file of mode 0600 with a secret of its own; the next start reads the same one, and closes a file that others could read."""
    path = tmp_path / "console.secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert secret != load_secret(tmp_path / "another")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert load_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_secret_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    """A short file would make cookies that are easy to forge; a folder that is not there cannot hold one."""
    path = tmp_path / "console.secret"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="32 bytes"):
        load_secret(path)
    with pytest.raises(ConfigError):
        load_secret(tmp_path / "nowhere" / "console.secret")
