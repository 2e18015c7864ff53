"""Samples over time for charts, from whichever table has few enough rows: the samples themselves, or their rollups by minute or hour."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Literal

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.store.results import SampleHistory, SampleSeries
from appliance.store.tables import SampleRollupRow, SampleRow

Resolution = Literal[10, 60, 3600]
_SAMPLES, _ROLLUP = SampleRow.__table__, SampleRollupRow.__table__


async def sample_history(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    resolution_seconds: Resolution | None = None,
    max_points: int = 720,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> SampleHistory:
    """The series in [since, until) of every instance that has one, by instance; the finest resolution that gives at most `max_points` a series and
    still reaches back to `since_wall`, unless one is asked for. Rollups begin with the minute or hour that `since_wall` lies in, and trail the
    samples by a minute.
    """
    if resolution_seconds is None:
        resolution_seconds = await _choose(session, since_wall, until_wall, max_points)
    query: Select[Any]
    if resolution_seconds == 10:
        at = _SAMPLES.c.at_wall
        query, table = select(_SAMPLES).where(at >= since_wall, at < until_wall), _SAMPLES
    else:
        at = _ROLLUP.c.start_wall
        query = select(_ROLLUP).where(_ROLLUP.c.resolution_seconds == resolution_seconds, at > since_wall - resolution_seconds, at < until_wall)
        table = _ROLLUP
    if instance_id is not None:
        query = query.where(table.c.instance_id == instance_id)
    if fleet is not None:
        query = query.where(table.c.fleet == fleet)
    rows = (await session.execute(query)).mappings().all()
    ordered = sorted(rows, key=lambda row: (row["instance_id"], row[at.name]))
    groups = groupby(ordered, key=lambda row: row["instance_id"])
    return SampleHistory(resolution_seconds=resolution_seconds, series=tuple(_series(list(group), at.name) for _, group in groups))


async def _choose(session: AsyncSession, since_wall: float, until_wall: float, max_points: int) -> Resolution:
    """The finest that has few enough points and holds all that the next coarser one holds since `since_wall`."""
    samples, rollup = _SAMPLES.c, _ROLLUP.c
    seconds = until_wall - since_wall
    newest = select(samples.instance_id).where(samples.at_wall >= since_wall, samples.at_wall < until_wall).order_by(samples.at_wall.desc()).limit(1)
    instance_id = (await session.execute(newest)).scalar()
    if instance_id is not None and await _num_samples(session, instance_id, since_wall, until_wall, max_points + 1) <= max_points:
        oldest = (await session.execute(select(samples.at_wall).order_by(samples.at_wall).limit(1))).scalar_one()
        if not await _has_rollup(session, 60, since_wall, oldest - 60):
            return 10
    if seconds / 60 <= max_points:
        oldest_minute = select(rollup.start_wall).where(rollup.resolution_seconds == 60).order_by(rollup.start_wall).limit(1)
        oldest = (await session.execute(oldest_minute)).scalar()
        if oldest is not None and not await _has_rollup(session, 3600, since_wall, oldest - 3600):
            return 60
    return 3600


async def _num_samples(session: AsyncSession, instance_id: str, since_wall: float, until_wall: float, at_most: int) -> int:
    c = _SAMPLES.c
    some = select(c.at_wall).where(c.instance_id == instance_id, c.at_wall >= since_wall, c.at_wall < until_wall).limit(at_most).subquery()
    return (await session.execute(select(func.count()).select_from(some))).scalar_one()


async def _has_rollup(session: AsyncSession, resolution_seconds: int, since_wall: float, until_wall: float) -> bool:
    """Whether one starts in [since, until]."""
    c = _ROLLUP.c
    query = select(c.start_wall).where(c.resolution_seconds == resolution_seconds, c.start_wall >= since_wall, c.start_wall <= until_wall)
    return (await session.execute(query.limit(1))).first() is not None


def _series(rows: list[Any], at: str) -> SampleSeries:
    names = [name for name in rows[0] if name not in ("instance_id", "fleet", "resolution_seconds", at)]
    return SampleSeries(
        instance_id=rows[0]["instance_id"],
        fleet=rows[-1]["fleet"],
        at_wall=tuple(row[at] for row in rows),
        columns={name: tuple(row[name] for row in rows) for name in names},
    )
