"""The retention purge: what has reached its age is deleted, in transactions so short that the writer hardly waits."""

from __future__ import annotations

import asyncio

from sqlalchemy import ColumnElement, and_, delete, exists, not_, select
from sqlalchemy.orm import InstrumentedAttribute, aliased

from appliance.store.database import Database
from appliance.store.outbox import GONE
from appliance.store.tables import EngineEventRow, OutboxRow, RequestRow, SampleRow, ScaleDecisionRow


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
