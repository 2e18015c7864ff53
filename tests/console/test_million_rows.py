"""The console over a month of a busy node: every view answers in time, through HTTP and the shared event loop."""

from __future__ import annotations

import importlib.util
import sqlite3
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from aiohttp import ClientSession
from console_server import console_server

from appliance.clock import ManualClock
from appliance.store.database import Database

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "store_views.py"
MOST_SECONDS = 0.3
ROUNDS = 101


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Path]]:
    """The benchmark's month of a million requests, and the module that made it."""
    spec = importlib.util.spec_from_file_location("store_views", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("million") / "appliance.db"
    module.fill(path, num_requests=1_000_000)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE samples SET period_seconds = 10")  # by it the resolution is chosen
    yield module, path
    path.unlink()


async def test_every_view_answers_within_300_ms(filled: tuple[ModuleType, Path], tmp_path: Path) -> None:
    """The second slowest of 101 answers of each view (p99), JSON included, on SQLite with a million ledger rows."""
    module, path = filled
    database = Database(f"sqlite+aiosqlite:///{path}")
    views = [f"history?seconds={seconds}" for seconds in (300, 900, 3600, 21600, 86400, 604800, 2592000)]
    views += [
        "requests?limit=50",
        "requests?limit=50&failed=1",
        "requests?limit=50&slow=1",
        "requests?limit=50&key=key-000",
        "requests?limit=50&key=key-150",
    ]
    views += ["requests?limit=50&failed=1&key=key-003", "requests/client-3000", "requests/nothing", "decisions?limit=50", "events?limit=8"]
    slowest: dict[str, float] = {}
    async with (
        console_server(tmp_path, database=database, clock=ManualClock(wall=module.NOW), instance_id="node-1") as server,
        ClientSession() as session,
    ):
        for view in views:
            cursor, spent = "", []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                async with session.get(f"{server.url}/console/api/{view}{cursor}") as response:
                    body = await response.json()
                    assert response.status == (404 if view == "requests/nothing" else 200), body
                spent.append(time.perf_counter() - began)
                if "limit=50" in view and body.get("cursor"):
                    cursor = f"&cursor={body['cursor']}"  # deeper and deeper
            slowest[view] = sorted(spent)[-2]
            print(f"{view:45} median {1000 * statistics.median(spent):7.1f} ms  slowest {1000 * max(spent):7.1f} ms")
            if view.startswith("history"):
                assert body["series"], view
                assert len(body["series"][0]["at_wall"]) <= 1501
    await database.close()
    assert {view: seconds for view, seconds in slowest.items() if seconds > MOST_SECONDS} == {}
