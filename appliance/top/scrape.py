"""Asks an appliance over HTTP: its exposition, parsed, and what else it tells. Blocking; each question has a limit."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "appliance_"
_MAX_BYTES = 32 << 20
_MAX_ERROR_BYTES = 4096


class ServerAway(Exception):
    """No usable answer; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts by upper edge, +Inf last, over all labels."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    total: float  # the sum of all values

    @property
    def count(self) -> float:
        """Observations."""
        return self.counts[-1] if self.counts else 0.0

    def since(self, before: Histogram | None) -> Histogram:
        """What was observed after `before`; everything where that has other buckets, or more in one of them (another process)."""
        if before is None or before.edges != self.edges or any(now < then for now, then in zip(self.counts, before.counts, strict=True)):
            return self
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Histogram(self.edges, counts, self.total - before.total)

    def quantile(self, share: float) -> float | None:
        """As Prometheus' histogram_quantile: linear within a bucket, the last finite edge beyond it; None without observations."""
        if not self.count:
            return None
        rank = share * self.count
        index = bisect_left(self.counts, rank)
        if index >= len(self.edges) - 1:
            return self.edges[-2] if len(self.edges) > 1 else None
        low, below = (self.edges[index - 1], self.counts[index - 1]) if index else (0.0, 0.0)
        inside = self.counts[index] - below
        return low + (self.edges[index] - low) * ((rank - below) / inside if inside else 1.0)

    @property
    def mean(self) -> float | None:
        """Mean of the values; None without observations."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Scrape:
    """One exposition: every sample of ours by its name without the prefix."""

    at: float  # CLOCK_MONOTONIC of this machine
    samples: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over the samples that match; None where the name is not exported."""
        found = self.samples.get(name)
        if found is None:
            return None
        return sum(value for own, value in found if all(own.get(label) == wanted for label, wanted in labels.items()))

    def labelled(self, name: str, label: str) -> dict[str, float]:
        """Value by a label, other labels summed."""
        values: dict[str, float] = {}
        for own, value in self.samples.get(name, ()):
            if label in own:
                values[own[label]] = values.get(own[label], 0.0) + value
        return values

    def info(self, name: str) -> dict[str, str]:
        """The labels of a sample that is 1, {} where there is none."""
        return next((own for own, value in self.samples.get(name, ()) if value == 1), {})

    def histogram(self, name: str) -> Histogram | None:
        """A histogram over all its labels; None where it is not exported."""
        buckets = {float(edge): count for edge, count in self.labelled(f"{name}_bucket", "le").items()}
        if not buckets:
            return None
        edges = tuple(sorted(buckets))
        return Histogram(edges, tuple(buckets[edge] for edge in edges), self.total(f"{name}_sum") or 0.0)


def parse(text: str, at: float) -> Scrape:
    """An exposition in Prometheus' text format. Raises ServerAway for what is none, or not an appliance's."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            if family.name.startswith(_PREFIX):
                for sample in family.samples:
                    samples.setdefault(sample.name.removeprefix(_PREFIX), []).append((sample.labels, sample.value))
    except ValueError as error:
        raise ServerAway(f"/metrics is no exposition: {str(error)[:100]}") from error
    if not samples:
        raise ServerAway("/metrics has no family named appliance_*: is this an inference appliance?")
    return Scrape(at, samples)


class Target:
    """One appliance. Follows no redirect, since that would carry the key to whoever it points at."""

    def __init__(self, url: str, key: str | None, timeout_seconds: float = 5.0) -> None:
        """`url` with or without a path; raises ValueError where it is no http or https URL."""
        url = url if "://" in url else f"http://{url}"
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is no http or https URL")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/metrics').removesuffix('/v1')}"
        self._headers = {"Accept": "text/plain", "User-Agent": "appliance-top"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = timeout_seconds
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if _is_loopback(parts.hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def scrape(self) -> Scrape:
        """The exposition now. Raises ServerAway."""
        return parse(self._get("/metrics").decode("utf-8", "replace"), time.monotonic())

    def rows(self, path: str, member: str) -> list[dict[str, Any]] | None:
        """The list `member` of a JSON reply; None where the route is not there, or not for us."""
        try:
            reply = json.loads(self._get(path))
        except (ServerAway, ValueError):
            return None
        rows = reply.get(member) if isinstance(reply, dict) else None
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else None

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers=self._headers)  # noqa: S310 - http or https, checked above
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                body: bytes = response.read(_MAX_BYTES + 1)
                missing = response.length  # what was promised and did not come; None where nothing was promised
        except urllib.error.HTTPError as error:
            with error:
                raise ServerAway(_refusal(path, error)) from error
        except urllib.error.URLError as error:
            reason = error.reason
            raise ServerAway(str(getattr(reason, "strerror", None) or reason)) from error
        except (OSError, http.client.HTTPException) as error:  # in the middle of the reply
            raise ServerAway(str(error) or type(error).__name__) from error
        if len(body) > _MAX_BYTES:
            raise ServerAway(f"{path} is over {_MAX_BYTES >> 20} MiB")
        if missing:
            raise ServerAway(f"the reply to {path} was cut short")
        return body


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _refusal(path: str, error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return "the API key is missing or not known: --key-file, or the environment (--api-key-env)"
    if error.code in (301, 302, 303, 307, 308):
        return f"{path} redirects to {error.headers.get('Location', '?')[:200]}: give that URL"
    try:
        message = json.loads(error.read(_MAX_ERROR_BYTES))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        message = error.reason
    return f"{path} answered {error.code}: {message}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
