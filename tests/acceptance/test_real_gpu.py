"""The machine's own GPU, seen through its driver: every query has data, and the joules are those of the card. Skipped where there is none."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from appliance_server import ApplianceServer, Metrics, serving
from board_queries import FOLDER
from live_load import KEYS, Load
from live_queries import check, panel_queries, rule_queries
from prometheus_server import running_prometheus

from appliance.metrics.nvml import GpuReading, Nvml

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

SECONDS = float(os.environ.get("APPLIANCE_TEST_SCRAPE_SECONDS", "60"))
INTERVAL = 1.0
# What a data-centre card of the last generations reports; all but the first follow `gpu` alone.
GAUGES = (
    *("gpu_info", "gpu_utilisation_ratio", "gpu_memory_utilisation_ratio", "gpu_memory_used_bytes", "gpu_memory_bytes", "gpu_power_watts"),
    *("gpu_energy_joules_total", "gpu_temperature_celsius", "gpu_sm_clock_hertz", "gpu_memory_clock_hertz", "gpu_throttled", "gpu_xid_errors_total"),
)


@pytest.fixture
def nvml() -> Nvml:
    """The driver, asked beside the server."""
    found = Nvml.open()
    if found is None:
        pytest.skip("no NVIDIA GPU")
    return found


def _driver_joules() -> float:
    """The driver's own counter: what opens NVML anew reads that, not the power since."""
    nvml = Nvml.open()
    assert nvml is not None
    try:
        joules = nvml.read(time.monotonic())[0].energy_joules
    finally:
        nvml.close()
    assert joules is not None
    return joules


def _keyed(server: ApplianceServer) -> Metrics:
    status, text = server.get("/metrics", {"Authorization": f"Bearer {KEYS['web']}"})
    assert status == 200, text
    return Metrics(text)


def _check_gauges(metrics: Metrics, now: GpuReading) -> None:
    """Each family of the card is there and says what the driver says beside it."""
    missing = [name for name in GAUGES if not any(sample.name == f"appliance_{name}" for sample in metrics.samples)]
    assert not missing, missing
    assert metrics.value("gpu_info", gpu=str(now.index), name=now.name, uuid=now.uuid) == 1
    assert metrics.value("gpu_memory_bytes") == now.memory_bytes
    assert now.memory_used_bytes is not None
    assert now.memory_bytes is not None
    assert metrics.value("gpu_memory_used_bytes") == pytest.approx(now.memory_used_bytes, abs=0.05 * now.memory_bytes)
    assert 0 < metrics.value("gpu_utilisation_ratio") <= 1
    assert 0 <= metrics.value("gpu_memory_utilisation_ratio") <= 1
    assert 30 < metrics.value("gpu_power_watts") < 1500
    assert 10 < metrics.value("gpu_temperature_celsius") < 110
    assert 1e8 < metrics.value("gpu_sm_clock_hertz") < 5e9
    assert 1e8 < metrics.value("gpu_memory_clock_hertz") < 2e10
    for name in ("flops", "bandwidth"):
        assert 0 < metrics.value(f"engine_{name}_utilisation_ratio") < 1, name


async def test_queries_and_joules_of_a_real_gpu(nvml: Nvml, embedded_model: Path, state_folder: Callable[[], Path], tmp_path: Path) -> None:
    """Mixed load on the embedded model under a Prometheus, then silence: panels, rules, gauges, joules serving and idle."""
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    settings = {
        "engine.device": "cuda",
        "model.path": embedded_model,
        "model.context_length": 1024,
        "engine.max_num_seqs": 6,
        "engine.num_blocks": 60,
        "engine.max_waiting": 8,
        "slo.ttft_seconds": 0.5,
        "slo.tpot_seconds": 0.1,
        "server.api_keys_file": keys,
        "scaling.interval_seconds": 0.5,
        "metrics.fast_window_seconds": 5,
        "metrics.slow_window_seconds": 10,
        "metrics.sample_seconds": 1,
        "store.flush_seconds": 0.1,
    }
    rules = (FOLDER / "alerts.yml").read_text().replace("interval: 30s", "interval: 1s")
    with ExitStack() as stack:
        server = stack.enter_context(serving(state_folder(), settings))
        target = server.url.removeprefix("http://")
        prometheus = stack.enter_context(
            running_prometheus(tmp_path / "prometheus", target, rules, interval_seconds=INTERVAL, credentials=KEYS["web"])
        )
        await asyncio.sleep(10)  # idle: what the card draws without work is known
        before, drawn_before = _keyed(server), _driver_joules()
        async with Load(server.url, 10, largest_output=120, pause_seconds=0.005) as load:
            await load.for_seconds(15)
            start, end = await load.for_seconds(SECONDS)
            during = _keyed(server)
            now = nvml.read(time.monotonic())[0]
        await asyncio.sleep(10)
        after, drawn = _keyed(server), _driver_joules() - drawn_before
        print(load.counts)
        _check_gauges(during, now)
        check(prometheus, [*panel_queries(SECONDS, 4 * INTERVAL, "panel"), *rule_queries()], start, end, INTERVAL)
        _check_joules(before, after, drawn, server)


def _check_joules(before: Metrics, after: Metrics, drawn: float, server: ApplianceServer) -> None:
    """Serving and idle are all that the card drew by its driver's counter; requests were charged with what serving drew."""

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    shown = grown("gpu_energy_joules_total")
    serving_joules, idle_joules = (grown("energy_joules_total", use=use) for use in ("serving", "idle"))
    time.sleep(1)  # the writer's next batch
    charged = server.sql("select sum(joules) as joules from requests")[0]["joules"]
    peaks = {name: after.value(f"engine_peak_{name}_per_second") for name in ("flops", "bytes")}
    watts = {use: after.value(f"energy_{use}_watts") for use in ("idle", "serving")}
    print(f"drawn {drawn:.0f} J, shown {shown:.0f} J, serving {serving_joules:.0f} J, idle {idle_joules:.0f} J, charged {charged:.0f} J")
    print(f"watts {watts}, peaks {peaks}")
    assert shown == pytest.approx(drawn, rel=0.02)
    assert serving_joules + idle_joules == pytest.approx(drawn, rel=0.02)
    assert min(serving_joules, idle_joules) > 0
    assert charged == pytest.approx(serving_joules, rel=0.15)
