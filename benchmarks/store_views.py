"""Fills a SQLite database with a month of a busy node (a million ledger rows by default) and times every named query and console view on it.

    python benchmarks/store_views.py --database /tmp/million.db
    python benchmarks/store_views.py --database /tmp/million.db --rounds 200        # again, without filling

The month: traffic with a daily rhythm, 200 keys of which some do most, two models, 1 % failures in bursts, long requests mostly in the first
half (the worst case of the slowest in the second). Samples as the default retention leaves them: a week of them, 60 days of minutes, three
years of hours.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.events import LedgerState
from appliance.store import queries
from appliance.store.database import Database
from appliance.store.queries import Prices, RequestFilter
from appliance.store.tables import Base
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage

DAY = 86400.0
NOW = 1_760_000_000.0
MONTH = 30 * DAY
_TABLES = Base.metadata.tables
_KEYS = [f"key-{index:03d}" for index in range(200)]
_STATES = [f"{state.value}_seconds" for state in LedgerState]


def fill(path: Path, *, num_requests: int, seed: int = 0) -> None:
    """Make the database, with the current schema, at `path` (which must not exist)."""
    asyncio.run(_migrate(path))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    generator = random.Random(seed)
    _insert(connection, "requests", _requests(num_requests, generator))
    columns = [column.name for column in _TABLES["requests"].columns]
    cursor = connection.execute(f"SELECT {', '.join(columns)} FROM requests")  # noqa: S608 (names of our tables)
    usage: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {ROLLUP.name: {}, TOTALS.name: {}}
    while rows := cursor.fetchmany(100_000):
        requests = [dict(zip(columns, row, strict=True)) for row in rows]
        hours = count_usage(requests)
        for table in (ROLLUP, TOTALS):
            for row in fold_usage(hours, table):
                _add(usage[table.name], row, table)
    for name, merged in usage.items():
        _insert(connection, name, iter(merged.values()))
    _insert(connection, "samples", _samples(generator))
    for resolution, days in ((60, 60), (3600, 1100)):
        _insert(connection, "samples_rollup", _sample_rollups(resolution, days, generator))
    _insert(connection, "scale_decisions", _decisions(2000))
    _insert(connection, "engine_events", _events(500))
    connection.execute("PRAGMA analysis_limit = 400")
    connection.execute("ANALYZE main")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def _migrate(path: Path) -> None:
    database = Database(f"sqlite+aiosqlite:///{path}")
    await database.migrate()
    await database.close()


def _add(usage: dict[tuple[Any, ...], dict[str, Any]], row: dict[str, Any], table: Table) -> None:
    key = tuple(row[column.name] for column in table.primary_key)
    stored = usage.setdefault(key, row)
    if stored is not row:
        for name, value in row.items():
            if name.startswith("max_"):
                stored[name] = max(stored[name] or 0.0, value or 0.0)
            elif name not in table.primary_key.columns and value is not None:
                stored[name] = (stored[name] or 0) + value


def _insert(connection: sqlite3.Connection, name: str, rows: Iterator[dict[str, Any]]) -> None:
    table: Table = _TABLES[name]
    columns = [column.name for column in table.columns]
    statement = f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 (names of our tables)
    connection.execute("BEGIN")
    connection.executemany(statement, ([row.get(column) for column in columns] for row in rows))
    connection.execute("COMMIT")


def _requests(count: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Evenly many a unit of (warped) time, so that they come in order, more by day than by night."""
    for index in range(count):
        share = (index + generator.random()) / count
        at = NOW - MONTH + MONTH * share + 0.6 * DAY / (2 * math.pi) * math.sin(2 * math.pi * 30 * share)
        burst = index % 50_000 < 1_000
        status = generator.choice((500, 503, 499, 200)) if burst and generator.random() < 0.5 else 200
        duration = generator.expovariate(0.5) * (20.0 if share < 0.5 else 1.0)
        ttft = None if status == 503 else generator.expovariate(5.0)
        yield {
            "id": f"{int(at * 1000):012x}-7000-8000-{index:012x}",
            "instance_id": "node-1",
            "fleet": "default",
            "client_request_id": f"client-{index}" if index % 3 == 0 else None,
            "endpoint": "/v1/chat/completions" if index % 1000 else "/v1/embeddings",
            "model": "small" if index % 7 else "large",
            "key_id": _KEYS[min(int(generator.expovariate(0.03)), len(_KEYS) - 1)],
            "stream": index % 2,
            "received_wall": at,
            "duration_seconds": duration,
            "status": status,
            "finish_reason": "stop" if status == 200 else "error",
            "error_code": None if status == 200 else "queue_full",
            "num_choices": 1,
            "num_prompt_tokens": generator.randint(10, 4000),
            "num_cached_tokens": 8,
            "num_generated_tokens": generator.randint(1, 1000),
            "num_written_tokens": 100,
            "ttft_seconds": ttft,
            "tpot_seconds": 0.02,
            "max_itl_seconds": 0.05,
            "num_preemptions": 0,
            "num_engine_restarts": 0,
            "seed": generator.getrandbits(62),
            "max_tokens": 1024,
            "joules": 12.5,
            **dict.fromkeys(_STATES, duration / len(_STATES)),
            "ttft_good": None if ttft is None else ttft < 0.5,
            "tpot_good": True,
        }


def _samples(generator: random.Random) -> Iterator[dict[str, Any]]:
    names = [column.name for column in _TABLES["samples"].columns if column.name not in ("instance_id", "fleet", "at_wall", "engine_state")]
    for index in range(int(7 * DAY / 10)):
        base = {"instance_id": "node-1", "fleet": "default", "at_wall": NOW - 7 * DAY + 10 * index, "engine_state": "ready"}
        yield dict.fromkeys(names, generator.randint(1, 100)) | base | {"period_seconds": 10.0}


def _sample_rollups(resolution: int, days: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    names = [column.name for column in _TABLES["samples_rollup"].columns]
    end = NOW // resolution * resolution
    for index in range(int(days * DAY / resolution)):
        row = dict.fromkeys(names, generator.randint(1, 100))
        yield row | {
            "resolution_seconds": resolution,
            "start_wall": end - resolution * index,
            "instance_id": "node-1",
            "fleet": "default",
            "num_samples": resolution // 10,
        }


def _decisions(count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        yield {
            "id": f"decision-{index}",
            "sequence": index,
            "instance_id": "node-1",
            "fleet": "default",
            "at_wall": NOW - MONTH + MONTH * index / count,
            "expires_wall": NOW,
            "direction": "up",
            "current_replicas": 1,
            "desired_replicas": 2,
            "reason": "the oldest waiting request is 3.0 s old, over 1.0 s",
            "inputs": '{"queue_age": 3.0}',
            "alternatives": '["hold: the queue grows"]',
            "mode": "advise",
        }


def _events(count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        at = NOW - MONTH + MONTH * index / count
        yield {"instance_id": "node-1", "at_wall": at, "kind": "ready", "fleet": "default", "detail": "", "pid": index, "num_in_flight": 0}


View = Callable[[AsyncSession, random.Random], Awaitable[object]]


def views() -> dict[str, View]:
    """Every named query at its widest range and every view of the console, by name; the generator varies what is asked for."""
    month = {"since_wall": NOW - MONTH, "until_wall": NOW}
    day = {"since_wall": NOW - DAY, "until_wall": NOW}
    prices = Prices(prompt_per_million=1.0, output_per_million=4.0)

    async def page(session: AsyncSession, generator: random.Random, **where: Any) -> None:
        """A page of the console's list: the first, or one that goes on from a random instant."""
        at_wall = NOW - generator.random() * MONTH
        cursor = queries._cursor(at_wall, "f") if generator.random() < 0.7 else None
        await queries.find_requests(session, RequestFilter(since_wall=NOW - MONTH, until_wall=NOW, **where), limit=100, cursor=cursor)

    async def by_id(session: AsyncSession, generator: random.Random) -> None:
        (found,) = await queries.request_by_id(session, f"client-{generator.randrange(100_000) * 3}")
        assert await queries.request_by_id(session, found.record.id)

    async def history(session: AsyncSession, generator: random.Random, days: float) -> None:
        until = NOW - generator.random() * DAY
        found = await queries.sample_history(session, since_wall=until - days * DAY, until_wall=until)
        assert found.series[0].at_wall

    def request_list(**where: Any) -> View:
        return lambda session, generator: page(session, generator, **where)

    return {
        "usage_total, month": lambda session, _: queries.usage_total(session, **month),
        "usage_by_key, month": lambda session, _: queries.usage_by_key(session, prices=prices, **month),
        "usage_by_key, 1 key": lambda session, g: queries.usage_by_key(session, key_id=g.choice(_KEYS), **month),
        "usage_by_hour, month": lambda session, _: queries.usage_by_hour(session, **month),
        "usage_by_hour, days": lambda session, _: queries.usage_by_hour(session, period_seconds=86400, **month),
        "slo_by_hour, month": lambda session, _: queries.slo_by_hour(session, **month),
        "busiest_hours, month": lambda session, _: queries.busiest_hours(session, by="tokens", **month),
        "slowest_requests, month": lambda session, _: queries.slowest_requests(session, **month),
        "slowest_requests, day": lambda session, _: queries.slowest_requests(session, **day),
        "known, month": lambda session, _: queries.known(session, **month),
        "request_by_id": by_id,
        "requests": request_list(),
        "requests of a key": request_list(key_id=_KEYS[3]),
        "requests of a rare key": request_list(key_id=_KEYS[-1]),
        "failed requests": request_list(failed=True),
        "failed requests of a key": request_list(failed=True, key_id=_KEYS[0]),
        "requests by a rare endpoint": request_list(endpoint="/v1/embeddings"),
        "requests of an unknown model": request_list(model="none"),
        "requests over 20 s": request_list(min_duration_seconds=20.0),
        "requests beyond the SLO": request_list(good=False),
        "sample_history, hour": lambda session, g: history(session, g, 1 / 24),
        "sample_history, half a day": lambda session, g: history(session, g, 0.5),
        "sample_history, month": lambda session, g: history(session, g, 29),
        "scale_decisions": lambda session, _: queries.scale_decisions(session, **month),
        "engine_events": lambda session, _: queries.engine_events(session, **month),
    }


async def measure(path: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each view, `rounds` times, interleaved, over the appliance's own connections; the first of each is with a cold cache of SQLite."""
    database = Database(f"sqlite+aiosqlite:///{path}")
    generator = random.Random(1)
    taken: dict[str, list[float]] = {name: [] for name in views()}
    for _ in range(rounds):
        for name, view in views().items():
            started = time.perf_counter()
            async with database.session() as session:
                await view(session, generator)
            taken[name].append(time.perf_counter() - started)
    await database.close()
    return taken


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def main() -> None:
    """Fill if need be, measure, print a table in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--num-requests", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    if not arguments.database.exists():
        started = time.perf_counter()
        fill(arguments.database, num_requests=arguments.num_requests)
        print(f"filled in {time.perf_counter() - started:.0f} s: {arguments.database.stat().st_size / 1e6:.0f} MB")
    print(f"{'view':40} {'median':>8} {'p99':>8} {'max':>8}  ms")
    for name, seconds in asyncio.run(measure(arguments.database, arguments.rounds)).items():
        print(f"{name:40} {1e3 * statistics.median(seconds):8.1f} {1e3 * percentile(seconds, 0.99):8.1f} {1e3 * max(seconds):8.1f}")


if __name__ == "__main__":
    main()
