"""The catalogue is the truth: everything it declares is exported, everything exported is declared, and its names follow Prometheus' conventions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.clock import ManualClock
from appliance.events import EngineEvent, RequestRecord, StepStats, StoreStats
from appliance.metrics.catalogue import CATALOGUE, Metric
from appliance.metrics.goodput import Slo
from appliance.metrics.hardware import HardwareReader
from appliance.metrics.nvml import Nvml
from appliance.metrics.recorder import Recorder
from appliance.metrics.reference import reference

BASE_UNITS = {"", "seconds", "bytes", "ratio", "tokens", "sequences", "rows", "joules", "watts", "celsius", "hertz"}


def _family(metric: Metric) -> str:
    return metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name


def _everything_happened(recorder: Recorder, clock: ManualClock, record: RequestRecord, stats: StepStats, fake_nvml: object, folder: Path) -> None:
    """Feed every hook, so that every family has a sample."""
    recorder.on_received("/v1/chat/completions")
    recorder.on_admitted(100, 50)
    recorder.on_rejected("queue_full")
    recorder.on_first_token(0.2)
    recorder.on_step(stats, [(0.004, 8)])
    recorder.on_engine_event(EngineEvent("started", 0.0, ""))
    recorder.on_request(record)
    recorder.on_policy(2, "up", pinned=False)
    recorder.on_delivery("delivered", 0)
    recorder.bind_store(
        lambda: StoreStats(
            num_queued_rows=1,
            num_spooled_rows=2,
            num_written_rows=3,
            num_spooled_total=4,
            num_dropped_rows=5,
            num_refused_rows=6,
            num_failed_flushes=7,
            flush_seconds=8.0,
            num_flushes=9,
            available=True,
        )
    )
    reader = HardwareReader(clock=clock, state_dir=folder, engine_pid=lambda: None, nvml=Nvml(fake_nvml, None))
    reader.read()
    recorder.bind_hardware(lambda: reader.latest)
    assert reader.latest is not None
    recorder.on_hardware(reader.latest)
    recorder.on_loop_lag(0.001)


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)])
def test_declared_and_exported_are_the_same(
    accept: str,
    parse: Callable[..., object],
    recorder: Recorder,
    clock: ManualClock,
    engine: object,
    make_record: Callable[..., RequestRecord],
    make_stats: Callable[..., StepStats],
    fake_nvml: object,
    tmp_path: Path,
) -> None:
    """After everything has happened once, the families with samples are exactly the catalogue's, with its types, help texts and labels."""
    _everything_happened(recorder, clock, make_record(joules=12.0), make_stats(), fake_nvml, tmp_path)
    body, content_type = recorder.exposition(accept)
    assert ("openmetrics" in content_type) == bool(accept)
    families = {family.name: family for family in parse(body.decode())}  # type: ignore[attr-defined]
    assert set(families) == {_family(metric) for metric in CATALOGUE}
    for metric in CATALOGUE:
        family = families[_family(metric)]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{metric.name} has no sample"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_every_family_is_announced_before_anything_happens(recorder: Recorder) -> None:
    """A scrape of a fresh server names every family (a GPU's too, without samples), so that dashboards can be checked anywhere."""
    families = {family.name: family for family in parse_text(recorder.exposition()[0].decode())}
    assert set(families) == {_family(metric) for metric in CATALOGUE}
    empty = {metric.name for metric in CATALOGUE if not families[_family(metric)].samples}
    assert empty <= {metric.name for metric in CATALOGUE if metric.labels}


def test_names_follow_the_conventions() -> None:
    """Prefix, snake case, counters (and only they) end in _total, units are base units and end the name, no two families share a name."""
    assert len({_family(metric) for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"appliance_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.unit in BASE_UNITS
        assert metric.unit == "" or metric.unit in _family(metric).rsplit("_", 1)[-1], f"{metric.name} does not end in {metric.unit}"
        assert not re.search(r"_(milliseconds|ms|percent|mb|kb)\b", metric.name)
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert "le" not in metric.labels


def test_buckets_fit_fast_engines_and_hold_the_slo(slo: Slo, recorder: Recorder) -> None:
    """ITL starts at 0.5 ms, queue and prefill at 1 ms, and the SLO's thresholds are edges, in the exposition too."""
    first = {metric.name: metric.edges(slo)[0] for metric in CATALOGUE if metric.kind == "histogram"}
    assert first["appliance_inter_token_latency_seconds"] == 0.0005
    assert first["appliance_request_queue_seconds"] == first["appliance_request_prefill_seconds"] == 0.001
    text = recorder.exposition()[0].decode()
    assert f'appliance_time_to_first_token_seconds_bucket{{endpoint="/v1/completions",le="{slo.ttft_seconds}"}}' in text
    assert f'appliance_time_per_output_token_seconds_bucket{{endpoint="/v1/completions",le="{slo.tpot_seconds}"}}' in text


def test_the_documentation_is_current() -> None:
    """docs/metrics.md is what `python -m appliance.metrics.reference` prints."""
    path = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert path.read_text() == reference(), "run: python -m appliance.metrics.reference > docs/metrics.md"
