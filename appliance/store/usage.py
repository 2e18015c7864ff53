"""Usage, cost and SLO by hour, day and key, from `usage_rollup` and `usage_totals` alone: never from the ledger, however many requests there were.

Ranges are in whole hours of UTC: the start is rounded down, the end up.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from sqlalchemy import CompoundSelect, Select, func, select, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.store.results import HourSlo, HourUsage, KeyUsage, Known, Prices, Usage
from appliance.store.tally import ROLLUP, TOTALS

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 86400

_SUMS = tuple(c for c in TOTALS.columns if not c.primary_key and not c.name.startswith("max_"))
_MAXIMA = tuple(c for c in TOTALS.columns if c.name.startswith("max_"))
_COUNTS = frozenset(c.name for c in _SUMS if c.name.startswith("num_"))
_NO_PRICES = Prices()


async def usage_total(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    key_id: str | None = None,
    model: str | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> Usage:
    """What all requests of the range amount to."""
    rows = await _grouped(session, since_wall, until_wall, (), key_id=key_id, model=model, instance_id=instance_id, fleet=fleet)
    return _usage(rows[0])


async def usage_by_key(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    prices: Prices = _NO_PRICES,
    key_id: str | None = None,
    model: str | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> tuple[KeyUsage, ...]:
    """Usage and cost of each key with each model, the most tokens first."""
    rows = await _grouped(session, since_wall, until_wall, ("key_id", "model"), key_id=key_id, model=model, instance_id=instance_id, fleet=fleet)
    found = []
    for row in rows:
        usage = _usage(row)
        cost = prices.cost(usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens)
        found.append(KeyUsage(key_id=row["key_id"], model=row["model"], usage=usage, cost=cost))
    return tuple(sorted(found, key=lambda of: (-of.usage.num_prompt_tokens - of.usage.num_generated_tokens, of.key_id, of.model)))


async def usage_by_hour(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    period_seconds: Literal[3600, 86400] = HOUR_SECONDS,
    key_id: str | None = None,
    model: str | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> tuple[HourUsage, ...]:
    """Usage of each hour (or UTC day) that had a request, oldest first. Days are those that begin in the range's hours."""
    start, end = _whole(since_wall, until_wall, HOUR_SECONDS)
    source = _slice(period_seconds, start, end, key_id=key_id, model=model, instance_id=instance_id, fleet=fleet).subquery()
    query = select(source.c.start_wall, *_aggregates(source)).group_by(source.c.start_wall).order_by(source.c.start_wall)
    rows = [dict(row) for row in (await session.execute(query)).mappings()]
    return tuple(HourUsage(start_wall=row["start_wall"], period_seconds=period_seconds, usage=_usage(row)) for row in rows)


async def slo_by_hour(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    key_id: str | None = None,
    model: str | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> tuple[HourSlo, ...]:
    """How the SLO was kept in each hour that had a request it applies to, oldest first."""
    hours = await usage_by_hour(
        session, since_wall=since_wall, until_wall=until_wall, key_id=key_id, model=model, instance_id=instance_id, fleet=fleet
    )
    names = [name for name in HourSlo.__dataclass_fields__ if name != "start_wall"]
    return tuple(
        HourSlo(start_wall=hour.start_wall, **{name: getattr(hour.usage, name) for name in names}) for hour in hours if hour.usage.num_judged
    )


async def busiest_hours(
    session: AsyncSession,
    *,
    since_wall: float,
    until_wall: float,
    by: Literal["requests", "tokens"] = "requests",
    limit: int = 10,
    key_id: str | None = None,
    model: str | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
) -> tuple[HourUsage, ...]:
    """The hours with most requests, or most prompt and output tokens, most first."""
    hours = await usage_by_hour(
        session, since_wall=since_wall, until_wall=until_wall, key_id=key_id, model=model, instance_id=instance_id, fleet=fleet
    )

    def load(hour: HourUsage) -> int:
        return hour.usage.num_requests if by == "requests" else hour.usage.num_prompt_tokens + hour.usage.num_generated_tokens

    return tuple(sorted(hours, key=lambda hour: (-load(hour), hour.start_wall))[:limit])


async def known(session: AsyncSession, *, since_wall: float, until_wall: float) -> Known:
    """The keys, models, instances and fleets that had a request in the UTC days of the range, each sorted."""
    start, end = _whole(since_wall, until_wall, DAY_SECONDS)
    c = ROLLUP.c
    query = (
        select(c.key_id, c.model, c.instance_id, c.fleet).where(c.period_seconds == DAY_SECONDS, c.start_wall >= start, c.start_wall < end).distinct()
    )
    rows = (await session.execute(query)).all()
    keys, models, instances, fleets = (tuple(sorted({row[i] for row in rows})) for i in range(4))
    return Known(keys=keys, models=models, instances=instances, fleets=fleets)


def _whole(since_wall: float, until_wall: float, period: int) -> tuple[float, float]:
    return math.floor(since_wall / period) * float(period), math.ceil(until_wall / period) * float(period)


async def _grouped(session: AsyncSession, since_wall: float, until_wall: float, by: tuple[str, ...], **where: str | None) -> list[dict[str, Any]]:
    """Aggregates of the range's whole hours: whole days from the daily rows, the hours at both ends from the hourly ones."""
    start, end = _whole(since_wall, until_wall, HOUR_SECONDS)
    first_day, last_day = math.ceil(start / DAY_SECONDS) * float(DAY_SECONDS), math.floor(end / DAY_SECONDS) * float(DAY_SECONDS)
    by_key = bool(by)
    parts: Select[Any] | CompoundSelect[Any]
    if first_day >= last_day:
        parts = _slice(HOUR_SECONDS, start, end, by_key=by_key, **where)
    else:
        parts = union_all(
            _slice(HOUR_SECONDS, start, first_day, by_key=by_key, **where),
            _slice(DAY_SECONDS, first_day, last_day, by_key=by_key, **where),
            _slice(HOUR_SECONDS, last_day, end, by_key=by_key, **where),
        )
    source = parts.subquery()
    columns = [source.c[name] for name in by]
    query = select(*columns, *_aggregates(source)).group_by(*columns)
    return [dict(row) for row in (await session.execute(query)).mappings()]


def _slice(period: int, start: float, end: float, *, by_key: bool = False, **where: str | None) -> Select[Any]:
    """Rows of the range: those of each key where keys or models are asked about, else those of all together."""
    table = ROLLUP if by_key or where.get("key_id") is not None or where.get("model") is not None else TOTALS
    query = select(table).where(table.c.period_seconds == period, table.c.start_wall >= start, table.c.start_wall < end)
    for name, value in where.items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query


def _aggregates(source: Any) -> list[Any]:
    sums = [func.sum(source.c[column.name]).label(column.name) for column in _SUMS]
    return sums + [func.max(source.c[column.name]).label(column.name) for column in _MAXIMA]


def _usage(row: dict[str, Any]) -> Usage:
    """PostgreSQL sums BIGINT as NUMERIC, and the sum of nothing is NULL."""
    values = {name: int(row[name] or 0) if name in _COUNTS else row[name] for name in (c.name for c in (*_SUMS, *_MAXIMA))}
    num_ttft, ttft_seconds = values.pop("num_ttft"), values.pop("ttft_seconds")
    values["duration_seconds"], values["queued_seconds"] = row["duration_seconds"] or 0.0, row["queued_seconds"] or 0.0
    return Usage(
        **values,
        goodput=_share(values["num_good"], values["num_judged"]),
        ttft_attainment=_share(values["num_ttft_good"], values["num_ttft_judged"]),
        tpot_attainment=_share(values["num_tpot_good"], values["num_tpot_judged"]),
        mean_ttft_seconds=ttft_seconds / num_ttft if num_ttft else None,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
