"""A real Prometheus scrapes the real server for some seconds: all queries of panels and rules have finite data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance_server import EXACT, serving, write_dummy_model
from board_queries import FOLDER
from live_load import KEYS, Load
from live_queries import check, panel_queries, rule_queries
from prometheus_server import running_prometheus

INTERVAL = 0.5
RATE_SECONDS = 6.0  # long enough for scrapes that come late on a busy machine


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Two API keys."""
    path = tmp_path / "keys"
    path.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    return path


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    """A tiny model with random weights that chats."""
    path = write_dummy_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    return path


async def test_every_query_has_finite_data(chat_model: str, state_folder: Callable[[], Path], tmp_path: Path, keys_file: Path) -> None:
    """Under mixed load, with a GPU that a fake driver reports."""
    settings = {
        **EXACT,
        "engine.device": "cpu",
        "model.path": chat_model,
        "model.context_length": 512,
        "engine.max_num_seqs": 6,
        "engine.num_blocks": 48,
        "engine.max_waiting": 8,
        "slo.ttft_seconds": 0.5,
        "slo.tpot_seconds": 0.1,
        "server.api_keys_file": keys_file,
        "scaling.interval_seconds": 0.25,
        "metrics.fast_window_seconds": 4,
        "metrics.slow_window_seconds": 8,
        "store.flush_seconds": 0.1,
        "metrics.sample_seconds": 1,
    }
    environment = {"PYTHONPATH": str(Path(__file__).parent / "fake_nvml")}
    rules = (FOLDER / "alerts.yml").read_text().replace("interval: 30s", "interval: 500ms")
    with serving(state_folder(), settings, environment) as server:
        target = server.url.removeprefix("http://")
        with running_prometheus(tmp_path / "prometheus", target, rules, interval_seconds=INTERVAL, credentials=KEYS["web"]) as prometheus:
            async with Load(server.url, 8) as load:
                await asyncio.to_thread(prometheus.wait, lambda: prometheus.value("sum_over_time(up[1m])") >= 4, "four scrapes", 60)
                start, end = await load.for_seconds(4)
            check(prometheus, [*panel_queries(end - start, RATE_SECONDS, "panel"), *rule_queries()], start, end, 0.5, least_share=0.5)
            assert load.counts["200"] > 0
            for query in panel_queries(end - start, RATE_SECONDS, "annotation"):
                prometheus.query_range(query.expr, start, end, 1.0)
