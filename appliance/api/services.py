"""What the API needs from the rest of the program, handed in once by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from appliance.api.keys import ApiKeys
from appliance.clock import Clock
from appliance.engine.client import EngineClient
from appliance.events import RequestRecord, RequestUse
from appliance.settings import Settings
from appliance.text.load import TextModel
from appliance.tracing import NO_TRACING, Tracing


class ApiObserver(Protocol):
    """What the API reports as it happens, on the event loop. Implemented by the metrics recorder."""

    def on_received(self, endpoint: str) -> None:
        """The headers of a generation request are read and its key is known."""

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """A request goes to the engine, with so many prompt tokens and at most so many to generate, over all of its choices."""

    def on_rejected(self, code: str) -> None:
        """A request was turned away at admission with 429 or 503."""

    def on_first_token(self, seconds: float, endpoint: str, request_id: str) -> None:
        """The first token of a request came `seconds` after its receipt."""

    def on_other_first_token(self) -> None:
        """The first token of another choice of a request came."""

    def on_request(self, record: RequestRecord, use: RequestUse) -> None:
        """A request ended, whatever its end."""


class BrowserLogin(Protocol):
    """How a browser gets in without sending a key each time. Implemented by the console."""

    open_routes: frozenset[str]  # patterns of the routes that anyone may ask: the login page

    def key_name(self, request: web.Request, route: str | None) -> str | None:
        """The name of the key that the request's cookie stands for; None where there is none, or where it does not count for `route`."""

    def invite(self, request: web.Request) -> web.Response | None:
        """What to answer instead of 401 to a browser that opens a page; None for everything else."""


class Drain:
    """Whether new work is turned away, and how many generation requests are open. Owned by the event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """From now on requests get 503; those that are open go on."""
        self.draining = True

    def enter(self) -> None:
        """A request opened."""
        self.num_open += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request ended."""
        self.num_open -= 1
        if self.num_open == 0:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()


@dataclass(frozen=True, slots=True)
class Services:
    """The API's collaborators. `on_record` gets every RequestRecord (for SQL), `metrics_text` makes the exposition that an Accept
    header asks for, with its content type."""

    settings: Settings
    engine: EngineClient
    text: TextModel
    clock: Clock
    model_name: str
    keys: ApiKeys
    drain: Drain
    observer: ApiObserver
    metrics_text: Callable[[str], tuple[bytes, str]]
    on_record: Callable[[RequestRecord], None]
    tracing: Tracing = NO_TRACING
    browser_login: BrowserLogin | None = None
