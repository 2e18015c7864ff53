"""Named read queries and the retention purge. Each takes a session or database and returns plain rows, ready for JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, desc, exists, func, not_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, aliased

from appliance.store.database import Database
from appliance.store.outbox import GONE
from appliance.store.tables import EngineEventRow, OutboxRow, RequestRow, SampleRow, ScaleDecisionRow

Rows = list[dict[str, Any]]


async def recent_requests(session: AsyncSession, *, limit: int = 100, before_wall: float | None = None, key_id: str | None = None) -> Rows:
    """The newest ledger rows, newest first; `before_wall` pages on."""
    query = select(*RequestRow.__table__.columns).order_by(desc(RequestRow.received_wall)).limit(limit)
    if before_wall is not None:
        query = query.where(RequestRow.received_wall < before_wall)
    if key_id is not None:
        query = query.where(RequestRow.key_id == key_id)
    return await _fetch(session, query)


async def request_by_id(session: AsyncSession, request_id: str) -> Rows:
    """The ledger row of a server's id, or the newest ones of a client's X-Request-Id."""
    query = select(*RequestRow.__table__.columns).where((RequestRow.id == request_id) | (RequestRow.client_request_id == request_id))
    return await _fetch(session, query.order_by(desc(RequestRow.received_wall)).limit(100))


async def slowest_requests(session: AsyncSession, *, since_wall: float, limit: int = 20) -> Rows:
    """The ledger rows received since then that took longest."""
    query = select(*RequestRow.__table__.columns).where(RequestRow.received_wall >= since_wall)
    return await _fetch(session, query.order_by(desc(RequestRow.duration_seconds)).limit(limit))


async def usage_by_key(session: AsyncSession, *, since_wall: float, until_wall: float) -> Rows:
    """Requests, errors, tokens, joules and seconds by key and model of what was received in [since, until)."""
    query = (
        select(
            RequestRow.key_id,
            RequestRow.model,
            func.count().label("num_requests"),
            func.count().filter(RequestRow.status >= 500).label("num_errors"),
            *(_whole_sum(c) for c in (RequestRow.num_prompt_tokens, RequestRow.num_cached_tokens, RequestRow.num_generated_tokens)),
            func.sum(RequestRow.joules).label("joules"),
            func.sum(RequestRow.duration_seconds).label("duration_seconds"),
        )
        .where(RequestRow.received_wall >= since_wall, RequestRow.received_wall < until_wall)
        .group_by(RequestRow.key_id, RequestRow.model)
        .order_by(RequestRow.key_id, RequestRow.model)
    )
    rows = await _fetch(session, query)
    for row in rows:  # PostgreSQL sums BIGINT as NUMERIC
        row |= {name: int(row[name]) for name in ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens")}
    return rows


async def sample_history(session: AsyncSession, *, since_wall: float, until_wall: float, instance_id: str | None = None) -> Rows:
    """The samples in [since, until), oldest first; of one instance, or of all that share the database."""
    query = select(*SampleRow.__table__.columns).where(SampleRow.at_wall >= since_wall, SampleRow.at_wall < until_wall).order_by(SampleRow.at_wall)
    if instance_id is not None:
        query = query.where(SampleRow.instance_id == instance_id)
    return await _fetch(session, query)


async def recent_decisions(session: AsyncSession, *, limit: int = 100) -> Rows:
    """The newest scale decisions, newest first."""
    return await _fetch(session, select(*ScaleDecisionRow.__table__.columns).order_by(desc(ScaleDecisionRow.at_wall)).limit(limit))


async def recent_engine_events(session: AsyncSession, *, limit: int = 100) -> Rows:
    """The newest events of the engine process, newest first."""
    return await _fetch(session, select(*EngineEventRow.__table__.columns).order_by(desc(EngineEventRow.at_wall)).limit(limit))


async def purge(database: Database, *, before_wall: float, batch: int = 500) -> int:
    """Delete what is older than `before_wall`, in small transactions so that the write lock is never held long. Returns how many rows.

    What a restart goes on from stays: signals that wait, answers of 410 that disable their endpoint, the decisions of both, and each instance's
    newest decision, from which its sequence numbers go on.
    """
    settled = and_(OutboxRow.state != "pending", OutboxRow.last_error.is_distinct_from(GONE))
    later = aliased(ScaleDecisionRow)
    is_newest = ~exists().where(later.instance_id == ScaleDecisionRow.instance_id, later.sequence > ScaleDecisionRow.sequence)
    needed = select(OutboxRow.decision_id).where(not_(settled))
    num_deleted = 0
    for at, condition in (
        (RequestRow.received_wall, None),
        (SampleRow.at_wall, None),
        (EngineEventRow.at_wall, None),
        (OutboxRow.created_wall, settled),
        (ScaleDecisionRow.at_wall, and_(ScaleDecisionRow.id.not_in(needed), not_(is_newest))),
    ):
        while deleted := await _delete_oldest(database, at, before_wall, condition, batch):
            num_deleted += deleted
            await asyncio.sleep(0.01)  # let the writer in
    return num_deleted


async def _delete_oldest(
    database: Database, at: InstrumentedAttribute[float], before_wall: float, condition: ColumnElement[bool] | None, batch: int
) -> int:
    """Delete some `batch` rows older than `before_wall` from the table of `at`, those of equal time together; how many."""
    doomed = and_(at < before_wall, *(() if condition is None else (condition,)))
    async with database.connection() as connection:
        last = (await connection.execute(select(at).where(doomed).order_by(at).offset(batch - 1).limit(1))).scalar()
        statement = delete(at.class_).where(doomed) if last is None else delete(at.class_).where(doomed, at <= last)
        return (await connection.execute(statement)).rowcount


def _whole_sum(column: InstrumentedAttribute[int]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(column), 0).label(column.key)


async def _fetch(session: AsyncSession, query: Select[Any]) -> Rows:
    return [dict(row) for row in (await session.execute(query)).mappings()]
