"""The recorder: what is reported to it is what a scrape, a snapshot and a sample show."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from appliance.clock import ManualClock
from appliance.events import EngineEvent, LedgerState, RequestRecord, StepStats
from appliance.metrics.goodput import Slo
from appliance.metrics.hardware import HardwareReading, ProcessReading
from appliance.metrics.nvml import GpuReading
from appliance.metrics.recorder import Recorder
from appliance.metrics.sampler import Sampler
from appliance.metrics.silent import SilentRecorder

MakeRecord = Callable[..., RequestRecord]
MakeStats = Callable[..., StepStats]


def _scrape(recorder: Recorder) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(recorder.exposition()[0].decode())
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def _value(recorder: Recorder, name: str, **labels: str) -> float | None:
    return _scrape(recorder).get((f"appliance_{name}", frozenset(labels.items())))


def test_a_step_moves_counters_and_gauges(recorder: Recorder, engine: Any, make_stats: MakeStats) -> None:
    """Counters add up over steps; gauges are those of the newest one; waste is slots without a token over slots of used blocks."""
    recorder.on_step(make_stats())
    recorder.on_step(make_stats(step=2, num_running=5, graph_hit=False, num_used_blocks=50, num_used_tokens=600))
    expected = {
        "engine_steps_total": 2,
        "engine_graph_hits_total": 1,
        "preemptions_total": 2,
        "aborts_total": 4,
        "surplus_tokens_total": 6,
        "prefix_query_tokens_total": 200,
        "prefix_hit_tokens_total": 32,
        "requests_running": 5,
        "requests_waiting": 3,
        "kv_utilisation_ratio": 0.5,
        "kv_cached_ratio": 0.1,
        "engine_free_bytes": 5,
        "engine_step_seconds_count": 2,
    }
    assert {name: _value(recorder, name) for name in expected} == expected
    assert _value(recorder, "kv_waste_ratio") == pytest.approx(1 - 600 / (50 * 16))
    assert _value(recorder, "engine_step_seconds_sum") == pytest.approx(0.013)
    assert _value(recorder, "engine_phase_seconds_total", phase="wait") == pytest.approx(0.006)
    assert _value(recorder, "engine_batch_sequences_bucket", le="8.0") == 0
    assert _value(recorder, "engine_batch_sequences_bucket", le="16.0") == 2


def test_grouped_gaps_are_observed_each(recorder: Recorder, make_stats: MakeStats) -> None:
    """A group of n equal gaps is n observations, and as many output tokens; a value on an edge belongs below it."""
    recorder.on_step(make_stats(), [(0.002, 60), (0.0021, 4)])
    assert _value(recorder, "inter_token_latency_seconds_bucket", le="0.0015") == 0
    assert _value(recorder, "inter_token_latency_seconds_bucket", le="0.002") == 60
    assert _value(recorder, "inter_token_latency_seconds_count") == 64
    assert _value(recorder, "inter_token_latency_seconds_sum") == pytest.approx(0.1284)
    assert _value(recorder, "output_tokens_total") == 64


def test_a_request_is_counted_once_everywhere(recorder: Recorder, make_record: MakeRecord) -> None:
    """A finished request shows in its series, the token counters, the phase histograms and the ledger's counter."""
    recorder.on_received("/v1/chat/completions")
    recorder.on_first_token(0.2)
    recorder.on_request(make_record())
    labels = {"endpoint": "/v1/chat/completions", "status": "200", "finish_reason": "stop"}
    assert _value(recorder, "requests_total", **labels) == 1
    counters = ("prompt_tokens_total", "cached_tokens_total", "generated_tokens_total", "written_tokens_total")
    assert [_value(recorder, name) for name in counters] == [100, 16, 50, 49]
    histograms = ("time_to_first_token", "time_per_output_token", "request_duration", "request_queue", "request_prefill", "request_decode")
    by_endpoint = histograms[:3]
    sums = [_value(recorder, f"{n}_seconds_sum", **({"endpoint": "/v1/chat/completions"} if n in by_endpoint else {})) for n in histograms]
    assert sums == pytest.approx([0.2, 0.02, 2.0, 0.1, 0.1, 1.8])
    assert _value(recorder, "request_state_seconds_total", state="prefill_wait") == pytest.approx(0.04)


def test_output_tokens_are_those_that_were_delivered(recorder: Recorder, make_record: MakeRecord, make_stats: MakeStats) -> None:
    """Each choice has a first token, which no gap precedes: of 5, 5 and 1 tokens of three choices none is forgotten, and to 4 of one none added."""
    recorder.on_first_token(0.2)
    recorder.on_other_first_token()
    recorder.on_step(make_stats(), [(0.01, 2)] * 4)
    recorder.on_other_first_token()
    assert _value(recorder, "output_tokens_total") == 11, "counted as they come, not when the request ends"
    recorder.on_request(make_record(num_choices=3, num_generated_tokens=11))
    assert _value(recorder, "output_tokens_total") == 11
    recorder.on_first_token(0.2)
    recorder.on_step(make_stats(), [(0.01, 1)] * 3)
    recorder.on_request(make_record(num_choices=1, num_generated_tokens=4))
    recorder.on_request(make_record(status=503, num_choices=4, num_generated_tokens=0, ttft_seconds=None))
    recorder.on_first_token(0.2)  # the client left after the first token of the first of its two choices
    recorder.on_request(make_record(status=499, num_choices=2, num_generated_tokens=1))
    assert _value(recorder, "output_tokens_total") == _value(recorder, "generated_tokens_total") == 16
    assert recorder.snapshot().fast.output_tokens_per_second == pytest.approx(16 / recorder.snapshot().fast.seconds)


def test_attainment_counts_each_objective(recorder: Recorder, make_record: MakeRecord) -> None:
    """A request that is good on one objective and bad on the other is bad on both together."""
    recorder.on_request(make_record())
    recorder.on_request(make_record(ttft_seconds=9.0))
    recorder.on_request(make_record(tpot_seconds=9.0))
    recorder.on_request(make_record(status=400))
    judged = [_value(recorder, "slo_requests_total", objective=objective) for objective in ("ttft", "tpot", "both")]
    good = [_value(recorder, "slo_good_requests_total", objective=objective) for objective in ("ttft", "tpot", "both")]
    assert (judged, good) == ([3, 3, 3], [2, 2, 1])


def test_users_cannot_make_series(recorder: Recorder, make_record: MakeRecord) -> None:
    """Unknown endpoints, statuses, reasons and codes fall together: a thousand of them add a handful of series."""
    before = len(_scrape(recorder))
    for index in range(1000):
        recorder.on_received(f"/{index}")
        recorder.on_rejected(f"code {index}")
        recorder.on_engine_event(EngineEvent(f"kind {index}", 0.0, ""))
        recorder.on_request(make_record(endpoint=f"/{index}", status=200 + index % 400, finish_reason=f"reason {index}"))
    assert len(_scrape(recorder)) - before < 40


def test_the_oldest_waiting_age_grows_between_steps(recorder: Recorder, clock: ManualClock, engine: Any, make_stats: MakeStats) -> None:
    """A step that hangs hides no queue: the age goes on growing while nothing is reported."""
    recorder.on_step(make_stats(num_waiting=3, oldest_waiting_age_seconds=0.5))
    clock.advance(7)
    assert _value(recorder, "oldest_waiting_age_seconds") == pytest.approx(7.5)
    recorder.on_step(make_stats(num_waiting=0, oldest_waiting_age_seconds=0.0))
    clock.advance(7)
    assert _value(recorder, "oldest_waiting_age_seconds") == 0


def test_while_the_engine_is_down_everything_in_flight_waits(recorder: Recorder, clock: ManualClock, engine: Any, make_stats: MakeStats) -> None:
    """A crash turns running sequences into waiting ones whose age grows, and the old step's gauges are gone."""
    recorder.on_engine_event(EngineEvent("started", 0.0, ""))
    recorder.on_step(make_stats(num_running=4, num_waiting=0, oldest_waiting_age_seconds=0.0))
    engine.state, engine.num_in_flight = "restarting", 4
    recorder.on_engine_event(EngineEvent("crashed", 0.0, "SIGKILL", 1, 4))
    clock.advance(3)
    snapshot = recorder.snapshot()
    assert (snapshot.engine_ready, snapshot.num_running, snapshot.num_waiting) == (False, 0, 4)
    assert snapshot.oldest_waiting_age_seconds == pytest.approx(3)
    assert snapshot.kv_utilisation is None
    assert _value(recorder, "engine_state", state="restarting") == 1
    assert _value(recorder, "engine_restarts_total") == 0
    recorder.on_engine_event(EngineEvent("started", 0.0, ""))
    assert _value(recorder, "engine_restarts_total") == 1
    engine.num_in_flight = 0
    assert recorder.snapshot().oldest_waiting_age_seconds == 0
    engine.num_in_flight = 1
    clock.advance(2)
    assert recorder.snapshot().oldest_waiting_age_seconds == 0  # it waits since it was first seen, not since the crash


def test_report_age_follows_heartbeats_and_steps(recorder: Recorder, clock: ManualClock, engine: Any, make_stats: MakeStats) -> None:
    """None before the first report; a new heartbeat or a step makes it young again; the same heartbeat does not."""
    assert recorder.snapshot().data_age_seconds is None
    engine.heartbeat = object()
    recorder.on_loop_lag(0.0)
    clock.advance(2)
    recorder.on_loop_lag(0.0)
    assert recorder.snapshot().data_age_seconds == pytest.approx(2)
    recorder.on_step(make_stats())
    assert recorder.snapshot().data_age_seconds == 0
    clock.advance(1)
    engine.heartbeat = object()
    assert recorder.snapshot().data_age_seconds == 0


def test_an_engine_that_is_ready_and_never_served_is_idle(recorder: Recorder, clock: ManualClock, engine: Any) -> None:
    """From `ready` on an engine without steps counts as measured zeros, however long; a crash ends that, and the next engine begins anew."""
    recorder.on_engine_event(EngineEvent("started", 0.0, ""))
    clock.advance(20)
    assert recorder.snapshot().fast.mean_running is None
    recorder.on_engine_event(EngineEvent("ready", 0.0, ""))
    for _ in range(400):
        clock.advance(1)
        engine.heartbeat = object()
        recorder.on_loop_lag(0.0)
    snapshot = recorder.snapshot()
    for window in (snapshot.fast, snapshot.slow):
        assert (window.mean_running, window.mean_waiting, window.mean_kv_utilisation) == (0, 0, 0)
        assert (window.max_kv_utilisation, window.max_waiting_age_seconds) == (0, 0)
    assert snapshot.data_age_seconds == 0
    recorder.on_engine_event(EngineEvent("crashed", 0.0, ""))
    clock.advance(40)
    assert recorder.snapshot().fast.mean_running is None
    recorder.on_engine_event(EngineEvent("ready", 0.0, ""))
    clock.advance(5)
    assert recorder.snapshot().fast.mean_running == 0


def test_snapshot_shows_both_windows(recorder: Recorder, clock: ManualClock, engine: Any, make_record: MakeRecord) -> None:
    """What is past the fast window is still in the slow one."""
    recorder.on_admitted(500, 100)
    recorder.on_request(make_record(status=500))
    recorder.on_rejected("queue_full")
    clock.advance(60)
    recorder.on_admitted(30, 10)
    snapshot = recorder.snapshot()
    assert (snapshot.ttft_slo_seconds, snapshot.tpot_slo_seconds) == (0.444, 0.0333)
    assert (snapshot.fast.num_requests, snapshot.slow.num_requests, snapshot.slow.num_errors, snapshot.slow.num_rejected) == (0, 1, 1, 1)
    assert snapshot.slow.prompt_tokens_per_second == pytest.approx(530 / 60)
    assert snapshot.fast.prompt_tokens_per_second == pytest.approx(30 / snapshot.fast.seconds)
    assert snapshot.fast.goodput is None
    assert snapshot.slow.goodput == 0


def test_only_what_capacity_turned_away_is_shed(recorder: Recorder, engine: Any, make_record: MakeRecord) -> None:
    """A full queue and a deadline that passes in it are want of capacity; a quota, a restart and a deadline of a running request are not."""
    late: dict[str, Any] = {"status": 504, "error_code": "deadline_exceeded", "ttft_seconds": None, "tpot_seconds": None}
    queued = {state.value: 0.0 for state in LedgerState} | {"queued": 600.0}
    for code in ("queue_full", "unavailable", "rate_limit_exceeded", "loading", "draining", "engine_restarting"):
        recorder.on_rejected(code)
    recorder.on_request(make_record(**late, states=queued))
    recorder.on_request(make_record(**late, states=queued | {"prefill": 0.1}))
    recorder.on_request(make_record(**late, states=queued, num_engine_restarts=1))
    recorder.on_request(make_record(status=504, error_code="deadline_exceeded", states=queued))
    fast = recorder.snapshot().fast
    assert (fast.num_rejected, fast.num_shed, fast.num_requests) == (6, 3, 4)
    engine.state = "restarting"
    recorder.on_rejected("queue_full")  # what an engine that is down cannot take says nothing about replicas
    fast = recorder.snapshot().fast
    assert (fast.num_rejected, fast.num_shed) == (7, 3)


def test_exemplars_name_the_request(recorder: Recorder, make_record: MakeRecord) -> None:
    """OpenMetrics buckets carry the id of a request that fell into them; the text format carries none."""
    recorder.on_request(make_record())
    exposition, content_type = recorder.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert b'# {request_id="01900000-0000-7000-8000-000000000001"} 2.0' in exposition
    assert b"request_id" not in recorder.exposition()[0]


def test_policy_and_webhooks(recorder: Recorder, clock: ManualClock) -> None:
    """The loop's runs, its wish, and the fate of signals are exported; the age of the last run grows."""
    recorder.on_policy(3, "pinned", pinned=True)
    recorder.on_delivery("dead", 2)
    clock.advance(9)
    assert _value(recorder, "scaling_desired_replicas") == 3
    assert _value(recorder, "scaling_pinned") == 1
    assert _value(recorder, "scaling_decisions_total", direction="pinned") == 1
    assert _value(recorder, "scaling_run_age_seconds") == 9
    assert _value(recorder, "webhook_deliveries_total", outcome="dead") == 1
    assert _value(recorder, "webhook_pending") == 2
    recorder.on_policy(3, pinned=False)  # it wants no more than it may, which is no decision
    assert _value(recorder, "scaling_pinned") == 0
    recorder.on_policy(3, pinned=True)
    assert _value(recorder, "scaling_pinned") == 1
    assert _value(recorder, "scaling_decisions_total", direction="pinned") == 1


def test_registries_are_apart(recorder: Recorder, clock: ManualClock) -> None:
    """Two recorders share nothing, and neither touches the process-wide registry."""
    other = Recorder(clock=clock, slo=recorder.slo)
    recorder.on_admitted(5, 5)
    assert _value(other, "admitted_prompt_tokens_total") == 0
    assert not any(name.startswith("appliance_") for name in REGISTRY._names_to_collectors)


def test_a_sample_holds_what_happened_since(
    recorder: Recorder, clock: ManualClock, engine: Any, make_record: MakeRecord, make_stats: MakeStats
) -> None:
    """Counts are since the sample before, gauges are now, machine counters need two readings and survive a new engine process."""
    recorder.on_admitted(999, 9)  # before the sampler was made: in no sample
    sampler = Sampler(recorder)

    def reading(server: float, engine_cpu: float, joules: float) -> HardwareReading:
        gpu = GpuReading(0, "H100", "GPU-0", utilisation=0.5, memory_used_bytes=7, power_watts=300.0, energy_joules=joules, temperature_celsius=55)
        return HardwareReading(0.0, 4, 0.25, 100, 200, 300, ProcessReading(server, 11, 1, 1), ProcessReading(engine_cpu, 22, 1, 1), (gpu,))

    recorder.on_admitted(100, 50)
    recorder.on_first_token(0.2)
    recorder.on_step(make_stats(), [(0.01, 4)])
    recorder.on_request(make_record())
    recorder.on_request(make_record(status=503, ttft_seconds=None, tpot_seconds=None))
    recorder.on_rejected("queue_full")
    clock.advance(10)
    first = sampler.take(reading(1.0, 2.0, 1000.0))
    assert (first.period_seconds, first.engine_state, first.num_requests, first.num_errors, first.num_rejected) == (10, "ready", 2, 1, 1)
    assert (first.num_good_requests, first.num_prompt_tokens, first.num_cached_tokens, first.num_generated_tokens) == (1, 100, 16, 5)
    assert (first.num_steps, first.num_preemptions, first.num_aborted, first.num_surplus_tokens) == (1, 1, 2, 3)
    assert first.step_seconds == pytest.approx(0.0065)
    assert (first.num_running, first.num_waiting, first.kv_utilisation, first.kv_cached_share) == (9, 3, 0.4, 0.1)
    assert first.ttft_p95_seconds == pytest.approx(0.2, rel=0.03)
    assert (first.server_cpu_seconds, first.engine_cpu_seconds, first.gpu_joules) == (None, None, None)
    assert (first.cpu_utilisation, first.memory_used_bytes, first.server_resident_bytes, first.engine_resident_bytes) == (0.25, 100, 11, 22)
    assert (first.gpu_utilisation, first.gpu_memory_used_bytes, first.gpu_power_watts, first.gpu_temperature_celsius) == (0.5, 7, 300.0, 55)
    clock.advance(10)
    second = sampler.take(reading(1.5, 0.3, 4000.0))  # another engine process, whose CPU time began anew
    assert (second.server_cpu_seconds, second.engine_cpu_seconds, second.gpu_joules) == (0.5, 0.3, 3000.0)
    assert (second.num_requests, second.num_steps, second.goodput) == (0, 0, 0.5)
    third = sampler.take(None)
    assert (third.gpu_power_watts, third.cpu_utilisation) == (None, None)


def test_a_step_is_cheap_to_observe(recorder: Recorder, make_stats: MakeStats) -> None:
    """A step, counted with others, costs under 30 us of the event loop (7 us on an idle core): the best of many runs, since the machine is shared."""
    stats, gaps = make_stats(), [(0.004, 60), (0.005, 4)]

    def batch() -> float:
        started = time.process_time()
        for _ in range(200):
            recorder.on_step(stats, gaps)
        recorder.settle()
        return (time.process_time() - started) / 200

    assert min(batch() for _ in range(25)) < 30e-6


def test_reports_wait_in_order_and_in_bounds(recorder: Recorder, make_stats: MakeStats, clock: ManualClock) -> None:
    """Reports that nobody has read yet are few, count with the time at which they came, and one that cannot be counted costs no other."""
    for _ in range(5000):
        recorder.on_step(make_stats())
        recorder.on_other_first_token()
        assert max(len(recorder._new_steps), len(recorder._pending)) < 1024
    recorder.on_first_token(0.1)
    clock.advance(3600)  # beyond the windows
    recorder.on_first_token(0.2)
    recorder.on_first_token("not a number")  # type: ignore[arg-type]
    recorder.on_step(make_stats(), [(0.01, 4)])
    assert _value(recorder, "engine_steps_total") == 5001
    assert _value(recorder, "output_tokens_total") == 5006
    assert recorder.snapshot().fast.ttft_p50_seconds == pytest.approx(0.2, rel=0.03)


def test_a_step_that_cannot_be_counted_costs_no_other(recorder: Recorder, make_stats: MakeStats, clock: ManualClock) -> None:
    """Steps are counted in rows; one of them that is nonsense leaves the rest of its row, of every second, exactly counted."""
    for second in range(3):
        recorder.on_step(make_stats(), [(0.01, 4)])
        recorder.on_step(make_stats(num_preemptions="many" if second == 1 else 1))
        recorder.on_step(make_stats(num_decode_tokens=None if second else 8))
        clock.advance(1)
    assert _value(recorder, "preemptions_total") == _value(recorder, "engine_steps_total") == 6
    assert _value(recorder, "engine_decode_tokens_total") == 6 * 8
    assert _value(recorder, "output_tokens_total") == 12


def test_a_step_shows_its_work(recorder: Recorder, engine: Any, make_stats: MakeStats) -> None:
    """Tokens, chunks, model FLOPs and bytes, busy time and blocks of a step; utilisation is over the window's wall time."""
    engine_seconds = 0.006
    recorder.on_engine_event(EngineEvent("ready", 0.0, ""))
    recorder.on_step(make_stats())
    costs = engine.ready.costs
    stats = make_stats()
    expected = {
        "engine_prefill_tokens_total": 100,
        "engine_decode_tokens_total": 8,
        "engine_step_tokens_sum": 108,
        "engine_chunk_tokens_sum": 100,
        "engine_chunk_tokens_count": 2,
        "engine_busy_seconds_total": engine_seconds,
        "engine_model_flops_total": costs.flops(stats),
        "engine_model_bytes_total": costs.moved_bytes(stats),
        "engine_peak_flops_per_second": 1e15,
        "kv_allocated_blocks_total": 7,
        "kv_reused_blocks_total": 1,
        "kv_evicted_blocks_total": 2,
        "kv_cached_blocks": 30,
        "kv_evictable_blocks": 10,
        "kv_used_tokens": 608,
        "kv_used_bytes": 40 * 16 * 10_000,
        "kv_bytes": 100 * 16 * 10_000,
        "backlog_tokens": 700,
    }
    assert {name: _value(recorder, name) for name in expected} == pytest.approx(expected)
    seconds = recorder.snapshot().fast.seconds
    assert _value(recorder, "engine_flops_utilisation_ratio") == pytest.approx(costs.flops(stats) / seconds / 1e15)
    assert _value(recorder, "engine_bandwidth_utilisation_ratio") == pytest.approx(costs.moved_bytes(stats) / seconds / 1e12)
    assert _value(recorder, "engine_busy_ratio") == pytest.approx(engine_seconds / seconds)


def test_lives_of_blocks_fall_into_their_buckets(recorder: Recorder, make_stats: MakeStats) -> None:
    """Eleven bits are 1,024 to 2,047 ms; the edges are powers of two, so no block falls into a neighbour's bucket."""
    recorder.on_step(make_stats())
    assert _value(recorder, "kv_block_lifetime_seconds_bucket", le="1.024") == 0
    assert _value(recorder, "kv_block_lifetime_seconds_bucket", le="2.048") == 3
    assert (_value(recorder, "kv_block_lifetime_seconds_sum"), _value(recorder, "kv_block_lifetime_seconds_count")) == (4.5, 3)
    assert (_value(recorder, "kv_block_idle_seconds_bucket", le="0.256"), _value(recorder, "kv_block_idle_seconds_bucket", le="0.512")) == (0, 2)
    assert [_value(recorder, "kv_block_reuses_bucket", le=le) for le in ("0.0", "1.0", "3.0")] == [1, 1, 3]
    assert _value(recorder, "kv_block_reuses_sum") == 5


def test_a_first_token_has_an_exemplar_and_an_endpoint(recorder: Recorder) -> None:
    """The request that was slow to start can be found from the bucket it fell into."""
    recorder.on_first_token(0.2, "/v1/completions", "01900000-0000-7000-8000-00000000000a")
    exposition, _ = recorder.exposition("application/openmetrics-text; version=1.0.0")
    line = next(line for line in exposition.decode().splitlines() if "00000000000a" in line)
    assert line.startswith('appliance_time_to_first_token_seconds_bucket{endpoint="/v1/completions",le="0.2"} 1.0 # ')


def test_a_silent_recorder_keeps_nothing(clock: ManualClock, make_record: MakeRecord, make_stats: MakeStats) -> None:
    """With metrics off every report is taken and none is kept; what reads it sees no data rather than zeros."""
    silent = SilentRecorder(clock=clock, slo=Slo(0.5, 0.05))
    before = silent.exposition()[0]
    silent.on_received("/v1/completions")
    silent.on_admitted(5, 5)
    silent.on_rejected("queue_full")
    silent.on_first_token(0.1, "/v1/completions", "id")
    silent.on_step(make_stats(), [(0.1, 3)])
    silent.on_engine_event(EngineEvent("ready", 0.0, ""))
    silent.on_request(make_record())
    silent.on_loop_lag(0.1)
    assert silent.exposition()[0] == before
    assert silent.snapshot().data_age_seconds is None
