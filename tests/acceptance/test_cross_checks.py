"""5,000 mixed requests, counted four times: by their clients, by Prometheus, in SQL and in the log. All four tell the same story."""

from __future__ import annotations

import asyncio
import bisect
import collections
import inspect
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from appliance_server import EXACT, STATE_COLUMNS, ApplianceServer, Metrics, check_ledger, serving, write_dummy_model
from mixed_load import CONTEXT_LENGTH, Seen, make_asks, make_streams, run_load

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

NUM_MIXED, NUM_STREAMS = 4_000, 1_000
KEYS = {"web": "sk-web", "batch": "sk-batch"}
MEAN, SWING, PERIOD = 300.0, 100.0, 11.0  # of the power of a GPU, in watts and seconds


def joules_until(at: float) -> float:
    """The integral of that power, in closed form; `at` is CLOCK_MONOTONIC."""
    return MEAN * at - SWING / (2 * math.pi / PERIOD) * math.cos(at * 2 * math.pi / PERIOD)


# Serves as `pynvml`: that GPU, with its energy counter.
FAKE_NVML = f"""
import math, time, types
MEAN, SWING, PERIOD = {MEAN}, {SWING}, {PERIOD}
{inspect.getsource(joules_until)}"""
FAKE_NVML += """
class NVMLError(Exception): pass
NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = nvmlEventTypeXidCriticalError = 0
def _refuse(*_): raise NVMLError("not supported")
def __getattr__(name): return _refuse
def nvmlInit():
    # The server takes its engine, which computes on the CPU, for one on this GPU: energy is accounted for the engine's device only.
    import msgspec
    from appliance.engine.supervisor import SupervisedEngine
    def keep(self, ready): self.__dict__["ready"] = ready and msgspec.structs.replace(ready, device="Fake H100")
    SupervisedEngine.ready = property(lambda self: self.__dict__["ready"], keep)
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return "GPU-fake"
def nvmlDeviceGetName(handle): return "Fake H100"
def nvmlDeviceGetPowerUsage(handle): return int(1e3 * (MEAN + SWING * math.sin(time.monotonic() * 2 * math.pi / PERIOD)))
def nvmlDeviceGetTotalEnergyConsumption(handle): return int(1e3 * joules_until(time.monotonic()))
"""


@dataclass
class Watch:
    """Power as a scraper sees it: (CLOCK_MONOTONIC, watts, joules of the counter) about five times a second."""

    readings: list[tuple[float, float, float]] = field(default_factory=list)
    running: bool = True


@dataclass
class Run:
    """Everything that is known of the run."""

    server: ApplianceServer
    mixed: list[Seen]
    streams: list[Seen]
    before_streams: Metrics
    metrics: Metrics  # when all was over
    rows: dict[str, dict[str, Any]]  # by the client's id
    lines: list[dict[str, Any]]  # of the log
    power: list[tuple[float, float, float]]

    @property
    def seen(self) -> list[Seen]:
        """By whatever client."""
        return self.mixed + self.streams

    @property
    def known(self) -> list[Seen]:
        """Those that were let in. A wrong key is turned away before the request is one, and some clients left before the server saw them."""
        return [seen for seen in self.seen if seen.status != 401 and not (seen.ask.id not in self.rows and seen.left and seen.status == 0)]

    def completed(self) -> list[tuple[Seen, dict[str, Any]]]:
        """Answered with 200 to their end, as client and ledger agree."""
        return [(seen, row) for seen in self.known if (row := self.rows[seen.ask.id])["status"] == 200 and not seen.left]


class _Keyed(ApplianceServer):
    """Its /metrics wants a key."""

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        return super().get(path, {"Authorization": f"Bearer {KEYS['web']}", **(headers or {})})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """A tiny model with a chat template, two keys, a short queue, a pool that is too small for its batch, and a GPU that is none."""
    folder = tmp_path_factory.mktemp("cross-checks")
    model = write_dummy_model(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    (folder / "keys").write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    (folder / "fake").mkdir()
    (folder / "fake" / "pynvml.py").write_text(FAKE_NVML)
    settings = {
        **EXACT,
        "engine.device": "cpu",
        "model.path": model,
        "model.served_name": "tiny",
        "model.context_length": CONTEXT_LENGTH,
        "engine.max_num_seqs": 24,
        "engine.num_blocks": 120,
        "engine.max_waiting": 40,
        "metrics.sample_seconds": 1,
        "store.flush_seconds": 0.1,
        "server.api_keys_file": folder / "keys",
        "log.format": "json",
    }
    with serving(state_folder(), settings, {"PYTHONPATH": str(folder / "fake")}) as server:
        server.__class__ = _Keyed
        yield server


@pytest.fixture(scope="module")
def run(server: ApplianceServer) -> Run:
    """The whole load, once for all tests of this module."""
    return asyncio.run(_run(server))


async def _run(server: ApplianceServer) -> Run:
    watch = Watch()
    watching = asyncio.create_task(asyncio.to_thread(_watch, server, watch))
    try:
        began = time.monotonic()
        asks = make_asks(NUM_MIXED, 1, list(KEYS.values()))
        crowd, rest = asks[:200], asks[200:]
        mixed = await run_load(server.url, crowd, len(crowd))  # more than the queue holds
        mixed += await run_load(server.url, rest, 24)
        await asyncio.to_thread(_settle, server)
        before = server.metrics()
        streams = await run_load(server.url, make_streams(NUM_STREAMS, 2, list(KEYS.values()), NUM_MIXED), 2)
        await asyncio.to_thread(_settle, server)
        print(f"{NUM_MIXED + NUM_STREAMS} requests in {time.monotonic() - began:.0f} s")
    finally:
        watch.running = False
        await watching
    rows = server.sql("select * from requests")
    lines = [json.loads(line) for line in server.output if line.startswith("{")]
    by_id = {row["client_request_id"]: row for row in rows}
    assert len(by_id) == len(rows), "a request has two rows"
    return Run(server, mixed, streams, before, server.metrics(), by_id, lines, watch.readings)


def _watch(server: ApplianceServer, watch: Watch) -> None:
    """By two expressions: to parse the whole exposition would take the clients' interpreter for 20 ms a look."""
    watts, joules = (re.compile(rf'^appliance_gpu_{name}{{gpu="0"}} (\S+)$', re.MULTILINE) for name in ("power_watts", "energy_joules_total"))
    while watch.running:
        text = server.get("/metrics")[1]
        if (power := watts.search(text)) and (energy := joules.search(text)):
            watch.readings.append((time.monotonic(), float(power[1]), float(energy[1])))
        time.sleep(0.2)


def _settle(server: ApplianceServer) -> None:
    """Nothing is open, every row is written, and a sample has seen it all."""

    def quiet() -> bool:
        metrics = server.metrics()
        return metrics.value("requests_in_flight") == 0 and metrics.value("requests_total") == metrics.value("requests_received_total")

    server.wait_until(quiet, 60, "nothing is open")
    total = server.metrics().value("requests_total")
    server.wait_until(lambda: server.sql("select count(*) as n from requests")[0]["n"] == total, 60, "every row is written")
    server.wait_until(lambda: server.sql("select sum(num_requests) as n from samples")[0]["n"] == total, 30, "samples caught up")


def test_every_request_has_its_status(run: Run) -> None:
    """Each got what it was bound to get, or 503 while the queue was full; the mix held every kind."""
    statuses = collections.Counter((seen.ask.kind, seen.status) for seen in run.seen)
    print(statuses)
    for seen in run.seen:
        if seen.ask.kind in ("bad", "over_long"):
            assert seen.status == seen.ask.expected_status or (seen.status == 503 and seen.ask.expected_status == 200), seen
        elif not seen.left:
            assert seen.status in (200, 503), seen
    assert sum(seen.left for seen in run.seen) > 100  # a fast machine answers many before they leave
    assert statuses[("good", 503)] > 0, "the queue was never full"
    assert {status for _, status in statuses} >= {0, 200, 400, 401, 404, 503}


def test_clients_prometheus_sql_and_log_agree_on_requests(run: Run) -> None:
    """By status and key: as many as were sent, none twice, none forgotten."""
    assert set(run.rows) == {seen.ask.id for seen in run.known}
    unseen = [seen for seen in run.seen if seen.status != 401 and seen.ask.id not in run.rows]
    assert len(unseen) < 10
    assert all(seen.ask.leave_after_seconds is not None for seen in unseen)
    for seen in run.known:
        row = run.rows[seen.ask.id]
        if not seen.left:
            assert row["status"] == seen.status, (seen, row)
        else:
            assert row["status"] in (200, 499, 503), (seen, row)
        assert row["endpoint"] == seen.ask.path
        assert KEYS[row["key_id"]] == seen.ask.key
    metrics = run.metrics
    by_status = collections.Counter(str(row["status"]) for row in run.rows.values())
    assert {status: metrics.value("requests_total", status=status) for status in by_status} == by_status
    assert metrics.value("requests_total") == metrics.value("requests_received_total") == len(run.known) == sum(by_status.values())
    endings = collections.Counter((row["endpoint"], row["finish_reason"] or "none") for row in run.rows.values())
    assert {key: metrics.value("requests_total", endpoint=key[0], finish_reason=key[1]) for key in endings} == endings
    rejected = collections.Counter(row["error_code"] for row in run.rows.values() if row["status"] == 503)
    assert {code: metrics.value("rejections_total", code=code) for code in rejected} == rejected
    assert metrics.value("rejections_total") == sum(rejected.values())
    samples = run.server.sql("select sum(num_requests) as requests, sum(num_errors) as errors, sum(num_rejected) as rejected from samples")[0]
    num_errors = sum(row["status"] >= 500 for row in run.rows.values())
    assert samples == {"requests": len(run.known), "errors": num_errors, "rejected": sum(rejected.values())}


def test_the_log_has_one_line_a_request(run: Run) -> None:
    """Each line says what its row says; a wrong key has a line as well."""
    lines = [line for line in run.lines if line["logger"] == "appliance.requests"]
    refused = [line for line in lines if line["status"] == 401]
    assert len(refused) == sum(seen.status == 401 for seen in run.seen)
    by_id = {line["request_id"]: line for line in lines if "endpoint" in line}
    assert len(by_id) == len(lines) - len(refused) == len(run.rows)
    for row in run.rows.values():
        line = by_id[row["id"]]
        for name in ("client_request_id", "key_id", "status", "num_prompt_tokens", "num_generated_tokens", "num_written_tokens"):
            assert line[name] == row[name], (line, row)
        assert line.get("finish_reason") == row["finish_reason"]
        assert line["duration_seconds"] == pytest.approx(row["duration_seconds"], abs=1e-6)


def test_tokens_of_completed_requests_agree(run: Run) -> None:
    """Prompt and output tokens in the client's usage, in its stream, in SQL and in Prometheus."""
    completed = run.completed()
    assert len(completed) > 3_000
    for seen, row in completed:
        assert seen.usage is not None, seen
        assert row["num_prompt_tokens"] == seen.usage["prompt_tokens"], (seen, row)
        assert row["num_written_tokens"] == seen.usage["completion_tokens"], (seen, row)
        assert row["num_cached_tokens"] == seen.usage["prompt_tokens_details"]["cached_tokens"], (seen, row)
        if seen.token_times:
            assert seen.num_received == seen.usage["completion_tokens"], seen
        if "stop" not in seen.ask.body:
            assert row["num_generated_tokens"] == row["num_written_tokens"], (seen, row)
        else:
            assert row["num_generated_tokens"] >= row["num_written_tokens"], (seen, row)
    for column in ("prompt", "cached", "generated", "written"):
        total = sum(row[f"num_{column}_tokens"] for row in run.rows.values())
        assert run.metrics.value(f"{column}_tokens_total") == total, column
    assert run.metrics.value("request_generated_tokens_sum") == sum(row["num_generated_tokens"] for row in run.rows.values())


def test_aborted_requests_are_bounded(run: Run) -> None:
    """Received <= written <= generated, for each that left; and the engine made no more than it is charged for."""
    aborted = [(seen, row) for seen in run.known if (row := run.rows[seen.ask.id])["status"] == 499]
    assert len(aborted) > 200
    assert all(seen.left for seen, _ in aborted)
    for seen, row in aborted:
        assert seen.num_received <= row["num_written_tokens"] <= row["num_generated_tokens"], (seen, row)
    assert sum(seen.num_received for seen, _ in aborted) > 1_000
    for seen in run.known:
        if seen.left and run.rows[seen.ask.id]["status"] == 200:  # it left as its reply was complete
            assert seen.num_received <= run.rows[seen.ask.id]["num_written_tokens"]


def test_live_token_counts_are_those_of_the_records(run: Run) -> None:
    """What was counted token by token as it came is what the finished requests add up to, whatever their end."""
    metrics, before = run.metrics, run.before_streams
    generated, output = sum(row["num_generated_tokens"] for row in run.rows.values()), metrics.value("output_tokens_total")
    print(f"{output:.0f} tokens from the engine")
    assert output == generated
    streamed = sum(seen.num_received for seen in run.streams)
    for name in ("output_tokens_total", "generated_tokens_total", "written_tokens_total"):
        assert metrics.value(name) - before.value(name) == streamed, name
    gaps = metrics.value("inter_token_latency_seconds_count") - before.value("inter_token_latency_seconds_count")
    assert gaps == streamed - len(run.streams)
    samples = run.server.sql("select sum(num_generated_tokens) as n from samples")[0]["n"]
    assert samples == output
    assert metrics.value("kv_used_blocks") == metrics.value("requests_running") == metrics.value("requests_waiting") == 0


def test_ledger_states_sum_to_the_wall_time(run: Run) -> None:
    """In each row within 1 ms, and all rows together to the counter; the client waited no shorter than the ledger says."""
    for row in run.rows.values():
        check_ledger(row)
    for column in STATE_COLUMNS:
        state = column.removesuffix("_seconds")
        total = sum(row[column] for row in run.rows.values())
        assert run.metrics.value("request_state_seconds_total", state=state) == pytest.approx(total, rel=1e-9, abs=1e-6), state
    beyond = sorted(seen.ended_at - seen.sent_at - run.rows[seen.ask.id]["duration_seconds"] for seen in run.streams)
    print(f"client minus ledger: median {1e3 * beyond[len(beyond) // 2]:.2f} ms, p99 {1e3 * beyond[int(0.99 * len(beyond))]:.2f} ms")
    assert beyond[0] > -0.05  # the last byte may reach the client before the server has noted that it is gone
    assert 0 < beyond[len(beyond) // 2] < 0.05
    assert sum(row["queued_seconds"] for row in run.rows.values()) > 1
    assert sum(row["preempted_seconds"] for row in run.rows.values()) > 0, "the pool was large enough"


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["time_to_first_token", "time_per_output_token", "request_duration", "inter_token_latency"])
def test_histogram_quantiles_agree_with_the_clients(run: Run, name: str, quantile: float) -> None:
    """Of the streams, to which both sides can attach a clock: the bucket of Prometheus' quantile is the client's or a neighbour of it."""
    assert all(seen.status == 200 for seen in run.streams)
    of_client = {
        "time_to_first_token": lambda seen: [seen.ttft_seconds],
        "time_per_output_token": lambda seen: [seen.tpot_seconds],
        "request_duration": lambda seen: [seen.ended_at - seen.sent_at],
        "inter_token_latency": lambda seen: seen.gaps,
    }[name]
    values = sorted(value for seen in run.streams for value in of_client(seen))
    clients = values[math.ceil(quantile * len(values)) - 1]
    before, after = (_buckets(metrics, f"{name}_seconds") for metrics in (run.before_streams, run.metrics))
    counts = [now - then for now, then in zip(after.values(), before.values(), strict=True)]  # cumulative
    assert counts[-1] == len(values)
    bucket = next(index for index, count in enumerate(counts) if count >= quantile * counts[-1])
    edges = list(after)
    low, high = edges[bucket - 1] if bucket else 0.0, edges[bucket]
    print(f"{name} p{100 * quantile:g}: client {1e3 * clients:.2f} ms, Prometheus {1e3 * low:g}-{1e3 * high:g} ms")
    assert abs(bisect.bisect_left(edges, clients) - bucket) <= 1


def _buckets(metrics: Metrics, name: str) -> dict[float, float]:
    """Edge -> cumulative count, over all other labels."""
    buckets: dict[float, float] = {}
    for sample in metrics.samples:
        if sample.name == f"appliance_{name}_bucket":
            edge = float(sample.labels["le"])
            buckets[edge] = buckets.get(edge, 0.0) + sample.value
    return dict(sorted(buckets.items()))


def test_joules_integrate_power(run: Run) -> None:
    """The energy counter is the integral of the power that was scraped beside it, and the samples in SQL add up to the counter."""
    readings = [after for before, after in itertools.pairwise(run.power) if after[2] != before[2]]  # each as soon as it was there
    (first, _, start), (last, _, end) = readings[0], readings[-1]
    integral = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(readings))
    print(f"{last - first:.0f} s: counter {end - start:.0f} J, integral {integral:.0f} J")
    assert last - first > 10
    assert end - start == pytest.approx(integral, rel=0.03)
    assert 200 < (end - start) / (last - first) < 400
    samples = run.server.sql("select at_wall, period_seconds, gpu_joules from samples where gpu_joules is not null order by at_wall")
    since_boot = time.monotonic() - time.time()
    ends = samples[0]["at_wall"] - samples[0]["period_seconds"] + since_boot, samples[-1]["at_wall"] + since_boot
    expected = joules_until(ends[1]) - joules_until(ends[0])
    print(f"{len(samples)} samples in {ends[1] - ends[0]:.0f} s: {sum(sample['gpu_joules'] for sample in samples):.0f} J of {expected:.0f}")
    assert sum(sample["gpu_joules"] for sample in samples) == pytest.approx(expected, abs=1.1 * (MEAN + SWING))  # a reading is up to a second old


def test_joules_are_split_without_a_rest(run: Run) -> None:
    """Serving and idle are all that the counter rose by; what requests were charged is what serving drew."""
    energy = {use: run.metrics.value("energy_joules_total", use=use) for use in ("serving", "idle")}
    drawn = run.power[-1][2] - run.power[0][2]
    charged = sum(row["joules"] or 0.0 for row in run.rows.values())
    print(f"drawn {drawn:.0f} J since the first scrape, {energy}, charged to requests {charged:.0f} J")
    assert sum(energy.values()) == pytest.approx(drawn, abs=3 * 400)  # a reading or two of up to 400 W before the first scrape
    assert 0 < energy["serving"] < sum(energy.values())
    assert charged == pytest.approx(energy["serving"], rel=0.15)
    began = min(row["received_wall"] for row in run.rows.values())
    free = [row["received_wall"] - began for row in run.rows.values() if row["num_generated_tokens"] and not row["joules"]]
    assert max(free, default=0.0) < 3, "only before the first two readings is there no price"
    assert run.metrics.value("request_joules_sum") == pytest.approx(charged, rel=1e-6)
    by_key = {name: sum(row["joules"] or 0.0 for row in run.rows.values() if row["key_id"] == name) for name in KEYS}
    assert {name: pytest.approx(run.metrics.value("key_joules_total", key=name), rel=1e-6) for name in KEYS} == by_key


def test_accounts_by_key_agree(run: Run) -> None:
    """Requests, errors and tokens of each key, in Prometheus and in SQL."""
    for name in KEYS:
        rows = [row for row in run.rows.values() if row["key_id"] == name]
        expected = {
            "requests": len(rows),
            "errors": sum(row["status"] >= 500 for row in rows),
            "prompt_tokens": sum(row["num_prompt_tokens"] for row in rows),
            "generated_tokens": sum(row["num_generated_tokens"] for row in rows),
        }
        assert {what: run.metrics.value(f"key_{what}_total", key=name) for what in expected} == expected
