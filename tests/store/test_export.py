"""`appliance db`: export, check and vacuum, on SQLite and PostgreSQL."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from sqlalchemy import func, select, text

from appliance import cli
from appliance.clock import ManualClock
from appliance.commands.db import instant
from appliance.errors import ConfigError
from appliance.events import RequestRecord, Sample
from appliance.settings import StoreSettings
from appliance.store import export
from appliance.store.database import Database
from appliance.store.export import Range, sources, write_csv, write_parquet
from appliance.store.maintenance import newest_revision, problems, size_bytes, vacuum
from appliance.store.queries import Prices
from appliance.store.tables import RequestRow, ScaleDecisionRow
from appliance.store.writer import StoreWriter

WALL = 1_700_000_000.0
PRICES = Prices(prompt_per_million=1.0, output_per_million=2.0)
ALWAYS = Range(0.0, 2e9)
Record = Callable[..., RequestRecord]


@pytest.fixture
async def filled(database: Database, tmp_path: Path, make_record: Record, make_sample: Callable[[float], Sample]) -> Database:
    """Ten requests with awkward text, a sample, a decision."""
    writer = StoreWriter(database, settings=StoreSettings(), clock=ManualClock(), spool_dir=tmp_path / "spool", instance_id="node-1", fleet="blue")
    for index in range(10):
        writer.put_request(make_record(index, client_request_id='a "b", c\né', ttft_seconds=0.1 + index if index % 2 else None))
    writer.put_sample(make_sample(WALL))
    await writer.flush()
    async with database.begin() as session:
        fields = {"expires_wall": WALL, "direction": "up", "current_replicas": 1, "desired_replicas": 2, "reason": "é", "mode": "advise"}
        session.add(
            ScaleDecisionRow(id="d", sequence=1, instance_id="node-1", fleet="blue", at_wall=WALL, inputs={"é": 1.5}, alternatives=[], **fields)
        )
    return database


async def _csv(database: Database, name: str, of: Range = ALWAYS) -> list[dict[str, str]]:
    file = io.StringIO(newline="")
    num_rows = await write_csv(database, sources(PRICES)[name], of, file)
    file.seek(0)
    rows = list(csv.DictReader(file))
    assert len(rows) == num_rows
    return rows


async def test_a_table_goes_to_csv(filled: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column of every row in the range, oldest first, across chunks; text with quotes and line breaks survives, NULL is empty."""
    monkeypatch.setattr(export, "_CHUNK_ROWS", 3)
    rows = await _csv(filled, "requests")
    assert list(rows[0]) == list(RequestRow.__table__.columns.keys())
    assert [float(row["received_wall"]) - WALL for row in rows] == list(range(10))
    assert rows[0]["client_request_id"] == 'a "b", c\né'
    assert (rows[0]["ttft_seconds"], rows[1]["ttft_seconds"], rows[0]["stream"]) == ("", "1.1", "true")
    some = await _csv(filled, "requests", Range(WALL + 2, WALL + 8, limit=4))
    assert [row["id"] for row in some] == [row["id"] for row in rows[2:6]]
    (decision,) = await _csv(filled, "scale_decisions")
    assert (json.loads(decision["inputs"]), decision["alternatives"]) == ({"é": 1.5}, "[]")


async def test_parquet_holds_what_csv_does_with_types(filled: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns have their types whether or not a chunk has values for them."""
    monkeypatch.setattr(export, "_CHUNK_ROWS", 1)
    assert await write_parquet(filled, sources(PRICES)["requests"], ALWAYS, tmp_path / "a.parquet") == 10
    table = parquet.read_table(tmp_path / "a.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    names = ("id", "stream", "received_wall", "num_prompt_tokens", "joules", "ttft_good", "seed")
    assert [types[name] for name in names] == ["string", "bool", "double", "int64", "double", "bool", "int64"]
    rows = table.to_pylist()
    assert [row["ttft_seconds"] for row in rows] == [0.1 + index if index % 2 else None for index in range(10)]
    assert (rows[0]["client_request_id"], rows[0]["seed"]) == ('a "b", c\né', -(1 << 63))


async def test_everything_can_be_exported(filled: Database, tmp_path: Path) -> None:
    """Each table and query, in both forms, with as many rows; queries are flat and carry their cost."""
    for name, source in sources(PRICES).items():
        rows = await _csv(filled, name)
        assert await write_parquet(filled, source, ALWAYS, tmp_path / "b.parquet") == len(rows)
        assert parquet.read_table(tmp_path / "b.parquet").column_names == [column.name for column in source.columns]
        assert rows or name in ("samples_rollup", "slo_by_hour", "outbox", "deliveries", "engine_events"), name
    usage = await _csv(filled, "usage_by_key", Range(WALL, WALL + 60))
    assert {row["key_id"]: row["num_requests"] for row in usage} == {"key0": "4", "key1": "3", "key2": "3"}
    assert float(usage[0]["cost"]) == pytest.approx((400 + 2 * 200) / 1e6)
    assert len(await _csv(filled, "slowest_requests", Range(0.0, 2e9, limit=3))) == 3


async def test_the_database_is_checked_and_vacuumed(filled: Database) -> None:
    """A sound database has no problems; a vacuum keeps every row and does not grow the database."""
    assert await problems(filled) == []
    async with filled.begin() as connection:
        await connection.execute(text("DELETE FROM requests WHERE num_prompt_tokens > 0"))
    before = await size_bytes(filled)
    await vacuum(filled)
    assert 0 < await size_bytes(filled) <= before * 1.2
    async with filled.session() as session:
        assert (await session.execute(select(func.count()).select_from(ScaleDecisionRow))).scalar() == 1
    assert await filled.revision() == newest_revision()


def _appliance(*words: str) -> int:
    return cli.main(["db", *words])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """upgrade, check, export and vacuum by their names; what is wrong is said in one line and the status."""
    flags = ("--state-dir", str(tmp_path))
    assert _appliance("export", "requests", *flags) == 1
    assert _appliance("upgrade", *flags) == 0
    assert _appliance("check", *flags) == 0
    assert "sound" in capsys.readouterr().out
    assert _appliance("export", "requests", "--since", "30d", *flags) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("id,instance_id,fleet,")
    assert printed.err == "0 rows of requests\n"
    assert _appliance("export", "usage_by_key", "--output", str(tmp_path / "usage.parquet"), *flags) == 0
    assert parquet.read_table(tmp_path / "usage.parquet").num_rows == 0
    assert _appliance("export", "samples", "--output", str(tmp_path / "samples.csv"), *flags) == 0
    assert (tmp_path / "samples.csv").read_text().startswith("instance_id,at_wall,")
    assert _appliance("vacuum", *flags) == 0
    capsys.readouterr()
    assert _appliance("export", "nonsense", *flags) == 1
    assert "there are busiest_hours, deliveries" in capsys.readouterr().err
    assert _appliance("export", "requests", "--format", "parquet", *flags) == 1
    assert _appliance("export", "requests", "--since", "yesterday", *flags) == 2
    capsys.readouterr()
    assert _appliance("downgrade", "0001", *flags) == 0
    assert "-> 0001" in capsys.readouterr().out
    assert _appliance("export", "requests", *flags) == 1
    assert _appliance("check", *flags) == 1
    assert _appliance("downgrade", "nonsense", *flags) == 1


def test_a_damaged_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check reads the whole file: a page that was overwritten makes it fail."""
    flags = ("--state-dir", str(tmp_path))
    assert _appliance("upgrade", *flags) == 0
    with sqlite3.connect(tmp_path / "appliance.db") as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_samples_at_wall'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (tmp_path / "appliance.db").open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    assert _appliance("check", *flags) == 1
    printed = capsys.readouterr()
    assert "damaged" in printed.out or "malformed" in printed.err


def test_the_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """`appliance db export --help` lists exactly what can be exported."""
    with pytest.raises(SystemExit):
        _appliance("export", "--help")
    words = set(capsys.readouterr().out.replace(",", " ").replace(".", " ").split())
    assert set(sources(PRICES)) <= words


def test_a_limit_of_no_rows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Named and with its least value, before any database is opened."""
    with pytest.raises(SystemExit):
        _appliance("export", "requests", "--limit", "-1")
    assert "--limit: must be at least 1, not -1" in capsys.readouterr().err


def test_instants() -> None:
    """Ages, dates and Unix seconds; without a zone they are UTC."""
    now = 1_700_000_000.0
    assert instant("24h", now) == now - 86400
    assert instant("1.5d", now) == now - 129600
    assert instant("1700000000", now) == now
    assert instant("2023-11-14", now) == 1_699_920_000.0
    assert instant("2023-11-14T01:00+01:00", now) == 1_699_920_000.0
    with pytest.raises(ConfigError, match="soon"):
        instant("soon", now)


def test_parquet_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without pyarrow the message names the extra."""
    flags = ("--state-dir", str(tmp_path))
    assert _appliance("upgrade", *flags) == 0

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    import builtins

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    assert _appliance("export", "samples", "--output", str(tmp_path / "a.parquet"), *flags) == 1
    assert "inference-appliance[parquet]" in capsys.readouterr().err
