"""`appliance report`: what happened, as one HTML file. It lives in appliance.report; this reads settings and database and writes the file."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from appliance.commands._settings import load_settings
from appliance.report.options import time_range
from appliance.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print where it is. Exit status 1 where the database cannot be read, 2 for a range that is none."""
    settings = load_settings(arguments).settings
    now = time.time()
    try:
        since_wall, until_wall = time_range(arguments.since, arguments.until, now)
    except ValueError as error:
        print(f"appliance report: {error}", file=sys.stderr)
        return 2
    text = asyncio.run(_render(settings, since_wall, until_wall, now, arguments.only_fleet))
    if text is None:
        return 1
    if arguments.output == "-":
        sys.stdout.write(text)
        return 0
    path = Path(arguments.output or time.strftime("appliance-report-%Y%m%d-%H%M%S.html", time.gmtime(now)))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"appliance report: {path}: {error.strerror}", file=sys.stderr)
        return 1
    print(path)
    return 0


async def _render(settings: Settings, since_wall: float, until_wall: float, now: float, fleet: str | None) -> str | None:
    """The file's text; None, with the reason said, where the database cannot be read."""
    from sqlalchemy.exc import SQLAlchemyError

    from appliance.report.collect import collect
    from appliance.report.page import render
    from appliance.store.database import Database, database_url

    database = Database(database_url(settings))
    name = database.url.render_as_string()
    try:
        if database.dialect == "sqlite" and not _exists(database.url.database or ""):
            print(f"appliance report: {name}: there is no database yet; `appliance serve` makes it", file=sys.stderr)
            return None
        data = await collect(
            database,
            since_wall=since_wall,
            until_wall=until_wall,
            made_wall=now,
            settings=settings,
            fleet=fleet,
        )
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        print(f"appliance report: {name}: {reason}; `appliance db check` tells whether its schema is current", file=sys.stderr)
        return None
    finally:
        await database.close()
    return render(data)


def _exists(path: str) -> bool:
    """Whether a SQLite file is there; connecting would make it."""
    return Path(path).is_file()
