"""The named queries and the purge, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from appliance.clock import ManualClock
from appliance.events import EngineEvent, RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store import queries
from appliance.store.database import Database
from appliance.store.outbox import GONE, Outbox
from appliance.store.tables import DeliveryRow, EngineEventRow, OutboxRow, RequestRow, SampleRow, ScaleDecisionRow
from appliance.store.writer import StoreWriter

WALL = 1_700_000_000.0
Record = Callable[..., RequestRecord]


@pytest.fixture
def writer(database: Database, tmp_path: Path) -> StoreWriter:
    """Writes into the database under test; flush it by hand."""
    return StoreWriter(database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "spool", instance_id="node-1", fleet="blue")


def _decision(index: int, at_wall: float, instance_id: str = "node-1") -> ScaleDecisionRow:
    return ScaleDecisionRow(
        id=f"decision-{index}" if instance_id == "node-1" else f"{instance_id}-decision-{index}",
        sequence=index,
        instance_id=instance_id,
        fleet="blue",
        at_wall=at_wall,
        expires_wall=at_wall + 300,
        direction="up",
        current_replicas=1,
        desired_replicas=2,
        reason="queue age 3.0 s is over 1.0 s",
        inputs={"queue_age": 3.0, "ttft_p95": None},
        alternatives=["hold: the queue grows"],
        mode="act",
    )


def _signal(index: int, state: str, created_wall: float, last_error: str | None = None) -> OutboxRow:
    return OutboxRow(
        id=f"signal-{index}",
        decision_id=f"decision-{index}",
        instance_id="node-1",
        fleet="blue",
        endpoint="http://127.0.0.1:1/hook",
        sequence=index,
        body="{}",
        created_wall=created_wall,
        expires_wall=created_wall + 300,
        state=state,
        next_attempt_wall=created_wall,
        last_error=last_error,
    )


async def test_recent_requests_page(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """Newest first; `before_wall` goes on where the last page ended; a key sees its own."""
    for index in range(10):
        writer.put_request(make_record(index))
    await writer.flush()
    async with database.session() as session:
        first = await queries.recent_requests(session, limit=4)
        second = await queries.recent_requests(session, limit=4, before_wall=first[-1]["received_wall"])
        mine = await queries.recent_requests(session, key_id="key1")
    assert [row["received_wall"] - WALL for row in (*first, *second)] == [9, 8, 7, 6, 5, 4, 3, 2]
    assert {row["key_id"] for row in mine} == {"key1"}
    assert len(mine) == 3


async def test_a_request_is_found_by_either_id(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """The server's id finds one row; a client's id finds all that carried it."""
    for index in range(3):
        writer.put_request(make_record(index, client_request_id="mine"))
    await writer.flush()
    async with database.session() as session:
        assert len(await queries.request_by_id(session, make_record(1).id)) == 1
        assert len(await queries.request_by_id(session, "mine")) == 3
        assert await queries.request_by_id(session, "nobody's") == []


async def test_slowest_requests(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """The longest durations since then, longest first."""
    for index in range(6):
        writer.put_request(make_record(index, duration_seconds=float(10 - index)))
    await writer.flush()
    async with database.session() as session:
        rows = await queries.slowest_requests(session, since_wall=WALL + 2, limit=2)
    assert [row["duration_seconds"] for row in rows] == [8.0, 7.0]


async def test_usage_adds_up_by_key(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """Counts and sums are integers on both databases, and unknown joules stay unknown."""
    for index in range(6):
        writer.put_request(make_record(index, key_id=f"key{index % 2}", status=500 if index == 3 else 200, joules=2.5 if index % 2 else None))
    await writer.flush()
    async with database.session() as session:
        even, odd = await queries.usage_by_key(session, since_wall=WALL, until_wall=WALL + 5)
    assert (even["key_id"], even["num_requests"], even["num_errors"], even["joules"]) == ("key0", 3, 0, None)
    assert (odd["key_id"], odd["num_requests"], odd["num_errors"], odd["joules"]) == ("key1", 2, 1, 5.0)
    assert (odd["num_prompt_tokens"], odd["num_cached_tokens"], odd["num_generated_tokens"]) == (200, 32, 100)
    assert isinstance(odd["num_prompt_tokens"], int)
    assert odd["duration_seconds"] == pytest.approx(2.2)


async def test_sample_history_is_half_open(database: Database, writer: StoreWriter, make_sample: Callable[[float], Sample]) -> None:
    """Oldest first, the start included, the end not."""
    for index in range(5):
        writer.put_sample(make_sample(WALL + 10 * index))
    await writer.flush()
    async with database.session() as session:
        rows = await queries.sample_history(session, since_wall=WALL + 10, until_wall=WALL + 30)
        assert await queries.sample_history(session, since_wall=0, until_wall=2e9, instance_id="node-2") == []
    assert [row["at_wall"] - WALL for row in rows] == [10, 20]


async def test_a_decision_and_its_signal_are_one_transaction(database: Database) -> None:
    """Either both are there or neither; the decision's JSON comes back as it was."""
    async with database.begin() as session:
        session.add_all([_decision(1, WALL), _signal(1, "pending", WALL)])
    with pytest.raises(IntegrityError):
        async with database.begin() as session:
            session.add_all([_decision(2, WALL), _signal(1, "pending", WALL)])
    async with database.session() as session:
        (row,) = await queries.recent_decisions(session)
        assert (await session.get(OutboxRow, "signal-1")) is not None
    assert (row["inputs"], row["alternatives"]) == ({"queue_age": 3.0, "ttft_p95": None}, ["hold: the queue grows"])


async def test_the_purge_deletes_the_old_in_batches(
    database: Database, writer: StoreWriter, make_record: Record, make_sample: Callable[[float], Sample]
) -> None:
    """What is older than the limit goes from every table, settled signals with their deliveries too; waiting signals keep their decision."""
    for index in range(25):
        writer.put_request(make_record(index))
        writer.put_sample(make_sample(WALL + index))
        writer.put_engine_event(EngineEvent("crashed", WALL + index, ""))
    await writer.flush()
    async with database.begin() as session:
        session.add_all([*(_decision(index, WALL + index) for index in range(3)), _decision(9, WALL + 30)])
        session.add_all([_signal(0, "delivered", WALL), _signal(1, "pending", WALL + 1), _signal(2, "dead", WALL + 30)])
    async with database.begin() as session:
        session.add(DeliveryRow(outbox_id="signal-0", instance_id="node-1", fleet="blue", attempt=1, at_wall=WALL, duration_seconds=0.1, status=200))
    assert await queries.purge(database, before_wall=WALL + 20, batch=7) == 3 * 20 + 1 + 2  # decision 2 takes signal 2 along
    async with database.session() as session:
        counts = {
            table.__tablename__: (await session.execute(select(func.count()).select_from(table))).scalar()
            for table in (RequestRow, SampleRow, EngineEventRow, ScaleDecisionRow, OutboxRow, DeliveryRow)
        }
        kept = (await session.execute(select(ScaleDecisionRow.id))).scalars().all()
    assert counts == {"requests": 5, "samples": 5, "engine_events": 5, "scale_decisions": 2, "outbox": 1, "deliveries": 0}
    assert sorted(kept) == ["decision-1", "decision-9"]
    assert await queries.purge(database, before_wall=WALL + 20) == 0


async def test_the_purge_keeps_what_a_restart_goes_on_from(database: Database) -> None:
    """The newest decision of each instance, or sequence numbers would begin at 1 again; and the answer 410, or its endpoint would be called again."""
    async with database.begin() as session:
        session.add_all([_decision(index, WALL + index) for index in range(4)])
        session.add_all([_decision(index, WALL + index, instance_id="node-2") for index in range(2)])
        session.add_all([_signal(0, "dead", WALL, last_error=GONE), _signal(1, "dead", WALL + 1), _signal(3, "delivered", WALL + 3)])
    assert await queries.purge(database, before_wall=WALL + 100, batch=1) == 2 + 2 + 1  # two signals, decisions 1 and 2, the other instance's 0
    for instance_id, sequence in (("node-1", 3), ("node-2", 1)):
        found = await Outbox(database, instance_id=instance_id, fleet="blue").last_decision()
        assert found is not None
        assert found[0].sequence == sequence
    outbox = Outbox(database, instance_id="node-1", fleet="blue")
    assert await outbox.disabled_endpoints() == {"http://127.0.0.1:1/hook"}
    assert await outbox.enable("http://127.0.0.1:1/hook")
    assert await queries.purge(database, before_wall=WALL + 100) == 2  # what was kept for the endpoint alone
