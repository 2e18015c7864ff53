"""`appliance db`: upgrade, downgrade, check, vacuum and export the SQL database."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.commands._settings import load_settings
from appliance.errors import ConfigError, ConfigProblem
from appliance.settings import Settings

if TYPE_CHECKING:
    from appliance.store.database import Database

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def run(arguments: argparse.Namespace) -> int:
    """`upgrade` migrates to the newest schema, `downgrade` to an older one; `check` tells whether the schema is current and the data sound (else exit
    status 1); `vacuum` gives unused space back; `export` writes a table or named query."""
    settings = load_settings(arguments).settings
    actions: dict[str, Callable[[Database, Settings, argparse.Namespace], Awaitable[int]]] = {
        "upgrade": _upgrade,
        "downgrade": _downgrade,
        "check": _check,
        "vacuum": _vacuum,
        "export": _export,
    }
    return asyncio.run(_with_database(actions[arguments.action], settings, arguments))


async def _with_database(
    action: Callable[[Database, Settings, argparse.Namespace], Awaitable[int]], settings: Settings, arguments: argparse.Namespace
) -> int:
    from sqlalchemy.exc import SQLAlchemyError

    from appliance.store.database import Database, MigrationFailed, database_url
    from appliance.store.export import NotExportable

    database = Database(database_url(settings))
    name = database.url.render_as_string()
    try:
        if arguments.action != "upgrade" and not _there(database):
            print(f"{name}: not there yet; `appliance db upgrade` or `appliance serve` makes it")
            return 1
        return await action(database, settings, arguments)
    except (MigrationFailed, NotExportable, SQLAlchemyError, OSError) as error:
        print(f"appliance: {name}: {error}", file=sys.stderr)
        return 1
    finally:
        await database.close()


async def _upgrade(database: Database, _: Settings, __: argparse.Namespace) -> int:
    before = await database.revision()
    await database.migrate()
    after = await database.revision()
    change = "is at" if before == after else f"{before or 'empty'} ->"
    print(f"{database.url.render_as_string()}: {change} {after}")
    return 0


async def _downgrade(database: Database, _: Settings, arguments: argparse.Namespace) -> int:
    before = await database.revision()
    await database.downgrade(arguments.revision)
    print(f"{database.url.render_as_string()}: {before or 'empty'} -> {await database.revision() or 'empty'}")
    return 0


async def _check(database: Database, _: Settings, __: argparse.Namespace) -> int:
    from appliance.store.maintenance import newest_revision, problems, size_bytes

    name, newest, found = database.url.render_as_string(), newest_revision(), await database.revision()
    if found != newest:
        print(f"{name}: at {found or 'no revision'}, the newest is {newest}; `appliance db upgrade` brings it there")
        return 1
    found_problems = await problems(database)
    for problem in found_problems:
        print(f"{name}: {problem}")
    if not found_problems:
        print(f"{name}: current ({found}), sound, {await size_bytes(database) / 1e6:.1f} MB")
    return 1 if found_problems else 0


async def _vacuum(database: Database, _: Settings, __: argparse.Namespace) -> int:
    from appliance.store.maintenance import size_bytes, vacuum

    before = await size_bytes(database)
    await vacuum(database)
    after = await size_bytes(database)
    print(f"{database.url.render_as_string()}: {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
    return 0


async def _export(database: Database, settings: Settings, arguments: argparse.Namespace) -> int:
    from appliance.store.export import NotExportable, Range, sources, write_csv, write_parquet
    from appliance.store.maintenance import newest_revision
    from appliance.store.queries import Prices

    cost = settings.cost
    known = sources(Prices(cost.prompt_per_million, cost.output_per_million, cost.cached_per_million))
    source = known.get(arguments.source)
    if source is None:
        raise NotExportable(f"no table or query {arguments.source!r}; there are {', '.join(sorted(known))}")
    if (found := await database.revision()) != newest_revision():
        raise NotExportable(f"the schema is at {found or 'no revision'}; run `appliance db upgrade` first")
    now = time.time()
    of = Range(
        since_wall=0.0 if arguments.since is None else instant(arguments.since, now),
        until_wall=now + 60.0 if arguments.until is None else instant(arguments.until, now),
        limit=arguments.limit,
    )
    path = None if arguments.output in (None, "-") else Path(arguments.output)
    parquet = arguments.format == "parquet" or (arguments.format is None and path is not None and path.suffix == ".parquet")
    if parquet:
        if path is None:
            raise NotExportable("Parquet goes to a file: give --output FILE")
        num_rows = await write_parquet(database, source, of, path)
    elif path is None:
        num_rows = await write_csv(database, source, of, sys.stdout)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            num_rows = await write_csv(database, source, of, file)
    print(f"{num_rows} rows of {arguments.source}{'' if path is None else f' in {path}'}", file=sys.stderr)
    return 0


def instant(text: str, now: float) -> float:
    """Unix seconds of "24h" (that long ago; s, m, h, d, w), of an ISO date or time (UTC unless it says otherwise), or of Unix seconds."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            [ConfigProblem("--since, --until", text, "24h, 7d, 2026-01-31, 2026-01-31T12:00 or Unix seconds", "command line")]
        ) from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _there(database: Database) -> bool:
    """Whether a SQLite file is there; connecting would make it."""
    path = database.url.database
    return database.dialect != "sqlite" or not path or path.startswith("file:") or Path(path).is_file()
