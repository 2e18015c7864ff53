"""From the recorder's own exposition to figures: every name that is read is exported, and the numbers are right."""

from __future__ import annotations

import msgspec
import pytest

from appliance.events import StoreStats
from appliance.metrics.catalogue import CATALOGUE
from appliance.metrics.hardware import HardwareReading, ProcessReading
from appliance.metrics.nvml import GpuReading
from appliance.top.figures import Figures, History
from appliance.top.scrape import Scrape, parse

STORE = StoreStats(
    num_queued_rows=4,
    num_spooled_rows=2,
    num_written_rows=9,
    num_spooled_total=2,
    num_dropped_rows=1,
    num_refused_rows=0,
    num_failed_flushes=0,
    flush_seconds=0.1,
    num_flushes=3,
    available=True,
)


def _hardware(joules: float | None) -> HardwareReading:
    process = ProcessReading(1.0, 1 << 30, 10, 5)
    gpus = ()
    if joules is not None:
        gpu = {"utilisation": 0.75, "memory_used_bytes": 10 << 30, "memory_bytes": 80 << 30, "power_watts": 350.0, "temperature_celsius": 60.0}
        gpus = (GpuReading(0, "NVIDIA H100", "GPU-1", energy_joules=joules, throttle_reasons=frozenset({"hw_thermal"}), **gpu),)
    return HardwareReading(1.0, 4, 0.5, 8 << 30, 16 << 30, 1 << 40, process, process, gpus)


def _scrape(recorder, at):
    return parse(recorder.exposition()[0].decode(), at)


def _work(recorder, make_stats, make_record):
    """Ten requests, half of them bad, in ten steps."""
    for index in range(10):
        recorder.on_received("/v1/chat/completions")
        recorder.on_admitted(100, 50)
        recorder.on_first_token(0.2)
        recorder.on_step(make_stats(step=index), [(0.02, 49)])
        recorder.on_request(make_record(ttft_seconds=0.2 if index % 2 else 5.0))
    recorder.on_request(make_record(status=503, finish_reason="error", num_generated_tokens=0, num_prompt_tokens=0, ttft_seconds=None))
    recorder.on_rejected("queue_full")


@pytest.fixture
def history(recorder, engine, make_stats, make_record, clock):
    """Two looks, two seconds apart, with work between them."""
    reading = [_hardware(1000.0)]
    recorder.bind_hardware(lambda: reading[0])
    recorder.bind_store(lambda: STORE)
    recorder.on_policy(3, pinned=True)
    history = History()
    history.add(_scrape(recorder, 10.0))
    _work(recorder, make_stats, make_record)
    clock.advance(2.0)
    reading[0] = _hardware(1700.0)
    history.add(_scrape(recorder, 12.0))
    return history


def test_every_figure_is_known_with_a_gpu(history: History) -> None:
    """No name has been renamed under us: nothing is None, and the text is there."""
    figures = history.figures("http://x", 1.0)
    unknown = [name for name, value in msgspec.structs.asdict(figures).items() if value is None or value == ""]
    assert unknown == []


def test_figures_are_those_of_the_interval(history: History) -> None:
    """Rates over two seconds, latencies, shares and energy of what happened between the looks."""
    figures = history.figures("http://x", 1.0)
    assert figures.requests_per_second == 5.5
    assert figures.errors_per_second == figures.rejections_per_second == 0.5
    assert figures.prompt_tokens_per_second == 500
    assert figures.output_tokens_per_second == 250
    assert list(history.output_rates) == [250]
    assert 0.15 < (figures.ttft_p50_seconds or 0) <= 0.2
    assert 0.015 < (figures.tpot_p95_seconds or 0) <= 0.02
    assert figures.steps_per_second == 5
    assert figures.mean_batch_sequences == 9
    assert figures.mean_step_seconds == pytest.approx(0.0065)
    assert figures.joules_per_token == pytest.approx(700 / 500)
    assert figures.goodput == pytest.approx(5 / 11)
    assert figures.slo_target == 0.95
    assert figures.prefix_hit_share == pytest.approx(0.16)
    assert (figures.num_running, figures.num_waiting) == (9, 3)
    assert (figures.kv_utilisation, figures.desired_replicas, figures.scaling_pinned) == (0.4, 3, True)
    (gpu,) = figures.gpus
    assert (gpu.name, gpu.power_watts, gpu.throttled) == ("NVIDIA H100", 350.0, ("hw_thermal",))
    assert (figures.engine_state, figures.instance_id, figures.model, figures.version) == ("ready", "node-1", "smollm2", "1.2.3")


def test_one_look_knows_no_rates(recorder) -> None:
    """Gauges are known at once; rates and shares are not, and are not called zero."""
    history = History()
    history.add(_scrape(recorder, 10.0))
    figures = history.figures("http://x", 1.0)
    assert figures.requests_per_second is None
    assert figures.ttft_p50_seconds is None
    assert figures.goodput is None
    assert figures.desired_replicas is None, "the policy has not run yet"
    assert figures.num_running == 0
    assert figures.gpus == ()
    assert figures.power_watts is None or not figures.gpus


def test_a_restarted_server_begins_a_new_history(history: History, make_stats) -> None:
    """Counters that fell are no negative rates, and the old process' work is not mixed in."""
    young = parse('appliance_uptime_seconds 0.5\nappliance_requests_total{status="200"} 1\nappliance_output_tokens_total 5\n', 13.0)
    history.add(young)
    figures = history.figures("http://x", 1.0)
    assert figures.requests_per_second is None
    assert list(history.output_rates) == []
    history.add(parse('appliance_uptime_seconds 1.5\nappliance_requests_total{status="200"} 3\nappliance_output_tokens_total 25\n', 14.0))
    assert history.figures("http://x", 1.0).requests_per_second == 2
    assert list(history.output_rates) == [20]


def test_the_window_forgets(recorder) -> None:
    """Only the last minute counts for latencies; memory does not grow with time."""
    history = History(window_seconds=60)
    for second in range(0, 600, 2):
        history.add(Scrape(float(second), {"uptime_seconds": [({}, float(second))], "output_tokens_total": [({}, second * 7.0)]}))
    figures = history.figures("http://x", 1.0)
    assert 60 <= figures.window_seconds <= 62
    assert figures.interval_seconds == 2
    assert figures.output_tokens_per_second == 7
    assert len(history.output_rates) == 120


def test_figures_are_json(history: History) -> None:
    """Scripts get what the screen shows, and can read it back."""
    figures = history.figures("http://x", 1.0)
    assert msgspec.json.decode(msgspec.json.encode(figures), type=Figures) == figures


def test_names_are_the_catalogues() -> None:
    """The names written in the module, but for suffixes of histograms, are families of the catalogue."""
    import inspect
    import re

    from appliance.top import figures

    known = {metric.name.removeprefix("appliance_") for metric in CATALOGUE}
    used = set(re.findall(r'(?:total|rate|grown|quantile|mean|labelled|info|histogram)\("([a-z_]+)"', inspect.getsource(figures)))
    assert len(used) > 30
    assert used <= known, used - known
