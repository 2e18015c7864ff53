"""Rolls samples up: samples to minutes, minutes to hours, in `samples_rollup`.

A rollup is made anew whenever more samples of its minute or hour are stored than it was made of. So a run may be repeated, cut short or late, samples
that spooled through an outage are taken up when they arrive, and a rollup does not shrink when the purge takes its samples away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import BigInteger, Column, ColumnElement, Double, FromClause, Insert, Integer, Table, case, cast, func, select
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store.database import Database
from appliance.store.tables import SampleRollupRow, SampleRow

MINUTE_SECONDS = 60
HOUR_SECONDS = 3600
_CHUNK_ROWS = 60  # rollups of one transaction: some 3 ms of SQLite's write lock
_PAUSE_SECONDS = 0.01  # between transactions, for the writer

_SAMPLES: Table = SampleRow.metadata.tables[SampleRow.__tablename__]
_ROLLUP: Table = SampleRollupRow.metadata.tables[SampleRollupRow.__tablename__]
_GAUGES = frozenset({"num_running", "num_waiting", "oldest_waiting_age_seconds"})
_SUMMED_SECONDS = frozenset({"period_seconds", "step_seconds", "server_cpu_seconds", "engine_cpu_seconds"})


async def roll_up(database: Database, *, since_wall: float = 0.0) -> int:
    """Bring the rollups of samples taken since then up to date, the minute and hour under way included. Returns how many were written."""
    num_written = 0
    for resolution in (MINUTE_SECONDS, HOUR_SECONDS):
        start = since_wall // resolution * resolution
        for span in _spans(await _stale(database, resolution, start), resolution):
            rows = await _aggregate(database, resolution, *span)
            await database.execute_briefly(_upsert(database.dialect), rows)
            num_written += len(rows)
            await asyncio.sleep(_PAUSE_SECONDS)
    return num_written


async def _stale(database: Database, resolution: int, since_wall: float) -> Sequence[float]:
    """The starts of rollups that are missing or were made of fewer samples than there are now, oldest first."""
    source, at, count = _source(resolution)
    start = _start(at, resolution, database.dialect)
    found = select(source.c.instance_id, start.label("start_wall"), count.label("num_samples")).where(at >= since_wall)
    if resolution == HOUR_SECONDS:
        found = found.where(source.c.resolution_seconds == MINUTE_SECONDS)
    now = found.group_by(source.c.instance_id, start).subquery()
    made = (_ROLLUP.c.resolution_seconds == resolution) & (_ROLLUP.c.start_wall == now.c.start_wall) & (_ROLLUP.c.instance_id == now.c.instance_id)
    query = select(now.c.start_wall).select_from(now.outerjoin(_ROLLUP, made)).where(now.c.num_samples > func.coalesce(_ROLLUP.c.num_samples, 0))
    async with database.session() as session:
        return (await session.execute(query.distinct().order_by(now.c.start_wall))).scalars().all()


def _spans(starts: Sequence[float], resolution: int) -> Iterator[tuple[float, float]]:
    """Time ranges [start, end) that hold these rollups, some `_CHUNK_ROWS` periods long at most."""
    index = 0
    while index < len(starts):
        first = last = starts[index]
        while index < len(starts) and starts[index] < first + _CHUNK_ROWS * resolution:
            last = starts[index]
            index += 1
        yield first, last + resolution


async def _aggregate(database: Database, resolution: int, since_wall: float, until_wall: float) -> list[dict[str, Any]]:
    source, at, count = _source(resolution)
    start = _start(at, resolution, database.dialect)
    columns: list[ColumnElement[Any]] = []
    for column in _ROLLUP.columns:
        if column.name not in ("resolution_seconds", "start_wall", "instance_id", "fleet", "num_samples"):
            aggregate = _of_samples(column.name) if resolution == MINUTE_SECONDS else _of_minutes(column.name)
            columns.append(cast(aggregate, column.type).label(column.name))  # PostgreSQL's sums and means of BIGINT are NUMERIC
    query = select(
        source.c.instance_id,
        start.label("start_wall"),
        func.max(source.c.fleet).label("fleet"),
        cast(count, BigInteger).label("num_samples"),
        *columns,
    ).where(at >= since_wall, at < until_wall)
    if resolution == HOUR_SECONDS:
        query = query.where(source.c.resolution_seconds == MINUTE_SECONDS)
    async with database.session() as session:
        rows = (await session.execute(query.group_by(source.c.instance_id, start))).mappings().all()
    return [{"resolution_seconds": resolution, **row} for row in rows]


def _source(resolution: int) -> tuple[FromClause, Column[Any], ColumnElement[Any]]:
    """What rollups of `resolution` are made of: the table, its time, and how many samples a group of its rows stands for."""
    if resolution == MINUTE_SECONDS:
        return _SAMPLES, _SAMPLES.c.at_wall, func.count()
    return _ROLLUP, _ROLLUP.c.start_wall, func.sum(_ROLLUP.c.num_samples)


def _of_samples(name: str) -> ColumnElement[Any]:
    if name == "ready_share":
        return func.avg(case((_SAMPLES.c.engine_state == "ready", 1.0), else_=0.0))
    if name.startswith("max_"):
        return func.max(_SAMPLES.c[name.removeprefix("max_")])
    return func.sum(_SAMPLES.c[name]) if _is_sum(name) else func.avg(_SAMPLES.c[name])


def _of_minutes(name: str) -> ColumnElement[Any]:
    column, weight = _ROLLUP.c[name], _ROLLUP.c.num_samples
    if name.startswith("max_"):
        return func.max(column)
    if _is_sum(name):
        return func.sum(column)
    return func.sum(column * weight) / func.sum(case((column.is_not(None), weight)))


def _is_sum(name: str) -> bool:
    """Whether a column counts what happened since the sample before; else it is a gauge."""
    return name in _SUMMED_SECONDS or name.endswith("_joules") or (name.startswith("num_") and name not in _GAUGES)


def _start(at: Column[Any], resolution: int, dialect: str) -> ColumnElement[Any]:
    """The start of the period that `at` lies in. SQLite may lack floor(), PostgreSQL's CAST rounds."""
    whole = cast(at / resolution, Integer) if dialect == "sqlite" else func.floor(at / resolution)
    return cast(whole * resolution, Double)


def _upsert(dialect: str) -> Insert:
    insert: postgresql.Insert | sqlite.Insert = (postgresql if dialect == "postgresql" else sqlite).insert(_ROLLUP)
    new = insert.excluded
    return insert.on_conflict_do_update(
        index_elements=["resolution_seconds", "start_wall", "instance_id"],
        set_={column.name: new[column.name] for column in _ROLLUP.columns if not column.primary_key},
        where=new.num_samples >= _ROLLUP.c.num_samples,  # never by fewer: the purge has begun on these
    )
