"""Scale decisions and the signals that carry them: what is decided and what must be sent are one transaction, so neither exists without the other.

Only rows of this instance are touched: on a shared PostgreSQL every appliance delivers its own. Every method is one short transaction and raises
SQLAlchemyError or OSError while the database is away; calling it again is safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import CursorResult, Update, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.errors import InvalidRequest, NotFound
from appliance.events import ScaleDecision
from appliance.store.database import Database
from appliance.store.tables import DeliveryRow, OutboxRow, ScaleDecisionRow

GONE = "410: the endpoint is gone and is disabled"
"""`last_error` of the row that disabled its endpoint. Kept in SQL, so that a restart does not forget it."""

THROTTLED_STATUSES = (429, 502, 503, 504)
"""Answers that speak for the endpoint and not for the signal: a newer signal keeps the pause that they asked for."""


@dataclass(frozen=True, slots=True)
class Message:
    """A signal to one endpoint: `body` is what is signed and sent, byte for byte."""

    endpoint: str
    body: str


@dataclass(frozen=True, slots=True)
class Pending:
    """An outbox row that is due."""

    id: str  # the webhook-id
    decision_id: str
    endpoint: str
    sequence: int
    body: str
    expires_wall: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one attempt. `state` is the row's state from now on: pending (try again at `next_attempt_wall`), delivered or dead."""

    at_wall: float
    duration_seconds: float
    state: str
    status: int | None = None
    error: str | None = None
    next_attempt_wall: float | None = None


def webhook_id(decision_id: str, endpoint: str) -> str:
    """The idempotency key of `decision_id` at `endpoint`: the same for every attempt, at most 64 characters, without a dot."""
    return f"{decision_id}-{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}"


class Outbox:
    """Reads and writes `scale_decisions`, `outbox` and `deliveries`."""

    def __init__(self, database: Database, *, instance_id: str, fleet: str) -> None:
        self._database = database
        self._instance_id = instance_id
        self._fleet = fleet

    async def record(self, decision: ScaleDecision, messages: Sequence[Message] = (), *, outcome: str | None = None, approved: bool = False) -> int:
        """Store `decision` and its signals; older undelivered signals to the same endpoints, and older decisions that wait for approval, are
        superseded. `approved` marks one that repeats an approved one. Returns how many signals were superseded."""
        async with self._database.begin() as session:
            columns = msgspec.structs.asdict(decision) | {"alternatives": list(decision.alternatives), "outcome": outcome}
            columns["inputs"] = {name: value for name, value in decision.inputs.items() if value is None or abs(value) < float("inf")}
            session.add(ScaleDecisionRow(**columns, approved_wall=decision.at_wall if approved else None, approved_by=None))
            await session.flush()
            waiting = update(ScaleDecisionRow).where(
                ScaleDecisionRow.instance_id == self._instance_id,
                ScaleDecisionRow.sequence < decision.sequence,
                ScaleDecisionRow.mode == "approve",
                ScaleDecisionRow.approved_wall.is_(None),
                ScaleDecisionRow.outcome.is_(None),
            )
            await session.execute(waiting.values(outcome=f"superseded by {decision.sequence}"))
            return await self._enqueue(session, decision, messages, decision.at_wall)

    async def approve(self, decision_id: str, messages: Sequence[Message], *, by: str, now_wall: float) -> int:
        """Let a decision that waits for approval go out. Returns how many older signals it superseded.

        Raises NotFound for an unknown id, InvalidRequest for one that needs no approval, has it, was superseded or has expired.
        """
        async with self._database.begin() as session:
            row = await session.get(ScaleDecisionRow, decision_id, with_for_update=True)
            if row is None or row.instance_id != self._instance_id:
                raise NotFound(f"no scale decision {decision_id!r}")
            decision = _decision(row)
            if row.mode != "approve":
                raise InvalidRequest(f"decision {decision_id} was taken in mode {row.mode!r} and needs no approval", code="not_approvable")
            if row.approved_wall is not None or row.outcome is not None:
                raise InvalidRequest(f"decision {decision_id} is no longer open: {row.outcome or 'approved'}", code="not_open")
            if row.expires_wall <= now_wall:
                raise InvalidRequest(f"decision {decision_id} expired {now_wall - row.expires_wall:.0f} s ago", code="decision_expired")
            row.approved_wall, row.approved_by = now_wall, by[:128]
            if not messages:
                row.outcome = "approved; no endpoint"
            return await self._enqueue(session, decision, messages, now_wall)

    async def find(self, decision_id: str) -> ScaleDecision:
        """The decision. Raises NotFound."""
        async with self._database.session() as session:
            row = await session.get(ScaleDecisionRow, decision_id)
            if row is None or row.instance_id != self._instance_id:
                raise NotFound(f"no scale decision {decision_id!r}")
            return _decision(row)

    async def last_decision(self) -> tuple[ScaleDecision, bool] | None:
        """The newest decision of this instance, and whether it was approved or needed no approval; None before the first."""
        async with self._database.session() as session:
            query = select(ScaleDecisionRow).where(ScaleDecisionRow.instance_id == self._instance_id).order_by(ScaleDecisionRow.sequence.desc())
            row = (await session.execute(query.limit(1))).scalar_one_or_none()
            return None if row is None else (_decision(row), row.mode == "act" or row.approved_wall is not None)

    async def due(self, now_wall: float) -> list[Pending]:
        """Signals to be sent now: of each endpoint the newest only."""
        columns = (OutboxRow.id, OutboxRow.decision_id, OutboxRow.endpoint, OutboxRow.sequence, OutboxRow.body, OutboxRow.expires_wall)
        async with self._database.session() as session:
            query = select(*columns, OutboxRow.attempts).where(*self._pending(), OutboxRow.next_attempt_wall <= now_wall)
            rows = (await session.execute(query.order_by(OutboxRow.sequence))).all()
        return list({row.endpoint: Pending(*row) for row in rows}.values())

    async def next_attempt_wall(self) -> float | None:
        """When the next signal is due; None where none waits."""
        async with self._database.session() as session:
            return (await session.execute(select(func.min(OutboxRow.next_attempt_wall)).where(*self._pending()))).scalar()

    async def num_pending(self) -> int:
        """Signals that wait."""
        async with self._database.session() as session:
            return (await session.execute(select(func.count()).select_from(OutboxRow).where(*self._pending()))).scalar_one()

    async def finish(self, row: Pending, attempt: Attempt) -> None:
        """Write down an attempt. A row that was superseded meanwhile stays so unless it was delivered."""
        async with self._database.begin() as session:
            session.add(
                DeliveryRow(
                    outbox_id=row.id,
                    instance_id=self._instance_id,
                    fleet=self._fleet,
                    attempt=row.attempts + 1,
                    at_wall=attempt.at_wall,
                    duration_seconds=attempt.duration_seconds,
                    status=attempt.status,
                    error=attempt.error,
                )
            )
            values: dict[str, Any] = {
                "attempts": row.attempts + 1,
                "last_status": attempt.status,
                "last_error": attempt.error,
                "state": attempt.state,
            }
            if attempt.next_attempt_wall is not None:
                values["next_attempt_wall"] = attempt.next_attempt_wall
            change = update(OutboxRow).where(OutboxRow.id == row.id)
            if attempt.state != "delivered":
                change = change.where(OutboxRow.state == "pending")
            await session.execute(change.values(values))
            await self._settle(session, row.decision_id)

    async def expire(self, now_wall: float) -> int:
        """Give up the signals whose time is over; they are kept as dead letters. Returns how many."""
        async with self._database.begin() as session:
            overdue = select(OutboxRow.id, OutboxRow.decision_id).where(*self._pending(), OutboxRow.expires_wall <= now_wall)
            rows = (await session.execute(overdue)).all()
            for row in rows:
                error = func.coalesce("expired; " + OutboxRow.last_error, "expired")
                await session.execute(update(OutboxRow).where(OutboxRow.id == row.id).values(state="dead", last_error=error))
            for decision_id in {row.decision_id for row in rows}:
                await self._settle(session, decision_id)
            return len(rows)

    async def disable(self, endpoint: str) -> int:
        """Give up what else waits for an endpoint that answered 410. Returns how many signals."""
        change = update(OutboxRow).where(*self._pending(), OutboxRow.endpoint == endpoint)
        async with self._database.begin() as session:
            return await _execute(session, change.values(state="dead", last_error=GONE))

    async def enable(self, endpoint: str) -> bool:
        """Use an endpoint again that had answered 410. Returns whether it was disabled."""
        change = update(OutboxRow).where(OutboxRow.instance_id == self._instance_id, OutboxRow.endpoint == endpoint, OutboxRow.last_error == GONE)
        async with self._database.begin() as session:
            return await _execute(session, change.values(last_error="410: the endpoint was gone; enabled again since")) > 0

    async def disabled_endpoints(self) -> frozenset[str]:
        """Endpoints that answered 410 and were not enabled since."""
        async with self._database.session() as session:
            query = select(OutboxRow.endpoint).where(OutboxRow.instance_id == self._instance_id, OutboxRow.last_error == GONE).distinct()
            return frozenset((await session.execute(query)).scalars())

    async def num_by_state(self, decision_id: str) -> dict[str, int]:
        """The decision's signals by state; those that a 410 ended are left out."""
        async with self._database.session() as session:
            return await _num_by_state(session, decision_id)

    def _pending(self) -> tuple[Any, ...]:
        return OutboxRow.instance_id == self._instance_id, OutboxRow.state == "pending"

    async def _enqueue(self, session: AsyncSession, decision: ScaleDecision, messages: Sequence[Message], now_wall: float) -> int:
        """Add the rows; returns how many older ones they supersede."""
        num_superseded = 0
        for message in messages:
            older = (*self._pending(), OutboxRow.endpoint == message.endpoint, OutboxRow.sequence < decision.sequence)
            throttled = select(func.max(OutboxRow.next_attempt_wall)).where(*older, OutboxRow.last_status.in_(THROTTLED_STATUSES))
            pause_until = (await session.execute(throttled)).scalar()
            affected = set((await session.execute(select(OutboxRow.decision_id).where(*older))).scalars())
            num_superseded += await _execute(session, update(OutboxRow).where(*older).values(state="superseded"))
            for decision_id in affected:
                await self._settle(session, decision_id)
            session.add(
                OutboxRow(
                    id=webhook_id(decision.id, message.endpoint),
                    decision_id=decision.id,
                    instance_id=self._instance_id,
                    fleet=self._fleet,
                    endpoint=message.endpoint,
                    sequence=decision.sequence,
                    body=message.body,
                    created_wall=now_wall,
                    expires_wall=decision.expires_wall,
                    state="pending",
                    attempts=0,
                    next_attempt_wall=max(now_wall, pause_until or 0.0),
                )
            )
        await session.flush()
        return num_superseded

    async def _settle(self, session: AsyncSession, decision_id: str) -> None:
        """Say on the decision what came of it once none of its signals waits."""
        counts = await _num_by_state(session, decision_id, with_gone=True)
        if counts and "pending" not in counts:
            outcome = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            await session.execute(update(ScaleDecisionRow).where(ScaleDecisionRow.id == decision_id).values(outcome=outcome))


async def _execute(session: AsyncSession, statement: Update) -> int:
    """Rows that `statement` changed."""
    result = await session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount


async def _num_by_state(session: AsyncSession, decision_id: str, *, with_gone: bool = False) -> dict[str, int]:
    query = select(OutboxRow.state, func.count()).where(OutboxRow.decision_id == decision_id)
    if not with_gone:
        query = query.where(func.coalesce(OutboxRow.last_error, "") != GONE)
    return {row.state: row[1] for row in (await session.execute(query.group_by(OutboxRow.state))).all()}


def _decision(row: ScaleDecisionRow) -> ScaleDecision:
    return msgspec.convert({field: getattr(row, field) for field in ScaleDecision.__struct_fields__}, ScaleDecision)
