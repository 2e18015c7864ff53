"""The queries of the ledger and of decisions, and the purge, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from appliance.clock import ManualClock
from appliance.errors import InvalidRequest
from appliance.events import EngineEvent, RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store import queries, retention
from appliance.store.database import Database
from appliance.store.outbox import GONE, Outbox
from appliance.store.queries import RequestFilter
from appliance.store.retention import Limits, purge
from appliance.store.tables import DeliveryRow, EngineEventRow, OutboxRow, RequestRow, SampleRow, ScaleDecisionRow
from appliance.store.writer import StoreWriter

WALL = 1_700_000_000.0
Record = Callable[..., RequestRecord]


@pytest.fixture
def writer(database: Database, tmp_path: Path) -> StoreWriter:
    """Writes into the database under test; flush it by hand."""
    return StoreWriter(
        database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "spool", instance_id="node-1", fleet="blue", judge=_judge
    )


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


@dataclass(frozen=True)
class _Verdict:
    ttft: bool | None
    tpot: bool | None


def _judge(record: RequestRecord) -> _Verdict:
    """Requests of half a second to the first token are late; failures are bad; 4xx are not judged."""
    if 400 <= record.status < 500:
        return _Verdict(None, None)
    if record.status >= 500:
        return _Verdict(False, False)
    return _Verdict(record.ttft_seconds is not None and record.ttft_seconds < 0.5, True)


async def _pages(database: Database, where: RequestFilter, limit: int) -> list[list[int]]:
    """Pages until the end, each the seconds of reception of its requests."""
    pages, cursor = [], None
    async with database.session() as session:
        while True:
            page = await queries.find_requests(session, where, limit=limit, cursor=cursor)
            pages.append([round(stored.record.received_wall - WALL) for stored in page.requests])
            cursor = page.cursor
            if cursor is None:
                return pages


async def test_requests_page_by_key(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """Newest first; a cursor goes on where its page ended, requests of the same instant and new ones notwithstanding."""
    for index in range(10):
        writer.put_request(make_record(index, received_wall=WALL + index // 3))
    await writer.flush()
    assert await _pages(database, RequestFilter(), 4) == [[3, 2, 2, 2], [1, 1, 1, 0], [0, 0]]
    async with database.session() as session:
        first = await queries.find_requests(session, limit=4)
    writer.put_request(make_record(99, received_wall=WALL + 50))
    await writer.flush()
    async with database.session() as session:
        second = await queries.find_requests(session, limit=100, cursor=first.cursor)
        with pytest.raises(InvalidRequest, match="cursor"):
            await queries.find_requests(session, cursor="bm9uZQ")
    ids = [stored.record.id for stored in (*first.requests, *second.requests)]
    assert ids == sorted((make_record(index).id for index in range(10)), reverse=True)


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({"key_id": "key1"}, [10, 7, 4, 1]),
    ({"since_wall": WALL + 3, "until_wall": WALL + 5}, [4, 3]),
    ({"failed": True}, [8, 6, 3]),
    ({"failed": False, "key_id": "key0"}, [9, 0]),
    ({"failed": True, "key_id": "key0"}, [6, 3]),
    ({"status": 503}, [3]),
    ({"status": 200, "min_duration_seconds": 5.0}, [7]),
    ({"good": True, "model": "other"}, [2]),
    ({"good": False}, [6, 5, 3]),
    ({"finish_reason": "length"}, [4]),
    ({"endpoint": "/v1/completions"}, [1]),
    ({"instance_id": "node-2"}, []),
    ({"fleet": "blue", "since_wall": WALL + 10}, [10]),
]


async def test_requests_are_filtered(
    database: Database,
    writer: StoreWriter,
    make_record: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each condition alone and with others; pages that may look at three rows only still find everything, some of them empty."""
    changes: dict[int, dict[str, Any]] = {
        1: {"endpoint": "/v1/completions"},
        2: {"model": "other"},
        3: {"status": 503},
        4: {"finish_reason": "length"},
        5: {"ttft_seconds": 0.9},
        6: {"status": 500},
        7: {"duration_seconds": 9.0},
        8: {"status": 404},
    }
    for index in range(11):
        writer.put_request(make_record(index, **changes.get(index, {})))
    await writer.flush()
    for where, expected in FILTERS:
        assert await _pages(database, RequestFilter(**where), 100) == [expected], where
    monkeypatch.setattr(queries, "_SCAN_ROWS", 3)
    monkeypatch.setattr(queries, "_SCAN_ROWS_OF_KEY", 2)
    for where, expected in FILTERS:
        pages = await _pages(database, RequestFilter(**where), 2)
        assert [second for page in pages for second in page] == expected, where


async def test_a_request_is_found_by_either_id(database: Database, writer: StoreWriter, make_record: Record) -> None:
    """The server's id finds one row; a client's id finds all that carried it."""
    for index in range(3):
        writer.put_request(make_record(index, client_request_id="mine"))
    await writer.flush()
    async with database.session() as session:
        (one,) = await queries.request_by_id(session, make_record(1).id)
        assert one.record == make_record(1, client_request_id="mine")
        assert (one.ttft_good, one.tpot_good, one.good) == (True, True, True)
        assert len(await queries.request_by_id(session, "mine")) == 3
        assert await queries.request_by_id(session, "nobody's") == ()


@pytest.mark.parametrize("narrow_rows", [3, 1000])
async def test_slowest_requests(
    database: Database, writer: StoreWriter, make_record: Record, monkeypatch: pytest.MonkeyPatch, narrow_rows: int
) -> None:
    """The longest durations of the range, longest first, whichever way they are searched; its end is not part of it."""
    monkeypatch.setattr(queries, "_NARROW_ROWS", narrow_rows)
    for index in range(6):
        writer.put_request(make_record(index, duration_seconds=float(10 - index)))
    await writer.flush()
    async with database.session() as session:
        found = await queries.slowest_requests(session, since_wall=WALL + 2, until_wall=WALL + 5, limit=2)
        all_of_it = await queries.slowest_requests(session, since_wall=WALL + 2, until_wall=WALL + 5)
    assert [stored.record.duration_seconds for stored in found] == [8.0, 7.0]
    assert [stored.record.duration_seconds for stored in all_of_it] == [8.0, 7.0, 6.0]


async def test_a_decision_and_its_signal_are_one_transaction(database: Database) -> None:
    """Either both are there or neither; the decision's JSON comes back as it was."""
    async with database.begin() as session:
        session.add_all([_decision(1, WALL), _signal(1, "pending", WALL)])
    with pytest.raises(IntegrityError):
        async with database.begin() as session:
            session.add_all([_decision(2, WALL), _signal(1, "pending", WALL)])
    async with database.session() as session:
        (stored,) = await queries.scale_decisions(session)
        assert (await session.get(OutboxRow, "signal-1")) is not None
    assert (stored.decision.inputs, stored.decision.alternatives) == ({"queue_age": 3.0, "ttft_p95": None}, ("hold: the queue grows",))
    assert stored.signals == {"pending": 1}


def _before(wall: float) -> Limits:
    return Limits(ledger=wall, samples=wall, minutes=wall, hours=wall - 86400)


async def test_the_purge_deletes_the_old_in_batches(
    database: Database, writer: StoreWriter, make_record: Record, make_sample: Callable[[float], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is older than the limit goes from every table, settled signals with their deliveries too; waiting signals keep their decision."""
    monkeypatch.setattr(retention, "_FIRST_BATCH", 7)
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
    assert await purge(database, _before(WALL + 20)) == 3 * 20 + 1 + 2  # decision 2 takes signal 2 along
    async with database.session() as session:
        counts = {
            table.__tablename__: (await session.execute(select(func.count()).select_from(table))).scalar()
            for table in (RequestRow, SampleRow, EngineEventRow, ScaleDecisionRow, OutboxRow, DeliveryRow)
        }
        kept = (await session.execute(select(ScaleDecisionRow.id))).scalars().all()
    assert counts == {"requests": 5, "samples": 5, "engine_events": 5, "scale_decisions": 2, "outbox": 1, "deliveries": 0}
    assert sorted(kept) == ["decision-1", "decision-9"]
    assert await purge(database, _before(WALL + 20)) == 0


async def test_the_purge_keeps_what_a_restart_goes_on_from(database: Database) -> None:
    """The newest decision of each instance, or sequence numbers would begin at 1 again; and the answer 410, or its endpoint would be called again."""
    async with database.begin() as session:
        session.add_all([_decision(index, WALL + index) for index in range(4)])
        session.add_all([_decision(index, WALL + index, instance_id="node-2") for index in range(2)])
        session.add_all([_signal(0, "dead", WALL, last_error=GONE), _signal(1, "dead", WALL + 1), _signal(3, "delivered", WALL + 3)])
    assert await purge(database, _before(WALL + 100)) == 2 + 2 + 1  # two signals, decisions 1 and 2, the other instance's 0
    for instance_id, sequence in (("node-1", 3), ("node-2", 1)):
        found = await Outbox(database, instance_id=instance_id, fleet="blue").last_decision()
        assert found is not None
        assert found[0].sequence == sequence
    outbox = Outbox(database, instance_id="node-1", fleet="blue")
    assert await outbox.disabled_endpoints() == {"http://127.0.0.1:1/hook"}
    assert await outbox.enable("http://127.0.0.1:1/hook")
    assert await purge(database, _before(WALL + 100)) == 2  # what was kept for the endpoint alone
