"""Rollups, retention and the locks between appliances, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy import func, select, text

from appliance.clock import ManualClock
from appliance.events import RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store import retention, rollup
from appliance.store.database import UPKEEP_LOCK, Database
from appliance.store.retention import Limits
from appliance.store.rollup import roll_up
from appliance.store.tables import RequestRow, SampleRollupRow, SampleRow, UsageRollupRow
from appliance.store.upkeep import Upkeep
from appliance.store.writer import StoreWriter

HOUR = 1_700_000_400.0  # 22:20 UTC; of a whole minute, not of an hour
START = 1_699_999_200.0  # the whole hour before
NEVER = 0.0


@pytest.fixture
def writer(database: Database, tmp_path: Path) -> StoreWriter:
    """Writes into the database under test; flush it by hand."""
    return StoreWriter(database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "spool", instance_id="node-1", fleet="blue")


def _other(database: Database, tmp_path: Path) -> StoreWriter:
    return StoreWriter(database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "other", instance_id="node-2", fleet="blue")


async def _rollups(database: Database, resolution: int) -> list[dict[str, Any]]:
    table = SampleRollupRow.__table__
    query = select(table).where(table.c.resolution_seconds == resolution).order_by(table.c.instance_id, table.c.start_wall)
    async with database.session() as session:
        return [dict(row) for row in (await session.execute(query)).mappings()]


async def _count(database: Database, table: Any) -> int:
    async with database.session() as session:
        return int((await session.execute(select(func.count()).select_from(table))).scalar_one())


def test_every_field_of_a_sample_is_rolled_up() -> None:
    """A field that Sample gains must be rolled up too, or charts of a month would lose it."""
    fields = {field.name for field in msgspec.structs.fields(Sample)} - {"at_wall", "engine_state"}
    assert fields <= set(SampleRollupRow.__table__.columns.keys())


async def test_samples_roll_up_to_minutes_and_hours(
    database: Database, writer: StoreWriter, make_sample: Callable[[float], Sample], tmp_path: Path
) -> None:
    """Counts are summed, gauges averaged over the samples that have them, maxima kept; each instance by itself; all types as declared."""
    other = _other(database, tmp_path)
    for index in range(12):  # two minutes, in one hour
        sample = make_sample(START + 10 * index)
        changes = {"num_requests": index, "num_running": index, "kv_utilisation": 0.1 * index, "engine_state": "ready" if index % 4 else "starting"}
        changes |= {"gpu_joules": None, "goodput": 1.0 if index >= 6 else None, "memory_used_bytes": 1 << 40}
        writer.put_sample(msgspec.structs.replace(sample, **changes))
    writer.put_sample(make_sample(START + 3600))
    other.put_sample(make_sample(START))
    await writer.flush()
    await other.flush()
    assert await roll_up(database) == 3 + 1 + 2 + 1
    first, second, third, others = await _rollups(database, 60)
    assert [row["start_wall"] for row in (first, second, third, others)] == [START, START + 60, START + 3600, START]
    assert (first["instance_id"], first["fleet"], others["instance_id"]) == ("node-1", "blue", "node-2")
    assert (first["num_samples"], first["num_requests"], first["num_running"], first["max_num_running"]) == (6, 15, 2.5, 5)
    assert (first["period_seconds"], first["gpu_joules"], first["goodput"], second["goodput"]) == (1.5, None, None, 1.0)
    assert first["ready_share"] == pytest.approx(4 / 6)
    assert first["kv_utilisation"] == pytest.approx(0.25)
    assert first["max_kv_utilisation"] == pytest.approx(0.5)
    assert (first["memory_used_bytes"], first["max_memory_used_bytes"]) == (float(1 << 40), 1 << 40)
    hour, next_hour, _ = await _rollups(database, 3600)
    assert (hour["start_wall"], hour["num_samples"], hour["num_requests"], hour["num_running"], hour["max_num_running"]) == (START, 12, 66, 5.5, 11)
    assert (hour["goodput"], hour["ready_share"], next_hour["num_samples"]) == (1.0, 0.75, 1)
    for row in (first, hour):
        assert all(
            isinstance(row[column.name], column.type.python_type) for column in SampleRollupRow.__table__.columns if row[column.name] is not None
        )


async def test_a_rollup_runs_again_for_what_came_late(database: Database, writer: StoreWriter, make_sample: Callable[[float], Sample]) -> None:
    """A second run writes nothing; one sample that arrives late renews its minute and hour alone, days later and however many ran in between."""
    for index in range(0, 60, 2):
        writer.put_sample(make_sample(START + 10 * index))
    await writer.flush()
    assert await roll_up(database) == 10 + 1
    assert await roll_up(database) == 0
    writer.put_sample(make_sample(START + 130))
    await writer.flush()
    assert await roll_up(database, since_wall=START + 200) == 0
    assert await roll_up(database, since_wall=START + 125) == 1 + 1
    assert [row["num_samples"] for row in await _rollups(database, 60)] == [3, 3, 4, 3, 3, 3, 3, 3, 3, 3]
    assert (await _rollups(database, 3600))[0]["num_samples"] == 31


async def test_rollups_do_not_shrink_with_their_samples(database: Database, writer: StoreWriter, make_sample: Callable[[float], Sample]) -> None:
    """The purge takes samples, then minutes, away; rollups stay as they were, whether or not a late sample makes them look again."""
    for index in range(12):
        writer.put_sample(make_sample(START + 10 * index))
    await writer.flush()
    await roll_up(database)
    before = await _rollups(database, 60), await _rollups(database, 3600)
    await retention.purge(database, Limits(ledger=NEVER, samples=START + 90, minutes=NEVER, hours=NEVER))
    writer.put_sample(make_sample(START + 1))
    await writer.flush()
    await roll_up(database)
    assert (await _rollups(database, 60), await _rollups(database, 3600)) == before
    await retention.purge(database, Limits(ledger=NEVER, samples=START + 90, minutes=START + 61, hours=NEVER))
    await roll_up(database)
    assert [row["num_samples"] for row in await _rollups(database, 60)] == [6]
    assert await _rollups(database, 3600) == before[1]


async def test_rollups_go_in_small_transactions(
    database: Database, writer: StoreWriter, make_sample: Callable[[float], Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is to do, each transaction writes a bounded number of rows, and gaps in time are skipped."""
    monkeypatch.setattr(rollup, "_CHUNK_ROWS", 3)
    for minute in (0, 1, 2, 3, 4, 500, 501):
        writer.put_sample(make_sample(START + 60 * minute))
    await writer.flush()
    sizes = []
    real = rollup._aggregate

    async def aggregate(*arguments: Any) -> Any:
        rows = await real(*arguments)
        sizes.append(len(rows))
        return rows

    monkeypatch.setattr(rollup, "_aggregate", aggregate)
    assert await roll_up(database) == 9
    assert sizes == [3, 2, 2, 1, 1]


async def test_usage_outlives_the_ledger(database: Database, writer: StoreWriter, make_record: Callable[..., RequestRecord]) -> None:
    """The ledger is purged at its own age; what it added up to stays until that of the hours."""
    for index in range(10):
        writer.put_request(make_record(index, received_wall=START + 600 * index))
    await writer.flush()
    assert await retention.purge(database, Limits(ledger=START + 1e6, samples=NEVER, minutes=NEVER, hours=START + 3601)) == 10 + 3 + 1
    async with database.session() as session:
        days = (await session.execute(select(func.sum(UsageRollupRow.num_requests)).where(UsageRollupRow.period_seconds == 86400))).scalar()
    assert days == 10  # their day is not over
    async with database.session() as session:
        counted = (await session.execute(select(func.sum(UsageRollupRow.num_requests)).where(UsageRollupRow.period_seconds == 3600))).scalar()
    assert counted == 4
    assert await _count(database, RequestRow) == 0


async def test_upkeep_does_all_of_it(
    database: Database, writer: StoreWriter, make_record: Callable[..., RequestRecord], make_sample: Callable[[float], Sample]
) -> None:
    """What is purged as a sample was rolled up before, at the ages of the settings."""
    day = 86400.0
    now = START + 40 * day
    writer.put_request(make_record(0, received_wall=START))
    writer.put_request(make_record(1, received_wall=now - 29 * day))
    for at in (START, now - 8 * day, now - 6 * day):
        writer.put_sample(make_sample(at))
    await writer.flush()
    upkeep = Upkeep(database, settings=StoreSettings(), clock=ManualClock(wall=now))
    await upkeep.purge()
    assert (await _count(database, RequestRow), await _count(database, SampleRow)) == (1, 1)
    assert [row["num_samples"] for row in await _rollups(database, 60)] == [1, 1, 1]
    assert len(await _rollups(database, 3600)) == 3


async def test_upkeep_waits_for_a_database_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that raised would be a traceback every minute: it says so once, and goes on when the database is back."""
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none")
    upkeep = Upkeep(database, settings=StoreSettings(), clock=ManualClock())
    await upkeep.roll_up()
    assert not caplog.records  # not migrated yet: the writer's business
    database.migrated = True
    await upkeep.roll_up()
    await upkeep.purge()
    await database.close()
    assert len([record for record in caplog.records if "wait for the database" in record.message]) == 1


async def test_jobs_bear_to_be_late(database: Database) -> None:
    """APScheduler drops what is a second late unless told otherwise; a server that restarts often still purges."""
    scheduler = AsyncIOScheduler(timezone="UTC")
    Upkeep(database, settings=StoreSettings(), clock=ManualClock()).schedule(scheduler)
    scheduler.start(paused=True)
    jobs = scheduler.get_jobs()
    scheduler.shutdown(wait=False)
    assert {job.id for job in jobs} == {"store-rollup", "store-purge"}
    assert all(job.misfire_grace_time >= 3600 and job.coalesce for job in jobs)


async def test_one_appliance_keeps_a_shared_database(
    cluster: Any, database_of_cluster: str, make_sample: Callable[[float], Sample], tmp_path: Path
) -> None:
    """While one has the lock the others leave rollup and purge to it; when its connection dies, the next one may."""
    first, second = Database(database_of_cluster), Database(database_of_cluster)
    await first.migrate()
    second.migrated = True
    writer = _other(second, tmp_path)
    writer.put_sample(make_sample(START))
    await writer.flush()
    upkeep = Upkeep(second, settings=StoreSettings(), clock=ManualClock(wall=START + 60))
    async with first.alone(UPKEEP_LOCK) as mine:
        assert mine
        await upkeep.roll_up()
        assert await _rollups(second, 60) == []
        async with second.engine.connect() as connection:
            holders = text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid()")
            await connection.execute(holders)
        async with asyncio.timeout(20):
            while not await _rollups(second, 60):  # the server ends the session when it gets to it
                await upkeep.roll_up()
    async with first.alone(UPKEEP_LOCK) as mine, second.alone(UPKEEP_LOCK) as also:
        assert (mine, also) == (True, False)
    await first.close()
    await second.close()


async def test_several_appliances_migrate_one_database(cluster: Any, database_of_cluster: str) -> None:
    """Ten that start at once, on an empty database: one migrates, the others wait, all find it current."""
    databases = [Database(database_of_cluster) for _ in range(10)]
    await asyncio.gather(*(database.migrate() for database in databases))
    assert len({await database.revision() for database in databases}) == 1
    for database in databases:
        await database.close()
