"""The named queries: what the console, reports and `appliance db export` read. This file holds the ledger, decisions and events; usage is in `usage`,
the time series in `series`, and both are found here too.

Each takes a session that reads and returns frozen results. On SQLite with a million ledger rows each answers within 0.3 s (p99):
tests/acceptance/test_store_million.py.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Select, and_, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.errors import InvalidRequest
from appliance.events import EngineEvent, LedgerState, RequestRecord, ScaleDecision
from appliance.store.results import (
    HourSlo,
    HourUsage,
    KeyUsage,
    Known,
    Prices,
    RequestFilter,
    RequestPage,
    SampleHistory,
    SampleSeries,
    StoredDecision,
    StoredEngineEvent,
    StoredRequest,
    Usage,
)
from appliance.store.series import sample_history
from appliance.store.tables import EngineEventRow, OutboxRow, RequestRow, ScaleDecisionRow
from appliance.store.usage import busiest_hours, known, slo_by_hour, usage_by_hour, usage_by_key, usage_total

__all__ = [
    "HourSlo",
    "HourUsage",
    "KeyUsage",
    "Known",
    "Prices",
    "RequestFilter",
    "RequestPage",
    "SampleHistory",
    "SampleSeries",
    "StoredDecision",
    "StoredEngineEvent",
    "StoredRequest",
    "Usage",
    "busiest_hours",
    "engine_events",
    "find_requests",
    "known",
    "request_by_id",
    "sample_history",
    "scale_decisions",
    "slo_by_hour",
    "slowest_requests",
    "usage_by_hour",
    "usage_by_key",
    "usage_total",
]

MAX_LIMIT = 1000
_SCAN_ROWS = 20_000  # ledger rows that one page may look at where they lie together, some ten on a page of the file
_SCAN_ROWS_OF_KEY = 4_000  # and where they are scattered
_NARROW_ROWS = 200_000  # a range that is sorted by duration rather than searched along the index of durations
_EVERYTHING = RequestFilter()
_LEDGER = RequestRow.__table__
_RECORD_FIELDS = tuple(field for field in RequestRecord.__struct_fields__ if field != "states")
_STATE_COLUMNS = tuple((state.value, f"{state.value}_seconds") for state in LedgerState)


async def find_requests(session: AsyncSession, where: RequestFilter = _EVERYTHING, *, limit: int = 100, cursor: str | None = None) -> RequestPage:
    """The newest requests that match, newest first; `cursor` (of the page before) goes on, also while new requests arrive.

    Raises InvalidRequest for a cursor that is none of ours.
    """
    limit = max(1, min(limit, MAX_LIMIT))
    c = _LEDGER.c
    indexed, filters = _conditions(where)
    until_wall, rest = where.until_wall, []
    # One condition for each end of the time range: of two, SQLite searches the index by either.
    if cursor is not None and (until_wall is None or _read_cursor(cursor)[0] < until_wall):
        at_wall, last_id = _read_cursor(cursor)
        indexed.append(c.received_wall <= at_wall if last_id else c.received_wall < at_wall)
        rest = [or_(c.received_wall < at_wall, c.id < last_id)] if last_id else []
    elif until_wall is not None:
        indexed.append(c.received_wall < until_wall)
    since = [] if where.since_wall is None else [c.received_wall >= where.since_wall]
    newest = (c.received_wall.desc(), c.id.desc())
    # The farthest row that this page may look at, found in the index alone.
    num_rows = _SCAN_ROWS if where.key_id is None else _SCAN_ROWS_OF_KEY
    farthest = select(c.received_wall).where(*indexed, *since).order_by(c.received_wall.desc()).offset(num_rows - 1).limit(1)
    edge = (await session.execute(farthest)).scalar() if filters else None
    since = since if edge is None else [c.received_wall >= edge]
    query = select(_LEDGER).where(*indexed, *since, *rest, *filters).order_by(*newest).limit(limit + 1)
    rows = (await session.execute(query)).mappings().all()
    found = tuple(_stored_request(dict(row)) for row in rows[:limit])
    if len(rows) > limit:
        return RequestPage(requests=found, cursor=_cursor(rows[limit - 1]["received_wall"], rows[limit - 1]["id"]))
    if edge is not None:
        return RequestPage(requests=found, cursor=_cursor(edge, ""))  # every row of that time was looked at
    return RequestPage(requests=found, cursor=None)


async def request_by_id(session: AsyncSession, request_id: str) -> tuple[StoredRequest, ...]:
    """The request of a server's id, or the newest of a client's X-Request-Id, with their ledger."""
    c = _LEDGER.c
    query = select(_LEDGER).where(or_(c.id == request_id, c.client_request_id == request_id)).order_by(c.received_wall.desc()).limit(100)
    return await _stored_requests(session, query)


async def slowest_requests(session: AsyncSession, *, since_wall: float, until_wall: float, limit: int = 20) -> tuple[StoredRequest, ...]:
    """The requests received in [since, until) that took longest, longest first, with their ledger."""
    c = _LEDGER.c
    limit = max(1, min(limit, MAX_LIMIT))
    at: ColumnElement[float] = c.received_wall
    duration: ColumnElement[float] = c.duration_seconds
    wide = select(at).where(at >= since_wall, at < until_wall).order_by(at).offset(_NARROW_ROWS).limit(1)
    # Adding zero keeps a column out of the choice of an index: a narrow range is read along that of times, a wide one along that of durations, both
    # without a look at the table until the slowest are known.
    if (await session.execute(wide)).first() is None:
        duration = duration.op("+")(0)
        slow = select(duration).where(at >= since_wall, at < until_wall).order_by(duration.desc()).offset(limit - 1).limit(1)
        least = (await session.execute(slow)).scalar()
        query = select(_LEDGER).where(at >= since_wall, at < until_wall, *([] if least is None else [duration >= least]))
    else:
        at = at.op("+")(0)
        query = select(_LEDGER).where(at >= since_wall, at < until_wall)
    return await _stored_requests(session, query.order_by(duration.desc()).limit(limit))


async def scale_decisions(
    session: AsyncSession,
    *,
    since_wall: float | None = None,
    until_wall: float | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
    limit: int = 100,
) -> tuple[StoredDecision, ...]:
    """The newest scale decisions of the range with what came of them, newest first."""
    c = ScaleDecisionRow.__table__.c
    query = _ranged(select(ScaleDecisionRow.__table__), c, since_wall, until_wall, instance_id, fleet)
    rows = (await session.execute(query.order_by(c.at_wall.desc(), c.id.desc()).limit(limit))).mappings().all()
    signals: dict[str, dict[str, int]] = {row["id"]: {} for row in rows}
    by_state = select(OutboxRow.decision_id, OutboxRow.state, func.count()).where(OutboxRow.decision_id.in_(signals))
    for decision_id, state, count in (await session.execute(by_state.group_by(OutboxRow.decision_id, OutboxRow.state))).all():
        signals[decision_id][state] = count
    return tuple(
        StoredDecision(
            decision=msgspec.convert({name: row[name] for name in ScaleDecision.__struct_fields__}, ScaleDecision),
            approved_wall=row["approved_wall"],
            approved_by=row["approved_by"],
            outcome=row["outcome"],
            signals=signals[row["id"]],
        )
        for row in rows
    )


async def engine_events(
    session: AsyncSession,
    *,
    since_wall: float | None = None,
    until_wall: float | None = None,
    instance_id: str | None = None,
    fleet: str | None = None,
    limit: int = 100,
) -> tuple[StoredEngineEvent, ...]:
    """The newest events of the engine processes in the range, newest first."""
    c = EngineEventRow.__table__.c
    query = _ranged(select(EngineEventRow.__table__), c, since_wall, until_wall, instance_id, fleet)
    rows = (await session.execute(query.order_by(c.at_wall.desc()).limit(limit))).mappings().all()
    return tuple(
        StoredEngineEvent(
            event=EngineEvent(**{name: row[name] for name in EngineEvent.__struct_fields__}),
            instance_id=row["instance_id"],
            fleet=row["fleet"],
        )
        for row in rows
    )


def _conditions(where: RequestFilter) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """Conditions that choose the index to walk along (times, those of a key, those of failures), and those that rows on the way are tested for."""
    c = _LEDGER.c
    indexed: list[ColumnElement[bool]] = []
    names = ("model", "instance_id", "fleet", "endpoint", "status", "finish_reason")
    filters = [c[name] == getattr(where, name) for name in names if getattr(where, name) is not None]
    failed = where.failed or (where.status is not None and where.status >= 400)
    if where.key_id is not None:
        indexed.append(c.key_id == where.key_id)
    if failed:
        indexed.append(c.status >= text("400"))  # the text of the partial indexes' own condition
    elif where.failed is not None:
        filters.append(c.status < 400)
    if where.good is not None:
        good = and_(c.ttft_good.is_not(False), c.tpot_good.is_not(False), or_(c.ttft_good.is_not(None), c.tpot_good.is_not(None)))
        filters.append(good if where.good else or_(c.ttft_good.is_(False), c.tpot_good.is_(False)))
    if where.min_duration_seconds is not None:
        filters.append(c.duration_seconds >= where.min_duration_seconds)
    return indexed, filters


def _ranged(
    query: Select[Any], c: Any, since_wall: float | None, until_wall: float | None, instance_id: str | None, fleet: str | None
) -> Select[Any]:
    if since_wall is not None:
        query = query.where(c.at_wall >= since_wall)
    if until_wall is not None:
        query = query.where(c.at_wall < until_wall)
    if instance_id is not None:
        query = query.where(c.instance_id == instance_id)
    return query if fleet is None else query.where(c.fleet == fleet)


async def _stored_requests(session: AsyncSession, query: Select[Any]) -> tuple[StoredRequest, ...]:
    return tuple(_stored_request(dict(row)) for row in (await session.execute(query)).mappings())


def _stored_request(row: dict[str, Any]) -> StoredRequest:
    record = RequestRecord(**{name: row[name] for name in _RECORD_FIELDS}, states={state: row[column] for state, column in _STATE_COLUMNS})
    ttft_good, tpot_good = row["ttft_good"], row["tpot_good"]
    good = None if ttft_good is None and tpot_good is None else ttft_good is not False and tpot_good is not False
    return StoredRequest(record=record, instance_id=row["instance_id"], fleet=row["fleet"], ttft_good=ttft_good, tpot_good=tpot_good, good=good)


def _cursor(at_wall: float, last_id: str) -> str:
    return base64.urlsafe_b64encode(f"{at_wall!r} {last_id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        at_wall, _, last_id = base64.urlsafe_b64decode(cursor.encode()).decode().partition(" ")
        return float(at_wall), last_id
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(f"cursor {cursor!r} is not of this server", code="invalid_cursor") from error
