"""The loop of `appliance top`: look, draw, wait. Ctrl-C ends it; a server that is away is shown as away and asked again."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from appliance.top.figures import Figures, History
from appliance.top.options import api_key
from appliance.top.scrape import ServerAway, Target
from appliance.top.screen import screen

_RESIZE_SECONDS = 0.2  # how soon a new size of the terminal is drawn
_NUM_REQUESTS, _NUM_DECISIONS = 8, 3
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Look:
    """What is known after the newest look."""

    figures: Figures | None = None
    away: str | None = None
    requests: list[dict[str, Any]] | None = None
    decisions: list[dict[str, Any]] | None = None


class Watcher:
    """Looks at one appliance. `look` never raises on what the server does or says."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.history = History()
        self.latest = Look()

    def look(self, *, with_rows: bool) -> Look:
        """Ask now. `with_rows`: also for the newest requests and decisions."""
        try:
            self.history.add(self.target.scrape())
        except ServerAway as error:
            self.latest = Look(self.latest.figures, str(error), self.latest.requests, self.latest.decisions)
            return self.latest
        figures = self.history.figures(self.target.url, time.time())
        requests = self.target.rows(f"/console/api/requests?limit={_NUM_REQUESTS}", "requests") if with_rows else None
        decisions = self.target.rows(f"/console/api/decisions?limit={_NUM_DECISIONS}", "decisions") if with_rows else None
        self.latest = Look(figures, None, requests, decisions)
        return self.latest

    def draw(self, console: Console) -> RenderableType:
        """The newest look at the terminal's size."""
        look = self.latest
        return screen(
            look.figures,
            width=console.width,
            height=console.height,
            url=self.target.url,
            away=look.away,
            rates=list(self.history.output_rates),
            requests=look.requests,
            decisions=look.decisions,
            unicode=_speaks_unicode(console),
        )


def run_top(arguments: argparse.Namespace) -> int:
    """Exit status 0; 1 where --once got no answer; 2 for a URL or a key file that is none."""
    try:
        watcher = Watcher(Target(arguments.url, api_key(arguments)))
    except (ValueError, OSError) as error:
        print(f"appliance top: {error}", file=sys.stderr)
        return 2
    console, stop = Console(), threading.Event()

    def interrupt(*_: object) -> None:
        stop.set()  # the exception alone may be lost: one that is raised while an object is finalised goes nowhere
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        if arguments.once:
            return _once(watcher, console, arguments)
        if arguments.json or not console.is_terminal:
            return _lines(watcher, console, arguments, stop)
        return _live(watcher, console, arguments.interval, stop)
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGINT, before)


def _once(watcher: Watcher, console: Console, arguments: argparse.Namespace) -> int:
    """Two looks, or no rate would be known."""
    if watcher.look(with_rows=False).away is None:
        time.sleep(arguments.interval)
        watcher.look(with_rows=not arguments.json)
    if watcher.latest.away is not None:
        print(f"appliance top: {watcher.target.url}: {watcher.latest.away}", file=sys.stderr)
        return 1
    _print(watcher, console, as_json=arguments.json)
    return 0


def _lines(watcher: Watcher, console: Console, arguments: argparse.Namespace, stop: threading.Event) -> int:
    """One report an interval, for scripts and pipes."""
    while not stop.is_set():
        watcher.look(with_rows=not arguments.json)
        _print(watcher, console, as_json=arguments.json)
        time.sleep(arguments.interval)
    return 0


def _print(watcher: Watcher, console: Console, *, as_json: bool) -> None:
    if not as_json:
        height = 60 if not console.is_terminal else max(console.height, 24)
        console.print(_sized(watcher, console, height))
    elif watcher.latest.away is not None or watcher.latest.figures is None:
        print(_encode({"url": watcher.target.url, "at_wall": time.time(), "error": watcher.latest.away}).decode(), flush=True)
    else:
        print(_encode(watcher.latest.figures).decode(), flush=True)


def _sized(watcher: Watcher, console: Console, height: int) -> RenderableType:
    console.height = height
    return watcher.draw(console)


def _live(watcher: Watcher, console: Console, interval: float, stop: threading.Event) -> int:
    """Draw on the terminal's other screen, which leaves the first as it was."""
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            began = time.monotonic()
            watcher.look(with_rows=True)
            size = None
            while not stop.is_set():
                if size != console.size:
                    size = console.size
                    live.update(watcher.draw(console), refresh=True)
                left = began + interval - time.monotonic()
                if left <= 0:
                    break
                time.sleep(min(left, _RESIZE_SECONDS))
    return 0


def _speaks_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
