"""Signed signals: Standard Webhooks 1.0 (www.standardwebhooks.com) around CloudEvents 1.0 bodies, and the courier that delivers the outbox.

A signal states the absolute number of replicas wanted, with a sequence number and an expiry: one that comes late or twice does no harm, and a newer
one replaces it. Hence at-least-once delivery with the same webhook-id, and no schedule that outlives the signal.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol
from urllib.parse import quote

import aiohttp
import msgspec
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks.webhooks import Webhook

import appliance
from appliance.clock import Clock
from appliance.errors import ConfigError, ConfigProblem
from appliance.events import ScaleDecision
from appliance.store.outbox import GONE, Attempt, Outbox, Pending
from appliance.webhook_urls import ALLOWED, is_webhook_url, printable

MAX_BODY_BYTES = 20_000
_FIRST_RETRY_SECONDS = 1.0
_LAST_RETRY_SECONDS = 60.0
_IDLE_SECONDS = 30.0  # the courier looks again after this long even if nobody wakes it
_TIMEOUT = aiohttp.ClientTimeout(total=15.0, connect=5.0)
_log = logging.getLogger(__name__)


class CourierObserver(Protocol):
    """Hears of every attempt, on the event loop. The metrics recorder implements it."""

    def on_delivery(self, outcome: str, num_pending: int) -> None:
        """`outcome` is delivered, failed (to be tried again), dead or superseded; so many signals still wait."""


def cloud_event(decision: ScaleDecision) -> str:
    """The body of the signal: a CloudEvent in JSON, of type appliance.scale.up, .down or .pinned, whose data is the decision. Under 20 kB."""
    for kept in (decision, msgspec.structs.replace(decision, alternatives=()), msgspec.structs.replace(decision, alternatives=(), inputs={})):
        event = CloudEvent(
            {
                "id": decision.id,
                "source": f"/fleets/{quote(decision.fleet, safe='')}/instances/{quote(decision.instance_id, safe='')}",
                "type": f"appliance.scale.{decision.direction}",
                "subject": decision.fleet,
                "time": datetime.fromtimestamp(decision.at_wall, UTC),
                "datacontenttype": "application/json",
            },
            json.loads(msgspec.json.encode(kept)),  # msgspec writes a NaN as null, where json would write what JSON does not know
        )
        body = JSONFormat().write(event)
        if len(body) < MAX_BODY_BYTES:
            return body.decode()
    raise ValueError(f"the signal of decision {decision.id} has {len(body)} bytes, {MAX_BODY_BYTES} are allowed")


def check_endpoints(urls: Iterable[str]) -> tuple[str, ...]:
    """`urls`, each once. Raises ConfigError for one to which no signal may be sent, without printing a password."""
    urls = tuple(urls)
    if bad := [url for url in urls if not is_webhook_url(url)]:
        raise ConfigError([ConfigProblem("scaling.webhook_urls", printable(url), ALLOWED, "settings") for url in bad])
    return tuple(dict.fromkeys(urls))


class Signer:
    """Signs with every secret at once, so that a receiver may still hold the old one while keys rotate."""

    def __init__(self, secrets: str) -> None:
        """`secrets`: one or several `whsec_...`, separated by spaces. Raises ConfigError for a malformed one, without printing it."""
        self._webhooks = tuple(Webhook(_key(secret)) for secret in secrets.split())
        if not self._webhooks:
            raise _bad_secret("empty")

    def headers(self, message_id: str, at_wall: float, body: str) -> dict[str, str]:
        """webhook-id, webhook-timestamp and webhook-signature of one attempt at `at_wall` (Unix seconds)."""
        at = datetime.fromtimestamp(at_wall, UTC)  # `sign` takes any datetime's digits for UTC: give it nothing else
        signatures = " ".join(webhook.sign(message_id, at, body) for webhook in self._webhooks)
        return {"webhook-id": message_id, "webhook-timestamp": str(int(at_wall)), "webhook-signature": signatures}


def _key(secret: str) -> bytes:
    if not secret.startswith("whsec_"):
        raise _bad_secret("without whsec_")
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise _bad_secret("not base64") from None
    if not 24 <= len(key) <= 64:
        raise _bad_secret(f"{len(key)} bytes")
    return key


def _bad_secret(what: str) -> ConfigError:
    return ConfigError([ConfigProblem("scaling.webhook_secret", f"({what})", "`whsec_` + base64 of 24-64 bytes", "settings")])


class Courier:
    """Delivers the outbox: per endpoint one signal at a time, the newest. Lives on the event loop; `start`, `wake`, `close`.

    It survives an endpoint or a database that is away (both are tried again) and the process (the outbox is the only state). A signal that was
    sent while the process died is sent again, with the same webhook-id.
    """

    def __init__(self, outbox: Outbox, signer: Signer, *, clock: Clock, observer: CourierObserver | None = None, seed: int | None = None) -> None:
        self._outbox = outbox
        self._signer = signer
        self._clock = clock
        self._observer = observer
        self._random = random.Random(seed)
        self._wake = asyncio.Event()
        self._num_superseded = 0  # not yet reported
        self._session: aiohttp.ClientSession | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to deliver in a task of its own."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="webhook-courier")

    def wake(self, *, num_superseded: int = 0) -> None:
        """There is something new in the outbox; it superseded so many older signals."""
        self._num_superseded += num_superseded
        self._wake.set()

    async def close(self) -> None:
        """Stop; what is on its way is sent again by the next process."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def deliver_due(self) -> float:
        """Send what is due, each endpoint beside the others. Returns seconds until the next look. Raises SQLAlchemyError or OSError."""
        now = self._clock.wall()
        num_dead = await self._outbox.expire(now)
        num_pending = await self._outbox.num_pending()
        for outcome in ["superseded"] * self._num_superseded + ["dead"] * num_dead:
            self._report(outcome, num_pending)
        self._num_superseded = 0
        rows = await self._outbox.due(now)
        results = await asyncio.gather(*(self._deliver(row) for row in rows), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        next_wall = await self._outbox.next_attempt_wall()
        return _IDLE_SECONDS if next_wall is None else min(max(next_wall - self._clock.wall(), 0.0), _IDLE_SECONDS)

    async def _run(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                wait = await self.deliver_due()
                failures = 0
            except (SQLAlchemyError, OSError) as error:
                failures += 1
                wait = min(2.0 ** min(failures - 1, 5), _IDLE_SECONDS)
                _log.warning("the outbox cannot be read or written (%s); again in %.0f s", type(error).__name__, wait)
            except Exception:
                failures += 1
                wait = _IDLE_SECONDS
                _log.exception("delivering signals failed; again in %.0f s", wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait or 0.05)

    async def _deliver(self, row: Pending) -> None:
        began, at_wall = self._clock.monotonic(), self._clock.wall()
        status, error, retry_after = await self._send(row, at_wall)
        duration = self._clock.monotonic() - began
        if status is not None and 200 <= status < 300:
            attempt = Attempt(at_wall, duration, "delivered", status)
        elif status == 410:
            attempt = Attempt(at_wall, duration, "dead", status, GONE)
            _log.error("%s answered 410: it gets no more signals until it is enabled again", row.endpoint)
        else:
            delay = self._backoff(row.attempts)
            next_wall = self._clock.wall() + (delay if retry_after is None else max(delay, retry_after))
            if next_wall >= row.expires_wall:
                attempt = Attempt(at_wall, duration, "dead", status, f"{error}; expires before the next attempt")
                _log.error("signal %s to %s is a dead letter after %d attempts: %s", row.id, row.endpoint, row.attempts + 1, error)
            else:
                attempt = Attempt(at_wall, duration, "pending", status, error, next_wall)
                _log.warning("signal %s to %s: %s; again in %.1f s", row.id, row.endpoint, error, next_wall - self._clock.wall())
        await self._outbox.finish(row, attempt)
        if status == 410:
            await self._outbox.disable(row.endpoint)
        self._report("failed" if attempt.state == "pending" else attempt.state, await self._outbox.num_pending())

    async def _send(self, row: Pending, at_wall: float) -> tuple[int | None, str | None, float | None]:
        """Status, error and Retry-After of one attempt. Redirects are not followed: the URLs are those that were configured, and no others."""
        headers = self._signer.headers(row.id, at_wall, row.body)
        headers |= {"content-type": JSONFormat.CONTENT_TYPE, "user-agent": f"inference-appliance/{appliance.__version__}"}
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar())
        try:
            async with self._session.post(row.endpoint, data=row.body.encode(), headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 300:
                    return response.status, None, None
                error = f"HTTP {response.status}" + (" (redirects are not followed)" if 300 <= response.status < 400 else "")
                return response.status, error, _retry_after(response.headers.get("retry-after"), self._clock.wall())
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as failure:
            return None, f"{type(failure).__name__}: {failure}"[:500], None

    def _backoff(self, attempts: int) -> float:
        """Seconds until the next attempt after `attempts` earlier ones: doubling, capped, jittered by half so that a fleet is not in step."""
        return min(_FIRST_RETRY_SECONDS * 2.0 ** min(attempts, 16), _LAST_RETRY_SECONDS) * self._random.uniform(0.5, 1.0)

    def _report(self, outcome: str, num_pending: int) -> None:
        if self._observer is not None:
            self._observer.on_delivery(outcome, num_pending)


def _retry_after(value: str | None, now_wall: float) -> float | None:
    """Seconds that a Retry-After header (RFC 9110: seconds or a date) asks for; None without one that can be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(int(value)))
    except OverflowError:
        return None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_wall)
    except (ValueError, TypeError, OverflowError):
        return None
