"""API keys: where they come from and how one is recognised."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from appliance.errors import ConfigError, ConfigProblem
from appliance.settings import ServerSettings

_MAX_FILE_BYTES = 1 << 20


class ApiKeys:
    """The keys of this node, by name. Without any, every request is let in. Immutable."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        """`keys` maps the key's name (it appears in records) to its secret."""
        self._keys = [(name, secret.encode()) for name, secret in (keys or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, secret: str) -> str | None:
        """The name of the key, None if there is no such key. Takes the same time whichever matches: all are compared, none early."""
        given = secret.encode("utf-8", "surrogateescape")
        found: str | None = None
        for name, known in self._keys:
            if hmac.compare_digest(given, known):
                found = name
        return found

    def digest_of(self, name: str) -> bytes | None:
        """A digest that changes when the key of that name is replaced; None if there is no such key."""
        return next((hashlib.sha256(known).digest() for known_name, known in self._keys if known_name == name), None)


def load_keys(server: ServerSettings) -> ApiKeys:
    """The keys of `api_keys_file` (`name:key` or a bare key a line; # begins a comment) and of `api_key`. Raises ConfigError.

    A bare key is named after its fingerprint, so that records tell keys apart without holding them.
    """
    keys: dict[str, str] = {}
    if server.api_keys_file is not None:
        keys.update(_read(server.api_keys_file))
    if server.api_key is not None and (secret := server.api_key.get_secret_value().strip()):
        keys.setdefault("default", secret)
    return ApiKeys(keys)


def _read(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"over {_MAX_FILE_BYTES} bytes")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _problem(path, f"a readable file of `name:key` lines ({error})") from error
    keys: dict[str, str] = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, secret = line.partition(":")
        name, secret = (name.strip(), secret.strip()) if colon else (_fingerprint(line), line)
        if not name or not secret or len(name) > 64:
            raise _problem(path, f"line {number}: `name:key` with a name of 1-64 characters and a key")
        if name in keys:
            raise _problem(path, f"line {number}: the name {name!r} is given twice")
        keys[name] = secret
    if not keys:
        raise _problem(path, "at least one key (an empty file would leave the node open)")
    return keys


def _fingerprint(secret: str) -> str:
    return "key-" + hashlib.sha256(secret.encode()).hexdigest()[:8]


def _problem(path: Path, allowed: str) -> ConfigError:
    return ConfigError([ConfigProblem("server.api_keys_file", str(path), allowed, "settings")])
