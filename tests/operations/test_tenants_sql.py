"""The SQL of the dashboards, filled in as Grafana would, against a real PostgreSQL that our own writer has filled, as the role that Grafana uses."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from board_queries import FOLDER, Target, boards, fill_sql, sql
from postgresql_cluster import Cluster, create_database, running_cluster
from sqlalchemy import make_url

from appliance.clock import SystemClock
from appliance.events import LedgerState, RequestRecord
from appliance.metrics.goodput import Slo, judge
from appliance.settings import StoreSettings
from appliance.store.database import Database
from appliance.store.tables import DeliveryRow, OutboxRow, ScaleDecisionRow
from appliance.store.writer import StoreWriter

HOUR = 3600.0
NOW = math.floor(time.time() / HOUR) * HOUR + 1800.0
KEYS = ("web", "", "o'brien")  # no key, and one that would end a quoted string
SHOWN = {"web": "web", "": "(no key)", "o'brien": "o'brien"}
MODEL = "tiny"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL; the module is skipped where there is none to start."""
    with running_cluster() as cluster:
        yield cluster


def _record(index: int) -> RequestRecord:
    """Request number `index`: keys in turn, one a minute backwards from NOW, every tenth failed, every seventh refused."""
    failed, refused = index % 10 == 9, index % 7 == 6
    states = {state.value: 0.0 for state in LedgerState} | {"decode": 1.0 + index * 0.01, "queued": 0.5}
    fields = {
        "id": f"01900000-0000-7000-8000-{index:012d}",
        "client_request_id": None,
        "endpoint": "/v1/chat/completions",
        "model": MODEL,
        "key_id": KEYS[index % 3],
        "stream": True,
        "received_wall": NOW - 60.0 * index,
        "duration_seconds": sum(states.values()),
        "status": 503 if refused else 500 if failed else 200,
        "finish_reason": "error" if failed or refused else "stop",
        "error_code": "queue_full" if refused else "internal_error" if failed else None,
        "num_choices": 1,
        "num_prompt_tokens": 100,
        "num_cached_tokens": 40,
        "num_generated_tokens": 0 if failed or refused else 50,
        "num_written_tokens": 0 if failed or refused else 50,
        "ttft_seconds": None if failed or refused else 0.5,
        "tpot_seconds": None if failed or refused else 0.02,
        "max_itl_seconds": None if failed or refused else 0.03,
        "num_preemptions": 0,
        "num_engine_restarts": 0,
        "states": states,
        "joules": None if failed or refused else 25.0,
    }
    return msgspec.convert(fields, RequestRecord)


@pytest.fixture
async def grafana(cluster: Cluster, tmp_path: Path) -> AsyncIterator[asyncpg.Connection]:
    """A connection as Grafana's role to a database with three hours of requests, two decisions and a delivery."""
    url = await create_database(cluster)
    database = Database(url)
    await database.migrate()
    clock, verdict = SystemClock(), partial(judge, slo=Slo(ttft_seconds=1.0, tpot_seconds=0.1))
    writer = StoreWriter(database, settings=StoreSettings(), clock=clock, spool_dir=tmp_path, instance_id="node-1", fleet="blue", judge=verdict)
    writer.start()
    for index in range(180):
        writer.put_request(_record(index))
    await writer.close()
    assert writer.stats.num_written_rows == 180
    async with database.begin() as session:
        for sequence in (1, 2):
            session.add(_decision(sequence))
        session.add(_signal())
        await session.flush()
        session.add(DeliveryRow(outbox_id="s1", instance_id="node-1", fleet="blue", attempt=1, at_wall=NOW, duration_seconds=0.1, status=503))
    await database.close()
    name = str(make_url(url).database)
    environment = {"PATH": f"{cluster.bin}:{os.environ['PATH']}", "PGHOST": str(cluster.sockets), "POSTGRES_USER": "appliance", "POSTGRES_DB": name}
    done = await asyncio.to_thread(_make_role, environment | {"GRAFANA_SQL_PASSWORD": "p'w"})
    assert done.returncode == 0, done.stderr
    connection = await asyncpg.connect(host=str(cluster.sockets), database=name, user="grafana")
    yield connection
    await connection.close()
    owner = await asyncpg.connect(host=str(cluster.sockets), database=name, user="appliance")
    await owner.execute("DROP OWNED BY grafana")
    await owner.execute("DROP ROLE grafana")
    await owner.close()


def _make_role(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = [str(FOLDER / "postgres/grafana-role.sh")]
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _decision(sequence: int) -> ScaleDecisionRow:
    return ScaleDecisionRow(
        id=f"d{sequence}",
        sequence=sequence,
        instance_id="node-1",
        fleet="blue",
        at_wall=NOW - 60.0 * sequence,
        expires_wall=NOW + 300,
        direction="up",
        current_replicas=1,
        desired_replicas=2,
        reason="the oldest of 7 waiting requests is 4 s old",
        inputs={},
        alternatives=[],
        mode="act",
    )


def _signal() -> OutboxRow:
    return OutboxRow(
        id="s1",
        decision_id="d1",
        instance_id="node-1",
        fleet="blue",
        endpoint="http://127.0.0.1:9/hook",
        sequence=1,
        body="{}",
        created_wall=NOW,
        expires_wall=NOW + 300,
        next_attempt_wall=NOW,
    )


def _filled(target: Target, keys: Iterable[str] = SHOWN.values()) -> str:
    return fill_sql(
        target.text,
        since=NOW - 2.9 * HOUR,
        until=NOW + 60,
        interval_seconds=300,
        choices={"fleet": ["blue"], "served": [MODEL], "key": list(keys)},
        texts={"prompt_price": "1", "cached_price": "0.5", "output_price": "4"},
    )


async def _rows(grafana: asyncpg.Connection, title: str) -> list[dict[str, Any]]:
    (target,) = (target for target in sql() if target.title == title and target.board == "appliance-tenants")
    return [dict(row) for row in await grafana.fetch(_filled(target))]


async def test_every_query_returns_rows_in_the_form_that_its_panel_needs(grafana: asyncpg.Connection) -> None:
    """No query fails or is empty or has a value that cannot be drawn; time series have a time, a name and a number."""
    assert len(sql()) >= 20
    for target in sql():
        rows = await grafana.fetch(_filled(target))
        assert rows, target
        for row in rows:
            for value in row.values():
                assert isinstance(value, str | int | float | datetime), (target, dict(row))
                assert not isinstance(value, float) or math.isfinite(value), (target, dict(row))
            if target.time_series:
                assert list(row.keys()) == ["time", "metric", "value"], target
                assert NOW - 4 * HOUR < row["time"] <= NOW, target
                assert isinstance(row["value"], float | int), target
            elif target.panel_type == "stat":
                assert len(row) == 1, target
            elif target.kind == "annotation":
                assert list(row.keys()) == ["time", "text", "tags"], target
                assert "the oldest of 7 waiting" in row["text"], target
            elif target.kind == "variable":
                assert len(row) == 1, target


async def test_usage_and_cost_are_right(grafana: asyncpg.Connection) -> None:
    """Sums by key are those of the requests, whole hours of them; cost is tokens times prices, cached ones apart; the sums of the board agree."""
    start = math.floor((NOW - 2.9 * HOUR) / HOUR) * HOUR
    counted = [record for record in map(_record, range(180)) if record.received_wall >= start]
    rows = await _rows(grafana, "Usage and cost by key")
    assert {row["key"] for row in rows} == set(SHOWN.values())
    for row in rows:
        mine = [record for record in counted if SHOWN[record.key_id] == row["key"]]
        prompt, cached, output = (sum(getattr(r, f"num_{name}_tokens") for r in mine) for name in ("prompt", "cached", "generated"))
        assert (row["requests"], row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (len(mine), prompt, cached, output)
        assert row["failed"] == sum(record.status >= 500 for record in mine)
        assert row["goodput"] == pytest.approx(sum(record.status == 200 for record in mine) / len(mine))
        assert row["cost"] == pytest.approx(((prompt - cached) * 1 + cached * 0.5 + output * 4) / 1e6)
        assert row["joules"] == 25.0 * sum(record.status == 200 for record in mine)
        assert row["joules_a_token"] == pytest.approx(0.5)
        assert row["mean_ttft"] == pytest.approx(0.5)
    assert (await _rows(grafana, "Cost"))[0]["value"] == pytest.approx(sum(row["cost"] for row in rows))
    assert (await _rows(grafana, "Requests"))[0]["value"] == len(counted)
    by_hour = await _rows(grafana, "Output tokens by key")
    assert sum(row["value"] for row in by_hour) == sum(row["output_tokens"] for row in rows)


async def test_the_slowest_come_first_with_a_ledger_that_sums(grafana: asyncpg.Connection) -> None:
    """The oldest requests of the range were made the slowest; the states beside each sum to its duration."""
    rows = await _rows(grafana, "Slowest requests")
    durations = [row["duration"] for row in rows]
    assert durations == sorted(durations, reverse=True)
    assert len(rows) == 50
    states = [name for name in rows[0] if name in {state.value for state in LedgerState}]
    assert len(states) == len(LedgerState)
    for row in rows:
        assert sum(row[name] for name in states) == pytest.approx(row["duration"])


async def test_grafana_may_read_and_nothing_else(grafana: asyncpg.Connection) -> None:
    """Its role sees every table, writes none even outside a read-only transaction, and cannot run for ever."""
    assert await grafana.fetchval("SELECT count(*) FROM requests") == 180
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await grafana.execute("DELETE FROM requests")
    await grafana.execute("SET default_transaction_read_only = off")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await grafana.execute("DELETE FROM requests")
    assert await grafana.fetchval("SHOW statement_timeout") == "30s"


@pytest.mark.parametrize("keys", [["nobody"], []])
async def test_choices_narrow_every_query(grafana: asyncpg.Connection, keys: list[str]) -> None:
    """A key that made no request, and none at all as before the first request, leave every panel of the tenants empty or at its zero."""
    panels = [target for target in sql() if target.board == "appliance-tenants" and target.kind == "panel"]
    assert len(panels) == sum(panel["type"] != "row" for panel in boards()["appliance-tenants"]["panels"])
    for target in panels:
        rows = await grafana.fetch(_filled(target, keys))
        assert not rows or (target.panel_type == "stat" and rows[0]["value"] in (0, 1)), target


async def test_the_variables_offer_every_key(grafana: asyncpg.Connection) -> None:
    """Requests without a key among them, under a name: Grafana offers no empty choice."""
    (target,) = (target for target in sql() if target.kind == "variable" and target.title == "key")
    assert {row[0] for row in await grafana.fetch(_filled(target))} == set(SHOWN.values())
