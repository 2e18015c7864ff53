"""Three minutes of mixed load on the embedded model under the eyes of a real Prometheus, with SQL in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest
from appliance_server import ApplianceServer, serving
from board_queries import FOLDER, fill_sql, sql, targets
from live_load import KEYS, Load
from live_queries import check, panel_queries, rule_queries
from postgresql_cluster import Cluster, create_database, running_cluster
from prometheus_server import PrometheusServer, running_prometheus
from sqlalchemy import make_url

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("APPLIANCE_TEST_SCRAPE_SECONDS", "180"))
INTERVAL = 2.0
FAKE_NVML = Path(__file__).parents[1] / "operations" / "fake_nvml"


async def _dead_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An autoscaler's endpoint that takes every signal."""
    await reader.read(1 << 16)
    writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


async def test_every_query_has_finite_data_for_three_minutes(embedded_model: Path, state_folder: Callable[[], Path], tmp_path: Path) -> None:
    """Panels, annotations, variables and rules in Prometheus, SQL panels in PostgreSQL, and exemplars that lead to ledger rows."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    receiver = await asyncio.start_server(_dead_end, "127.0.0.1", 0)
    with running_cluster() as cluster:
        url = await create_database(cluster)
        settings = {
            "engine.device": "cpu",
            "model.path": embedded_model,
            "model.context_length": 1024,
            "engine.max_num_seqs": 6,
            "engine.num_blocks": 60,
            "engine.max_waiting": 8,
            "slo.ttft_seconds": 2.0,
            "slo.tpot_seconds": 0.3,
            "server.api_keys_file": keys,
            "scaling.mode": "act",
            "scaling.interval_seconds": 1,
            "scaling.startup_seconds": 10,
            "scaling.webhook_urls": f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}/scale",
            "metrics.fast_window_seconds": 10,
            "metrics.slow_window_seconds": 20,
            "metrics.sample_seconds": 2,
        }
        environment = {
            "PYTHONPATH": str(FAKE_NVML),
            "APPLIANCE_STORE__URL": url,
            "APPLIANCE_SCALING__WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
        }
        rules = (FOLDER / "alerts.yml").read_text().replace("interval: 30s", "interval: 2s")
        with serving(state_folder(), settings, environment) as server:
            target = server.url.removeprefix("http://")
            with running_prometheus(tmp_path / "prometheus", target, rules, interval_seconds=INTERVAL, credentials=KEYS["web"]) as prometheus:
                await _run(server, prometheus, cluster, str(make_url(url).database))
    receiver.close()


async def _run(server: ApplianceServer, prometheus: PrometheusServer, cluster: Cluster, database: str) -> None:
    began = time.time()
    async with Load(server.url, 10, largest_output=40) as load:
        await load.for_seconds(20)
        os.kill(server.engine_pid(), signal.SIGKILL)  # for the annotations: one restart
        await load.for_seconds(5)
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 200, 120, "ready again")
        await load.for_seconds(25)
        start, end = await load.for_seconds(SECONDS)
    print(load.counts)
    assert min(load.counts[kind] for kind in ("stream", "whole", "leave", "bad", "long", "burst", "200", "400", "503")) > 0
    check(prometheus, [*panel_queries(SECONDS, 4 * INTERVAL, "panel"), *rule_queries()], start, end, INTERVAL)
    check(prometheus, panel_queries(SECONDS, 4 * INTERVAL, "annotation"), began, end, INTERVAL, least_share=0)
    for target in targets():
        if target.text.startswith("label_values("):
            label = target.text.rstrip(")").split(", ")[-1]
            assert prometheus.get(f"label/{label}/values", **{"match[]": "appliance_build_info"}), target
    exemplars = prometheus.get("query_exemplars", query="appliance_time_to_first_token_seconds_bucket", start=start, end=end)
    ids = {exemplar["labels"]["request_id"] for series in exemplars for exemplar in series["exemplars"]}
    connection = await asyncpg.connect(host=str(cluster.sockets), database=database, user="appliance")
    try:
        assert ids
        await asyncio.sleep(5)  # those that the end of the load cut off are written a moment later
        assert await connection.fetchval("SELECT count(*) FROM requests WHERE id = ANY($1::text[])", list(ids)) == len(ids), (
            "an exemplar leads nowhere"
        )
        await _ask_sql(connection, began, end)
    finally:
        await connection.close()


async def _ask_sql(connection: asyncpg.Connection, began: float, end: float) -> None:
    """Every SQL query of the boards on what the server itself has written."""
    (model,) = {row[0] for row in await connection.fetch("SELECT DISTINCT model FROM requests WHERE status = 200")}
    for target in sql():
        filled = fill_sql(
            target.text,
            since=began,
            until=end,
            interval_seconds=10,
            choices={"fleet": ["default"], "served": [model], "key": list(KEYS)},
            texts={"prompt_price": "0.1", "cached_price": "0.05", "output_price": "0.4"},
        )
        assert await connection.fetch(filled), target
