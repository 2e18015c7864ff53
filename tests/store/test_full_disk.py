"""A disk that is full, a database that takes no writes: serving goes on in bounded memory, losses are counted, and what was kept is written later."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, text

from appliance.clock import ManualClock
from appliance.events import RequestRecord
from appliance.settings import StoreSettings
from appliance.store.database import Database
from appliance.store.tables import RequestRow
from appliance.store.tally import TOTALS
from appliance.store.upkeep import Upkeep
from appliance.store.writer import StoreWriter

Record = Callable[..., RequestRecord]


class FullDisk:
    """While `on`, SQLite may add no page to its file, and writes to the spool fail as on a full disk."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        self._write = os.write
        for engine in database.sync_engines:
            event.listen(engine, "checkout", self._limit)
        monkeypatch.setattr(os, "write", self._full)

    def _limit(self, connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count = {1 if self.on else 1 << 30}")  # SQLite takes the present size for a limit below it
        cursor.close()

    def _full(self, descriptor: int, data: bytes) -> int:
        if self.on and "/spool" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(descriptor, data)


@pytest.fixture
async def sqlite_database(tmp_path: Path) -> AsyncIterator[Database]:
    """A SQLite database with the current schema."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")
    await database.migrate()
    yield database
    await database.close()


def _writer(database: Database, folder: Path, clock: ManualClock, queue_rows: int = 300) -> StoreWriter:
    return StoreWriter(
        database, settings=StoreSettings(queue_rows=queue_rows), clock=clock, spool_dir=folder / "spool", instance_id="node-1", fleet="blue"
    )


async def _ids(database: Database) -> list[str]:
    async with database.session() as session:
        return sorted((await session.execute(select(RequestRow.id))).scalars())


async def test_a_full_disk_is_served_around(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite's file cannot grow and the spool's neither: the queue stays at its bound, the rest is counted as lost, and said once, not per row.

    When there is space again every row that was kept is stored once, and usage with it.
    """
    clock = ManualClock()
    disk, writer = FullDisk(sqlite_database, monkeypatch), _writer(sqlite_database, tmp_path, clock)
    for index in range(50):
        writer.put_request(make_record(index))
    await writer.flush()
    disk.on = True
    await sqlite_database.engine.dispose()
    for index in range(50, 3050):
        writer.put_request(make_record(index))
        if index % 50 == 0:
            clock.advance(0.5)
            await writer._flush()
        assert writer.stats.num_queued_rows <= 300
    stats = writer.stats
    written = stats.num_written_rows
    assert 50 <= written < 1000  # free pages of the file took some
    assert stats.num_dropped_rows == 3050 - written - 300
    assert (stats.available, stats.num_refused_rows, stats.num_spooled_rows) == (False, 0, 0)
    messages = [record.message for record in caplog.records]
    assert len([message for message in messages if "does not take rows" in message]) == 2  # the database's, the spool's
    assert len([message for message in messages if "lost so far" in message]) == 1
    disk.on = False
    await sqlite_database.engine.dispose()
    await writer.flush()
    assert len(await _ids(sqlite_database)) == written + 300
    assert (await _ids(sqlite_database))[-300:] == [make_record(index).id for index in range(2750, 3050)]
    async with sqlite_database.session() as session:
        counted = (await session.execute(select(TOTALS.c.num_requests).where(TOTALS.c.period_seconds == 86400))).scalars()
        assert sum(counted) == written + 300
    assert writer.stats.available


async def test_a_database_disk_that_is_full_spools(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record: Record
) -> None:
    """Where the spool's disk has space, nothing is lost; rollup and purge leave the full database alone and do not raise."""
    clock = ManualClock()
    disk, writer = FullDisk(sqlite_database, monkeypatch), _writer(sqlite_database, tmp_path, clock)
    monkeypatch.setattr(os, "write", disk._write)
    disk.on = True
    await sqlite_database.engine.dispose()
    for index in range(2000):
        writer.put_request(make_record(index))
        if index % 100 == 0:
            clock.advance(1)
            await writer._flush()
    await Upkeep(sqlite_database, settings=StoreSettings(), clock=clock).purge()
    assert (writer.stats.num_dropped_rows, writer.stats.available) == (0, False)
    assert writer.stats.num_spooled_rows > 1000
    disk.on = False
    await sqlite_database.engine.dispose()
    await writer.flush()
    assert len(await _ids(sqlite_database)) == 2000


async def test_a_database_that_turns_read_only_spools(database: Database, tmp_path: Path, make_record: Record) -> None:
    """PostgreSQL becomes a read-only standby, SQLite's file may not be written: rows spool, none is refused as invalid; then they are stored once."""
    clock = ManualClock()
    writer = _writer(database, tmp_path, clock)
    writer.put_request(make_record(0))
    await writer.flush()

    async def read_only(on: bool) -> None:
        if database.dialect == "postgresql":
            async with database.begin() as connection:
                await connection.execute(text("SET TRANSACTION READ WRITE"))
                await connection.execute(text(f"ALTER DATABASE {database.url.database} SET default_transaction_read_only = {'on' if on else 'off'}"))
        await database.engine.dispose()

    if database.dialect == "sqlite":
        for engine in database.sync_engines:
            event.listen(engine, "checkout", lambda connection, *_: _query_only(connection, clock.monotonic() < 2000))
    await read_only(True)
    for index in range(1, 500):
        writer.put_request(make_record(index))
    await writer.flush()
    await Upkeep(database, settings=StoreSettings(), clock=clock).purge()
    stats = writer.stats
    assert (stats.available, stats.num_spooled_rows, stats.num_refused_rows, stats.num_dropped_rows) == (False, 499, 0, 0)
    clock.advance(2000)
    await read_only(False)
    await writer.flush()
    assert len(await _ids(database)) == 500
    assert (writer.stats.available, writer.stats.num_spooled_rows) == (True, 0)


def _query_only(connection: Any, on: bool) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA query_only = {'ON' if on else 'OFF'}")
    cursor.close()


def test_sqlite_limits_pages_as_the_tests_expect(tmp_path: Path) -> None:
    """A limit below the file's size is its size: no page can be added, those there may be written."""
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE t (x)")
    (limit,) = connection.execute("PRAGMA max_page_count = 1").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    assert limit == pages
    connection.close()
