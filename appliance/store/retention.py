"""The retention purge: what has reached its age is deleted, in transactions so short that the writer hardly waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Table, and_, delete, exists, not_, select
from sqlalchemy.orm import aliased

from appliance.settings import StoreSettings
from appliance.store.database import Database
from appliance.store.outbox import GONE
from appliance.store.rollup import HOUR_SECONDS, MINUTE_SECONDS
from appliance.store.tables import Base, OutboxRow, ScaleDecisionRow

_DAY_SECONDS = 86400.0
_FIRST_BATCH, _MIN_BATCH, _MAX_BATCH = 100, 50, 200  # rows of one transaction; below the least its overhead is most of it
_HOLD_SECONDS = 0.01  # of the write lock that a batch aims at; a fifth of what the writer may be made to wait
_TABLES = Base.metadata.tables


@dataclass(frozen=True, slots=True)
class Limits:
    """Unix seconds; what was over before is purged."""

    ledger: float  # requests, decisions, signals, engine events
    samples: float
    minutes: float  # samples by minute
    hours: float  # samples and usage by hour, usage by day

    @classmethod
    def of(cls, settings: StoreSettings, now_wall: float) -> Limits:
        """The limits of `settings` at this time. A rollup stays at least as long as what it was made of, or it would be made again."""
        samples = settings.sample_retention_days
        minutes = max(samples, settings.minute_retention_days)
        hours = max(minutes, settings.hour_retention_days)
        return cls(*(now_wall - days * _DAY_SECONDS for days in (settings.retention_days, samples, minutes, hours)))


async def purge(database: Database, limits: Limits) -> int:
    """Delete what is older than `limits`. Returns how many rows.

    What a restart goes on from stays: signals that wait, answers of 410 that disable their endpoint, the decisions of both, and each instance's
    newest decision, from which its sequence numbers go on.
    """
    settled = and_(OutboxRow.state != "pending", OutboxRow.last_error.is_distinct_from(GONE))
    later = aliased(ScaleDecisionRow)
    is_newest = ~exists().where(later.instance_id == ScaleDecisionRow.instance_id, later.sequence > ScaleDecisionRow.sequence)
    needed = select(OutboxRow.decision_id).where(not_(settled))
    rollup, usage, totals = _TABLES["samples_rollup"].c, _TABLES["usage_rollup"].c, _TABLES["usage_totals"].c
    num_deleted = 0
    for table, at, before_wall, conditions in (
        ("requests", "received_wall", limits.ledger, ()),
        ("engine_events", "at_wall", limits.ledger, ()),
        ("outbox", "created_wall", limits.ledger, (settled,)),
        ("scale_decisions", "at_wall", limits.ledger, (ScaleDecisionRow.id.not_in(needed), not_(is_newest))),
        ("samples", "at_wall", limits.samples, ()),
        ("samples_rollup", "start_wall", limits.minutes - MINUTE_SECONDS, (rollup.resolution_seconds == MINUTE_SECONDS,)),
        ("samples_rollup", "start_wall", limits.hours - HOUR_SECONDS, (rollup.resolution_seconds == HOUR_SECONDS,)),
        ("usage_rollup", "start_wall", limits.hours - HOUR_SECONDS, (usage.period_seconds == HOUR_SECONDS,)),
        ("usage_rollup", "start_wall", limits.hours - _DAY_SECONDS, (usage.period_seconds == _DAY_SECONDS,)),
        ("usage_totals", "start_wall", limits.hours - HOUR_SECONDS, (totals.period_seconds == HOUR_SECONDS,)),
        ("usage_totals", "start_wall", limits.hours - _DAY_SECONDS, (totals.period_seconds == _DAY_SECONDS,)),
    ):
        num_deleted += await _purge_table(database, _TABLES[table], at, before_wall, conditions)
    return num_deleted


async def _purge_table(database: Database, table: Table, at: str, before_wall: float, conditions: tuple[ColumnElement[bool], ...]) -> int:
    """Delete a table's old rows, oldest first; the batches adapt to what the database needs for them."""
    time_column = table.c[at]
    doomed = and_(time_column < before_wall, *conditions)
    batch, num_deleted = _FIRST_BATCH, 0
    while True:
        async with database.session() as session:  # looked up without the write lock
            times = select(time_column).where(doomed).order_by(time_column).limit(batch)
            found = (await session.execute(times)).scalars().all()
        if not found:
            return num_deleted
        # Rows of one instant go together. The time has one bound, or SQLite may search the index by the other: 250 ms for 50 rows of a million.
        statement = delete(table).where(time_column <= found[-1], *conditions)
        num_rows, seconds = await database.execute_briefly(statement)
        num_deleted += num_rows
        batch = max(_MIN_BATCH, min(_MAX_BATCH, int(batch * min(2.0, _HOLD_SECONDS / seconds))))
        await asyncio.sleep(seconds)  # let the writer in
