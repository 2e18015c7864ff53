"""The migrations with data in the tables, up and down, on SQLite and PostgreSQL: no row is lost, and what is derived is made of what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, insert, select, text

from appliance.clock import ManualClock
from appliance.events import RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store.database import Database
from appliance.store.rollup import roll_up
from appliance.store.rows import row_of
from appliance.store.tables import Base, EngineEventRow, RequestRow
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage
from appliance.store.writer import StoreWriter

WALL = 1_700_000_000.0
Record = Callable[..., RequestRecord]


async def _columns(database: Database, name: str) -> list[str]:
    """The columns that a table has now."""
    async with database.session() as session:
        return list((await session.execute(text(f"SELECT * FROM {name} WHERE 1 = 0"))).keys())  # noqa: S608 (names of our tables)


async def _fill(database: Database, records: list[RequestRecord], samples: list[Sample]) -> None:
    """Rows of a schema of any age: the columns that it does not have are left out."""
    async with database.begin() as connection:
        for record in (*records, *samples):
            name, row = row_of(record, "node-1", "blue")
            table: Table = Base.metadata.tables[name]
            known = (await connection.execute(text(f"SELECT * FROM {name} WHERE 1 = 0"))).keys()  # noqa: S608 (names of our tables)
            await connection.execute(insert(table).values({column: value for column, value in row.items() if column in known}))
        events = {"instance_id": "node-1", "at_wall": WALL, "kind": "ready", "fleet": "blue", "detail": "é", "pid": 1, "num_in_flight": 0}
        await connection.execute(insert(EngineEventRow.__table__).values(events))
        await connection.execute(
            text(
                "INSERT INTO scale_decisions (id, sequence, instance_id, fleet, at_wall, expires_wall, direction, current_replicas, desired_replicas,"
                " reason, inputs, alternatives, mode) VALUES ('d', 1, 'node-1', 'blue', 1, 2, 'up', 1, 2, 'é', '{\"a\": 1.5}', '[]', 'act')"
            )
        )
        await connection.execute(
            text(
                "INSERT INTO outbox (id, decision_id, instance_id, fleet, endpoint, sequence, body, created_wall, expires_wall, state, attempts,"
                " next_attempt_wall) VALUES ('o', 'd', 'node-1', 'blue', 'http://a', 1, '{}', 1, 2, 'dead', 3, 1)"
            )
        )
        await connection.execute(
            text(
                "INSERT INTO deliveries (outbox_id, instance_id, fleet, attempt, at_wall, duration_seconds) VALUES ('o', 'node-1', 'blue', 1, 1, 0.5)"
            )
        )


async def _content(database: Database, names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Every row of these tables, whatever columns they have, in some fixed order."""
    found = {}
    async with database.session() as session:
        for name in names:
            rows = [dict(row) for row in (await session.execute(text(f"SELECT * FROM {name}"))).mappings()]  # noqa: S608 (names of our tables)
            found[name] = sorted(rows, key=repr)
    return found


TABLES_OF_0001 = ("requests", "samples", "engine_events", "scale_decisions", "outbox", "deliveries")


def _records(make_record: Record) -> list[RequestRecord]:
    statuses = (200, 404, 429, 499, 500, 503)
    return [
        make_record(
            index,
            received_wall=WALL + 1700.5 * index,
            status=statuses[index % 6],
            joules=2.5 if index % 5 == 0 else None,
            ttft_seconds=None if index % 4 == 0 else 0.25,
            model="large" if index % 7 == 0 else "small",
        )
        for index in range(150)
    ]


async def test_upgrade_adds_up_what_the_ledger_holds(
    empty_database: Database, tmp_path: Path, make_record: Record, make_sample: Callable[[float], Sample]
) -> None:
    """0001 with data to 0002: every old row as it was, verdicts unknown; usage as the writer would have counted it; then both go on from there."""
    database, records = empty_database, _records(make_record)
    samples = [make_sample(WALL + 10 * index) for index in range(30)]
    await database.migrate("0001")
    assert not database.migrated
    await _fill(database, records, samples)
    before = await _content(database, TABLES_OF_0001)
    await database.migrate()
    after = await _content(database, TABLES_OF_0001)
    assert all(row.pop("ttft_good") is None and row.pop("tpot_good") is None for row in after["requests"])
    assert {name: sorted(rows, key=repr) for name, rows in after.items()} == before
    await _check_usage(database)

    writer = StoreWriter(database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "spool", instance_id="node-1", fleet="blue")
    for record in (*records[-3:], make_record(1000, received_wall=records[-1].received_wall)):
        writer.put_request(record)
    await writer.flush()
    await _check_usage(database)
    assert await roll_up(database) == 6 + 1  # five minutes of samples, in six of the clock's
    assert len((await _content(database, ("requests",)))["requests"]) == 151


async def test_downgrade_keeps_every_row(
    empty_database: Database, tmp_path: Path, make_record: Record, make_sample: Callable[[float], Sample]
) -> None:
    """0002 with data to 0001 and back: the old tables keep every row; verdicts are gone, what the ledger holds is counted anew."""
    database = empty_database
    await database.migrate()
    await _fill(database, _records(make_record), [make_sample(WALL)])
    await roll_up(database)
    before = await _content(database, TABLES_OF_0001)
    await database.downgrade("0001")
    kept = await _content(database, TABLES_OF_0001)
    for row in before["requests"]:
        del row["ttft_good"], row["tpot_good"]
    assert kept == {name: sorted(rows, key=repr) for name, rows in before.items()}
    await database.migrate()
    await _check_usage(database)
    await database.downgrade("base")
    await database.migrate()
    assert await _content(database, TABLES_OF_0001) == {name: [] for name in TABLES_OF_0001}


async def test_a_migration_that_fails_changes_nothing(empty_database: Database, make_record: Record, make_sample: Callable[[float], Sample]) -> None:
    """It is one transaction: with a table in its way, 0002 leaves 0001 and its rows as they were, and succeeds once that is gone."""
    database = empty_database
    await database.migrate("0001")
    await _fill(database, _records(make_record), [make_sample(WALL)])
    async with database.begin() as connection:
        await connection.execute(text("CREATE TABLE samples_rollup (x INTEGER)"))
    before = await _content(database, TABLES_OF_0001)
    with pytest.raises(Exception, match="samples_rollup"):
        await database.migrate()
    assert (await database.revision(), await _content(database, TABLES_OF_0001)) == ("0001", before)
    assert "ttft_good" not in await _columns(database, "requests")
    async with database.begin() as connection:
        await connection.execute(text("DROP TABLE samples_rollup"))
    await database.migrate()
    await _check_usage(database)


async def _check_usage(database: Database) -> None:
    async with database.session() as session:
        ledger = [dict(row) for row in (await session.execute(select(RequestRow.__table__))).mappings()]
        for table in (ROLLUP, TOTALS):
            stored = [dict(row) for row in (await session.execute(select(table).order_by(*table.primary_key.columns))).mappings()]
            expected = fold_usage(count_usage(ledger), table)
            assert len(stored) == len(expected) > 0
            for found, computed in zip(stored, expected, strict=True):
                for name, value in computed.items():
                    assert found[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name


def test_the_tables_of_the_first_schema_are_all_filled() -> None:
    """The tests above speak of every table that 0001 made."""
    assert {*TABLES_OF_0001, "samples_rollup", "usage_rollup", "usage_totals"} == set(Base.metadata.tables)
