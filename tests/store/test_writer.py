"""The batched writer: never in the way of serving, no row lost, none twice, whatever the database does."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, func, select, text

from appliance.clock import ManualClock
from appliance.events import EngineEvent, LedgerState, RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store import rows as rows_module
from appliance.store.database import Database
from appliance.store.queries import engine_events, find_requests, sample_history
from appliance.store.tables import RequestRow, SampleRow
from appliance.store.tally import TOTALS
from appliance.store.writer import StoreWriter

Record = Callable[..., RequestRecord]


class Outage:
    """Plays a database that is away: while `on`, every transaction fails before or after its commit."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        self.after_commit = False
        real = database.write

        async def write(work: Callable[[Connection], Any]) -> Any:
            if self.on and not self.after_commit:
                raise ConnectionRefusedError("the database is away")
            done = await real(work)
            if self.on:
                raise ConnectionResetError("the answer to COMMIT was lost")
            return done

        monkeypatch.setattr(database, "write", write)


def _writer(database: Database, folder: Path, clock: ManualClock | None = None, **settings: Any) -> StoreWriter:
    return StoreWriter(
        database, settings=StoreSettings(**settings), clock=clock or ManualClock(), spool_dir=folder / "spool", instance_id="node-1", fleet="blue"
    )


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what another task does, 20 s at most."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (the writer has no event for a test to wait on)
            await asyncio.sleep(0.005)


async def _ids(database: Database) -> list[str]:
    async with database.session() as session:
        return sorted((await session.execute(select(RequestRow.id))).scalars())


def test_every_field_has_a_column() -> None:
    """RequestRecord's fields, ledger states and verdict, and Sample's fields, are exactly the columns of their tables (with instance and fleet)."""
    ours = {"instance_id", "fleet"}
    request = {field.name for field in msgspec.structs.fields(RequestRecord)} - {"states"} | {f"{state.value}_seconds" for state in LedgerState}
    assert set(RequestRow.__table__.columns.keys()) == request | ours | {"ttft_good", "tpot_good"}
    assert set(SampleRow.__table__.columns.keys()) == {field.name for field in msgspec.structs.fields(Sample)} | ours
    assert set(rows_module.TABLES["engine_events"].columns.keys()) == {field.name for field in msgspec.structs.fields(EngineEvent)} | ours


async def test_what_goes_in_comes_out(database: Database, tmp_path: Path, make_record: Record, make_sample: Callable[[float], Sample]) -> None:
    """A request, a sample and an engine event are stored with every field, and the writer says so."""
    writer = _writer(database, tmp_path)
    record, sample = make_record(1, client_request_id="mine"), make_sample(1_700_000_000.0)
    event = EngineEvent("crashed", 1_700_000_001.0, "SIGKILL", 42, 3)
    writer.put_request(record)
    writer.put_sample(sample)
    writer.put_engine_event(event)
    assert writer.stats.num_queued_rows == 3
    await writer.flush()
    async with database.session() as session:
        (stored,) = (await find_requests(session)).requests
        (series,) = (await sample_history(session, since_wall=0, until_wall=2e9, resolution_seconds=10)).series
        (stored_event,) = await engine_events(session)
    assert (stored.instance_id, stored.fleet) == ("node-1", "blue")
    assert stored.record == record
    assert series.at_wall == (sample.at_wall,)
    assert series.columns == {name: (value,) for name, value in msgspec.structs.asdict(sample).items() if name != "at_wall"}
    assert (stored_event.event, stored_event.instance_id, stored_event.fleet) == (event, "node-1", "blue")
    assert (writer.stats.num_written_rows, writer.stats.num_queued_rows, writer.stats.available) == (3, 0, True)


async def test_the_task_writes_within_the_flush_time(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Started, the writer needs no call to flush; a full batch does not even wait for the time."""
    writer = _writer(database, tmp_path, flush_seconds=0.02)
    writer.start()
    writer.put_request(make_record(1))
    await _until(lambda: writer.stats.num_written_rows >= 1)
    await writer.close()
    slow = _writer(database, tmp_path, flush_seconds=3600)
    slow.start()
    for index in range(2, 302):
        slow.put_request(make_record(index))
    await _until(lambda: slow.stats.num_written_rows >= 256)
    await slow.close()
    assert len(await _ids(database)) == 301


async def test_the_same_row_twice_is_stored_once(
    database: Database, tmp_path: Path, make_record: Record, make_sample: Callable[[float], Sample]
) -> None:
    """Keys decide: a record that is handed over again changes nothing."""
    writer = _writer(database, tmp_path)
    for _ in range(2):
        writer.put_request(make_record(1))
        writer.put_sample(make_sample(5.0))
        writer.put_engine_event(EngineEvent("ready", 6.0, ""))
        await writer.flush()
    async with database.session() as session:
        counts = [(await session.execute(select(func.count()).select_from(table))).scalar() for table in rows_module.TABLES.values()]
    assert counts == [1, 1, 1]


async def test_an_outage_spools_and_replays(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record) -> None:
    """While the database is away rows go to disk and retries back off; when it returns all are there, once."""
    clock = ManualClock()
    outage, writer = Outage(database, monkeypatch), _writer(database, tmp_path, clock)
    writer.put_request(make_record(0))
    await writer.flush()
    outage.on = True
    for index in range(1, 2001):
        writer.put_request(make_record(index))
        if index % 200 == 0:
            await writer._flush()
            clock.advance(0.1)
    stats = writer.stats
    assert (stats.num_spooled_rows, stats.num_queued_rows, stats.available) == (2000, 0, False)
    assert stats.num_failed_flushes < 10  # backed off
    outage.on = False
    writer.put_request(make_record(2001))
    await writer.flush()
    assert await _ids(database) == [make_record(index).id for index in range(2002)]
    stats = writer.stats
    assert (stats.num_written_rows, stats.num_spooled_rows, stats.num_dropped_rows, stats.available) == (2002, 0, 0, True)


async def test_an_unheard_commit_is_not_stored_twice(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record
) -> None:
    """The connection breaks after the commit: the batch is sent again, and the database keeps one of each."""
    outage, writer = Outage(database, monkeypatch), _writer(database, tmp_path)
    outage.on = outage.after_commit = True
    for index in range(20):
        writer.put_request(make_record(index))
    await writer.flush()
    assert writer.stats.num_spooled_rows == 20
    outage.on = False
    await writer.flush()
    assert len(await _ids(database)) == 20
    assert writer.stats.num_spooled_rows == 0


async def test_a_crash_loses_nothing_that_was_spooled(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record
) -> None:
    """The process dies while rows are on disk; the next writer replays them when it starts."""
    outage, first = Outage(database, monkeypatch), _writer(database, tmp_path)
    outage.on = True
    for index in range(10):
        first.put_request(make_record(index))
    await first.flush()
    outage.on = False
    second = _writer(database, tmp_path, flush_seconds=0.01)
    assert second.stats.num_spooled_rows == 10
    second.start()
    await _until(lambda: not second.stats.num_spooled_rows)
    await second.close()
    assert len(await _ids(database)) == 10


async def test_close_spools_what_the_database_does_not_take(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record
) -> None:
    """Shutting down during an outage leaves the rows on disk, even if the database hangs."""
    writer = _writer(database, tmp_path)
    monkeypatch.setattr("appliance.store.writer._CLOSE_SECONDS", 0.05)

    async def hanging(_: Callable[[Connection], Any]) -> None:
        await asyncio.sleep(3600)

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", hanging)
        writer.start()
        for index in range(300):
            writer.put_request(make_record(index))
        await asyncio.sleep(0.02)  # the flush hangs by now
        await writer.close()
    assert (writer.stats.num_queued_rows, writer.stats.num_dropped_rows) == (0, 0)
    again = _writer(database, tmp_path)
    assert again.stats.num_spooled_rows == 300
    await again.flush()
    assert len(await _ids(database)) == 300


async def test_a_thread_that_ends_late_stores_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record) -> None:
    """A flush that takes too long is given up and its rows spool, but SQLite's thread goes on and commits: sent again, each counts once."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
    await database.migrate()
    writer, release = _writer(database, tmp_path), threading.Event()
    insert = writer._statements.insert

    def late(connection: Connection, rows: Any) -> None:
        insert(connection, rows)
        release.wait(20)

    monkeypatch.setattr("appliance.store.writer._FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(writer._statements, "insert", late)
    for index in range(20):
        writer.put_request(make_record(index))
    await writer.flush()
    assert writer.stats.num_spooled_rows == 20
    monkeypatch.undo()
    release.set()
    for index in range(15, 25):
        writer.put_request(make_record(index))
    await writer.flush()
    assert len(await _ids(database)) == 25
    async with database.session() as session:
        counted = (await session.execute(select(func.sum(TOTALS.c.num_requests)).where(TOTALS.c.period_seconds == 3600))).scalar()
    assert counted == 25
    await database.close()


async def test_no_database_and_no_disk_is_bounded_and_counted(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record
) -> None:
    """With neither database nor disk the queue stays at its bound, the oldest rows go, each is counted, and the rest is written afterwards."""
    outage, writer = Outage(database, monkeypatch), _writer(database, tmp_path, queue_rows=300)
    outage.on = True
    (tmp_path / "spool").write_text("a file where the folder should be")
    for index in range(1000):
        writer.put_request(make_record(index))
        if index % 100 == 0:
            await writer._flush()
        assert writer.stats.num_queued_rows <= 300
    stats = writer.stats
    assert stats.num_dropped_rows == 700
    outage.on = False
    await writer.flush()
    assert await _ids(database) == [make_record(index).id for index in range(700, 1000)]


async def test_a_full_queue_moves_to_disk(database: Database, tmp_path: Path, make_record: Record) -> None:
    """Rows beyond the bound of the queue spool at once, without the flush; none is lost."""
    writer = _writer(database, tmp_path, queue_rows=100)
    for index in range(1000):
        writer.put_request(make_record(index))
    assert writer.stats.num_queued_rows <= 100
    assert writer.stats.num_queued_rows + writer.stats.num_spooled_rows == 1000
    await writer.flush()
    assert len(await _ids(database)) == 1000
    assert writer.stats.num_dropped_rows == 0


async def test_one_bad_row_costs_itself_alone(database: Database, tmp_path: Path, make_record: Record) -> None:
    """A value that the database cannot hold is refused and counted; the rows beside it are stored, and nothing loops."""
    writer = _writer(database, tmp_path)
    for index in range(5):
        writer.put_request(make_record(index, seed=1 << 80 if index == 2 else index))
    await writer.flush()
    assert len(await _ids(database)) == 4
    assert (writer.stats.num_refused_rows, writer.stats.num_written_rows, writer.stats.num_spooled_rows) == (1, 4, 0)
    assert writer.stats.available


async def test_hostile_text_is_stored(database: Database, tmp_path: Path, make_record: Record) -> None:
    """NUL, lone surrogates and text beyond its column cannot cost a row."""
    writer = _writer(database, tmp_path)
    writer.put_request(make_record(1, client_request_id="a\0b\udcffé" + "x" * 100, model="m" * 1000))
    await writer.flush()
    async with database.session() as session:
        (stored,) = (await find_requests(session)).requests
    assert stored.record.client_request_id == "a?b?é" + "x" * 59
    assert stored.record.model == "m" * 256


async def test_a_missing_table_loses_no_row(database: Database, tmp_path: Path, make_record: Record) -> None:
    """A table that is not there is the database's fault, not the row's: rows wait until it is."""
    async with database.begin() as connection:
        await connection.execute(text("ALTER TABLE requests RENAME TO elsewhere"))
    writer = _writer(database, tmp_path)
    writer.put_request(make_record(1))
    await writer.flush()
    assert (writer.stats.num_spooled_rows, writer.stats.num_refused_rows) == (1, 0)
    async with database.begin() as connection:
        await connection.execute(text("ALTER TABLE elsewhere RENAME TO requests"))
    await writer.flush()
    assert len(await _ids(database)) == 1


async def test_a_database_that_was_away_at_the_start_is_migrated(empty_database: Database, tmp_path: Path, make_record: Record) -> None:
    """The server may start without its database: once it is there, the writer brings the schema up to date before the first row."""
    writer = _writer(empty_database, tmp_path)
    writer.put_request(make_record(1))
    await writer.flush()
    assert len(await _ids(empty_database)) == 1
    assert empty_database.migrated


async def test_a_locked_sqlite_database_waits(tmp_path: Path, make_record: Record) -> None:
    """Another process that holds the write lock delays a flush; the rows are stored once it lets go."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
    await database.migrate()
    writer = _writer(database, tmp_path)
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer.put_request(make_record(1))
    flush = asyncio.create_task(writer.flush())
    await asyncio.sleep(0.05)
    assert not flush.done()
    other.execute("COMMIT")
    other.close()
    await flush
    assert len(await _ids(database)) == 1
    await database.close()


async def test_a_read_only_sqlite_database_spools(tmp_path: Path, make_record: Record) -> None:
    """A database that refuses writes is served around: rows spool, and are replayed when it takes them again."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
    await database.migrate()
    await database.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "b.db")
    database = Database(f"sqlite+aiosqlite:///file:{tmp_path / 'b.db'}?mode=ro&uri=true")
    database.migrated = True
    writer = _writer(database, tmp_path)
    writer.put_request(make_record(1))
    await writer.flush()
    assert (writer.stats.available, writer.stats.num_spooled_rows) == (False, 1)
    await database.close()
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
    writer = _writer(database, tmp_path)
    assert writer.stats.num_spooled_rows == 1
    await writer.flush()
    assert len(await _ids(database)) == 1
    await database.close()


async def test_postgresql_stops_and_comes_back(cluster: Any, tmp_path: Path, make_record: Record, request: pytest.FixtureRequest) -> None:
    """PostgreSQL is killed under load and started again: no put fails, no row is lost or doubled."""
    database = Database(cluster.url("postgres"))
    await database.migrate()
    writer = _writer(database, tmp_path, flush_seconds=0.01)
    writer.start()
    try:
        for index in range(300):
            writer.put_request(make_record(index))
            await asyncio.sleep(0)
        await asyncio.to_thread(cluster.stop)
        for index in range(300, 600):
            writer.put_request(make_record(index))
            if index % 50 == 0:
                await asyncio.sleep(0.02)
        await _until(lambda: not writer.stats.available)
    finally:
        await asyncio.to_thread(cluster.start)
    await writer.close()
    assert len(await _ids(database)) == 600
    assert (writer.stats.num_dropped_rows, writer.stats.num_refused_rows, writer.stats.num_spooled_rows) == (0, 0, 0)
    async with database.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await database.close()
