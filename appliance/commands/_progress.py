"""A progress bar on standard error for what takes its time before the server runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from appliance.model_files import Progress


@contextmanager
def fetch_progress() -> Iterator[Progress]:
    """A callback that draws one bar; nothing is imported or drawn until it is first called, and off a terminal each stage is one line."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def say(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                size = f" ({total / 1e6:.0f} MB)" if total else ""
                print(f"{what}{size}", file=sys.stderr, flush=True)

        yield say
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield draw
