"""What must hold between settings, and between a setting and this machine. Each check is skipped where one of its settings is wrong by itself."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from appliance.errors import ConfigProblem
from appliance.settings import Settings
from appliance.settings_reference import MASK, setting_fields, value_at
from appliance.webhook_urls import ALLOWED, is_webhook_url, printable

_Found = Iterator[tuple[str, str]]  # (key at fault, what is allowed)
STORE_SCHEMES = ("sqlite+aiosqlite", "postgresql+asyncpg")


def cross_checks(settings: Settings, sources: Mapping[str, str], failed: frozenset[str]) -> list[ConfigProblem]:
    """The problems between settings; `failed` are keys whose value in `settings` is a stand-in for one already reported."""
    problems = []
    for keys, check in _CHECKS:
        if failed.isdisjoint(keys):
            for key, allowed in check(settings):
                value = value_at(settings, key)
                text = MASK if setting_fields()[key].secret and value is not None else printable(str(value))
                problems.append(ConfigProblem(key, text, allowed, sources.get(key, "default")))
    return problems


def is_loopback(host: str) -> bool:
    """Whether binding to `host` reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys_off_loopback(settings: Settings) -> _Found:
    server = settings.server
    if not is_loopback(server.host) and server.api_key is None and server.api_keys_file is None:
        yield "server.host", "a loopback address, unless server.api_keys_file or server.api_key (APPLIANCE_SERVER__API_KEY) is set"


def _api_keys(settings: Settings) -> _Found:
    path, key = settings.server.api_keys_file, settings.server.api_key
    if key is not None and not key.get_secret_value().strip():
        yield "server.api_key", "a key that is not empty"
    if path is None:
        return
    if problem := _unreadable(path):
        yield "server.api_keys_file", problem
    elif not any(line.strip() and not line.lstrip().startswith("#") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()):
        yield "server.api_keys_file", "a file with at least one `name:key` line"


def _chat_template(settings: Settings) -> _Found:
    if settings.model.chat_template is not None and (problem := _unreadable(settings.model.chat_template)):
        yield "model.chat_template", problem


def _replicas(settings: Settings) -> _Found:
    if settings.scaling.min_replicas > settings.scaling.max_replicas:
        yield "scaling.min_replicas", f"at most scaling.max_replicas ({settings.scaling.max_replicas})"


def _windows(settings: Settings) -> _Found:
    if settings.metrics.fast_window_seconds > settings.metrics.slow_window_seconds:
        yield "metrics.fast_window_seconds", f"at most metrics.slow_window_seconds ({settings.metrics.slow_window_seconds})"


def _webhook_urls(settings: Settings) -> _Found:
    for number, url in enumerate(settings.scaling.webhook_urls, start=1):
        if not is_webhook_url(url):
            yield "scaling.webhook_urls", f"{ALLOWED}, unlike number {number}"


def _webhook_secret(settings: Settings) -> _Found:
    secret = settings.scaling.webhook_secret
    if secret is None:
        return
    parts = secret.get_secret_value().split()
    if not parts or not all(map(_is_webhook_secret, parts)):
        yield "scaling.webhook_secret", "`whsec_` + base64 of 24 to 64 bytes; several separated by spaces"


def _signed_delivery(settings: Settings) -> _Found:
    scaling = settings.scaling
    if scaling.mode == "act" and not scaling.webhook_urls:
        yield "scaling.mode", "`act` needs scaling.webhook_urls to deliver to"
    if (scaling.webhook_urls or scaling.mode == "act") and scaling.webhook_secret is None:
        yield "scaling.webhook_secret", "a secret: signals are signed (make one with `openssl rand -base64 32`, and put `whsec_` before it)"


def _kept_signals(settings: Settings) -> _Found:
    mode = settings.scaling.mode
    if mode in ("approve", "act") and not settings.store.enabled:
        yield (
            "scaling.mode",
            f"`off` or `advise` while store.enabled is false: with `{mode}`, decisions and their signals are kept in SQL until delivered",
        )


def _measured_signals(settings: Settings) -> _Found:
    mode = settings.scaling.mode
    if mode in ("approve", "act") and not settings.metrics.enabled:
        yield "scaling.mode", f"`off` or `advise` while metrics.enabled is false: with `{mode}`, signals are asked for that nothing could decide"


def _store_url(settings: Settings) -> _Found:
    url = settings.store.url
    if url is None:
        return
    from sqlalchemy.engine import make_url  # 50 ms that a command without a database need not spend
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url.get_secret_value())
    except (ArgumentError, ValueError):
        yield "store.url", "a SQLAlchemy URL: scheme://user:password@host:port/database, with a number as port"
        return
    if url.get_secret_value().partition("://")[0] not in STORE_SCHEMES:
        yield "store.url", f"a SQLAlchemy URL that starts with {' or '.join(scheme + '://' for scheme in STORE_SCHEMES)}"


def _is_webhook_secret(text: str) -> bool:
    if not text.startswith("whsec_"):
        return False
    try:
        return 24 <= len(base64.b64decode(text.removeprefix("whsec_"), validate=True)) <= 64
    except (binascii.Error, ValueError):
        return False


def _unreadable(path: Path) -> str | None:
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"a readable file ({error.strerror})"


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Settings], _Found]], ...] = (
    (("server.host", "server.api_key", "server.api_keys_file"), _keys_off_loopback),
    (("server.api_key", "server.api_keys_file"), _api_keys),
    (("model.chat_template",), _chat_template),
    (("scaling.min_replicas", "scaling.max_replicas"), _replicas),
    (("metrics.fast_window_seconds", "metrics.slow_window_seconds"), _windows),
    (("scaling.webhook_urls",), _webhook_urls),
    (("scaling.webhook_secret",), _webhook_secret),
    (("scaling.mode", "scaling.webhook_urls", "scaling.webhook_secret"), _signed_delivery),
    (("scaling.mode", "store.enabled"), _kept_signals),
    (("scaling.mode", "metrics.enabled"), _measured_signals),
    (("store.url",), _store_url),
)
