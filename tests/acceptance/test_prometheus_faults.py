"""The alerts, by real faults: saturation, a signal that nobody takes, a GPU in trouble, a database away, an engine that stands, a server gone.

The rules are those of dashboards/alerts.yml with `for:` shortened to a second; nothing else of them is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from appliance_server import EXACT, ApplianceServer, write_dummy_model
from board_queries import FOLDER, rules
from live_load import COMPLETIONS, KEYS, Load
from postgresql_cluster import Cluster, create_database, running_cluster
from prometheus_server import PrometheusServer, running_prometheus

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]

FAKE_NVML = Path(__file__).parents[1] / "operations" / "fake_nvml"
BURNS = {"ApplianceSloBurnFast", "ApplianceSloBurn", "ApplianceSloBurnSteady", "ApplianceSloBurnSlow"}
SATURATED = BURNS | {
    "ApplianceOldestWaiting",
    "AppliancePredictedTtft",
    "ApplianceKvNearlyFull",
    "AppliancePreemptions",
    "AppliancePinnedAtMax",
    "ApplianceWebhookDeadLetters",
}
NO_FAULT = {
    "ApplianceDiskNearlyFull": "filling the disk under a test run would harm the machine that it runs on",
    "AppliancePolicyLoopStale": "a loop whose database is away or hangs still runs every half minute: nothing outside the process stops it",
}


def shortened_rules() -> str:
    """alerts.yml with every `for:` at a second and evaluated every second."""
    text = (FOLDER / "alerts.yml").read_text().replace("interval: 30s", "interval: 1s")
    return re.sub(r"^( +for:) \w+$", r"\1 1s", text, flags=re.MULTILINE)


class Trouble:
    """One run: which alerts have fired so far."""

    def __init__(self, server: ApplianceServer, prometheus: PrometheusServer) -> None:
        self.server, self.prometheus = server, prometheus
        self.fired: set[str] = set()

    async def wait_firing(self, names: set[str], what: str, seconds: float) -> None:
        """Until all of `names` have fired (not necessarily together)."""
        missing, deadline = set(names), time.monotonic() + seconds
        while missing:
            missing -= (now := await asyncio.to_thread(self.prometheus.firing))
            self.fired |= now
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s: {sorted(missing)}; firing: {sorted(now)}\n{self.server.output[-5:]}"
            await asyncio.sleep(0.25)

    async def wait_quiet(self, names: set[str], what: str, seconds: float) -> None:
        """Until none of `names` fires any more."""
        deadline = time.monotonic() + seconds
        while still := names & await asyncio.to_thread(self.prometheus.firing):
            assert time.monotonic() < deadline, f"{what}: still after {seconds} s: {sorted(still)}"
            await asyncio.sleep(0.25)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_alerts_fire_at_real_faults(state_folder: Callable[[], Path], tmp_path: Path) -> None:
    """Quiet under light load; then each fault raises its alerts, and what heals ends them."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    keys, troubles = tmp_path / "keys", tmp_path / "gpu-faults"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    with running_cluster() as cluster:
        settings = {
            **EXACT,
            "engine.device": "cpu",
            "model.path": write_dummy_model(tmp_path / "model"),
            "model.context_length": 512,
            "engine.max_num_seqs": 4,
            "engine.num_blocks": 40,
            "engine.max_restarts": 2,
            "slo.ttft_seconds": 1.0,
            "slo.tpot_seconds": 0.5,
            "server.api_keys_file": keys,
            "metrics.fast_window_seconds": 4,
            "metrics.slow_window_seconds": 8,
            "metrics.sample_seconds": 1,
            "store.queue_rows": 100,
            "scaling.mode": "act",
            "scaling.interval_seconds": 0.5,
            "scaling.startup_seconds": 1,
            "scaling.max_replicas": 2,
            "scaling.signal_ttl_seconds": 3,
            "scaling.webhook_urls": f"http://127.0.0.1:{_closed_port()}/scale",
        }
        environment = {
            "PYTHONPATH": str(FAKE_NVML),
            "FAKE_NVML_FAULTS": str(troubles),
            "APPLIANCE_STORE__URL": await create_database(cluster),
            "APPLIANCE_SCALING__WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
        }
        server = ApplianceServer(state_folder(), settings, environment)
        try:
            server.wait_ready()
            target = server.url.removeprefix("http://")
            with running_prometheus(tmp_path / "prometheus", target, shortened_rules(), credentials=KEYS["web"]) as prometheus:
                trouble = Trouble(server, prometheus)
                await _stays_quiet(trouble)
                await _saturation(trouble)
                await _gpu(trouble, troubles)
                await _database(trouble, cluster)
                await _engine(trouble)
                await _server(trouble)
        finally:
            server.process.send_signal(signal.SIGCONT)
            server.stop()
        assert trouble.fired == {rule["alert"] for rule in rules() if "alert" in rule} - NO_FAULT.keys()


def _load(trouble: Trouble, num_clients: int, largest_output: int, pause_seconds: float) -> Load:
    url = trouble.server.url
    return Load(
        url, num_clients, largest_output=largest_output, pause_seconds=pause_seconds, paths=(COMPLETIONS,), kinds=("stream", "whole", "leave")
    )


async def _stays_quiet(trouble: Trouble) -> None:
    """Light load fires nothing."""
    async with _load(trouble, 1, 20, 0.3) as load:
        await load.for_seconds(15)
    assert load.counts["200"] >= 10
    assert await asyncio.to_thread(trouble.prometheus.firing) == set()


async def _saturation(trouble: Trouble) -> None:
    """More clients than places, with contexts that the pool cannot hold at once: latency, queue, pool, replicas, and a signal that nobody takes."""
    async with _load(trouble, 120, 400, 0.0):  # so many that the fastest machine has a queue of seconds
        await trouble.wait_firing(SATURATED, "saturation", 120)
    await trouble.wait_quiet({"ApplianceOldestWaiting", "AppliancePredictedTtft", "ApplianceKvNearlyFull"}, "the load is gone", 60)


async def _gpu(trouble: Trouble, troubles: Path) -> None:
    """The driver reports an XID error and heat."""
    await asyncio.to_thread(troubles.write_text, "xid\nthrottle\n")
    await trouble.wait_firing({"ApplianceGpuXid", "ApplianceGpuThrottled"}, "GPU trouble", 30)
    await asyncio.to_thread(troubles.write_text, "xid\n")
    await trouble.wait_quiet({"ApplianceGpuThrottled"}, "the GPU is cool again", 30)


async def _database(trouble: Trouble, cluster: Cluster) -> None:
    """PostgreSQL stops, then there is no place to spool to either; serving goes on, and all is well again when both are back."""
    server, spool = trouble.server, trouble.server.state / "spool"
    await asyncio.to_thread(cluster.stop)
    async with _load(trouble, 4, 4, 0.0) as load:
        await trouble.wait_firing({"ApplianceStoreAway"}, "the database is away", 60)
        if spool.exists():
            spool.rename(server.state / "spool.aside")
        spool.write_text("in the way")
        await trouble.wait_firing({"ApplianceRowsDropped"}, "neither database nor disk", 120)
        assert load.counts["200"] > 100
    assert set(load.counts) <= {"stream", "whole", "leave", "200"}, "a request failed for want of a database"
    spool.unlink()
    if (server.state / "spool.aside").exists():
        (server.state / "spool.aside").rename(spool)
    await asyncio.to_thread(cluster.start)
    await trouble.wait_quiet({"ApplianceStoreAway"}, "the database is back", 60)


def _stop_successor(server: ApplianceServer, pid: int) -> int:
    """Wait for the process that replaces engine `pid` and stop that too before it is ready: a fast start would be over between two scrapes."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in map(int, children.read_text().split()):
            with contextlib.suppress(OSError):  # gone meanwhile
                if child != pid and Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[1:3] == command.split(b"\0")[1:3]:
                    os.kill(child, signal.SIGSTOP)
                    return child
        time.sleep(0.01)
    raise AssertionError("no engine was started in the place of the one that stands")


async def _engine(trouble: Trouble) -> None:
    """The engine stands still with requests in it and is started again; it dies, and again, and is given up."""
    server = trouble.server
    pid = server.engine_pid()
    async with _load(trouble, 4, 60, 0.0) as load:
        await load.for_seconds(2)
        os.kill(pid, signal.SIGSTOP)
        successor = await asyncio.to_thread(_stop_successor, server, pid)
        await trouble.wait_firing({"ApplianceEngineRestarts", "ApplianceEngineNotReady", "ApplianceAdmissionStalled"}, "the engine stands", 120)
        os.kill(successor, signal.SIGCONT)
        await trouble.wait_quiet({"ApplianceEngineNotReady", "ApplianceAdmissionStalled"}, "the engine is back", 120)
        await load.for_seconds(2)
    assert set(load.counts) <= {"stream", "whole", "leave", "200"}, "a request was lost with the engine"
    assert server.engine_pid() != pid
    for _ in range(2):
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 200, 60, "ready again")
        os.kill(server.engine_pid(), signal.SIGKILL)
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 503, 30, "the death was noticed")
    await trouble.wait_firing({"ApplianceEngineFailed"}, "the engine is given up", 60)


async def _server(trouble: Trouble) -> None:
    """The server is held up again and again, stands still, and is gone."""
    process = trouble.server.process
    deadline = time.monotonic() + 60
    while "ApplianceEventLoopLag" not in trouble.fired:
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.4)
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.2)
        trouble.fired |= await asyncio.to_thread(trouble.prometheus.firing)
        assert time.monotonic() < deadline, "a server that is held up"
    process.send_signal(signal.SIGSTOP)
    await trouble.wait_firing({"ApplianceDown"}, "the server stands", 60)
    process.send_signal(signal.SIGCONT)
    await trouble.wait_quiet({"ApplianceDown"}, "the server goes on", 60)
    assert await asyncio.to_thread(trouble.server.stop) == 0
    await trouble.wait_firing({"ApplianceMissing"}, "the server is gone", 60)
