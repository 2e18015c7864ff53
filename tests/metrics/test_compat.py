"""Other systems' names: every name they document is served, with their labels and edges, and equals what ours says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.clock import ManualClock
from appliance.events import RequestRecord, RequestUse, StepStats
from appliance.metrics.catalogue import CATALOGUE
from appliance.metrics.compat import NAMESPACES, OTEL, VLLM
from appliance.metrics.goodput import Slo
from appliance.metrics.recorder import Recorder
from appliance.settings import MetricsSettings

# vLLM 0.33's families, written down from its documentation: name -> (type, labels beside model_name and engine)
VLLM_GAUGES = {
    "num_requests_running": (),
    "num_requests_waiting": (),
    "num_requests_waiting_by_reason": ("reason",),
    "engine_sleep_state": ("sleep_state",),
    "kv_cache_usage_perc": (),
    "cache_config_info": ("block_size", "num_gpu_blocks"),
    "lora_requests_info": ("running_lora_adapters",),
}
VLLM_COUNTERS = {
    "prompt_tokens": (),
    "prompt_tokens_by_source": ("source",),
    "prompt_tokens_cached": (),
    "generation_tokens": (),
    "request_success": ("finished_reason",),
    "num_preemptions": (),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "admission_rejections": ("reason",),
}
VLLM_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
    "request_num_preemptions",
)
OTEL_HISTOGRAMS = (
    "gen_ai_server_request_duration_seconds",
    "gen_ai_server_time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds",
)
MakeRecord = Callable[..., RequestRecord]
MakeStats = Callable[..., StepStats]


@pytest.fixture
def both(clock: ManualClock, slo: Slo) -> Recorder:
    """A recorder that serves both namespaces beside its own."""
    return Recorder(clock=clock, slo=slo, model="smollm2", settings=MetricsSettings(compat=("vllm", "otel")))


@pytest.fixture
def served(both: Recorder, engine_class: Any, make_record: MakeRecord, make_stats: MakeStats) -> Recorder:
    """It, after some traffic."""
    both.bind_engine(engine_class())
    both.on_step(make_stats(), [(0.004, 8)])
    both.on_first_token(0.03, "/v1/completions")
    both.on_first_token(0.3)
    both.on_rejected("queue_full")
    both.on_request(make_record(num_choices=2, max_tokens=64), RequestUse(engine_seconds=0.1, num_longest_tokens=30))
    both.on_request(make_record(endpoint="/v1/completions", duration_seconds=0.7))
    both.on_request(make_record(finish_reason="tool_calls"))
    both.on_request(make_record(status=499, finish_reason="abort"))
    return both


def _families(recorder: Recorder) -> dict[str, Any]:
    return {family.name: family for family in parse_text(recorder.exposition()[0].decode())}


def _values(family: Any, label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in family.samples}


def test_every_name_of_vllm_is_served(served: Recorder) -> None:
    """Type and labels of each family are vLLM's; there is none beside them."""
    families = _families(served)
    for kind, expected in (("gauge", VLLM_GAUGES), ("counter", VLLM_COUNTERS), ("histogram", dict.fromkeys(VLLM_HISTOGRAMS, ()))):
        for name, labels in expected.items():
            family = families[f"vllm:{name}"]
            assert family.type == kind, name
            assert family.samples, name
            for sample in family.samples:
                assert sample.labels["model_name"] == "smollm2"
                assert sample.labels["engine"] == "0"
                assert set(labels) <= sample.labels.keys(), name
    names = {name.removeprefix("vllm:") for name in families if name.startswith("vllm:")}
    assert names == {*VLLM_GAUGES, *VLLM_COUNTERS, *VLLM_HISTOGRAMS}


def test_every_name_of_otel_is_served(served: Recorder) -> None:
    """Three histograms, by operation, with the conventions' attributes."""
    families = _families(served)
    for name in OTEL_HISTOGRAMS:
        samples = families[name].samples
        assert {sample.labels["gen_ai_operation_name"] for sample in samples} == {"chat", "text_completion"}
        assert {(s.labels["gen_ai_provider_name"], s.labels["gen_ai_request_model"]) for s in samples} == {("appliance", "smollm2")}
    counts = {s.labels["gen_ai_operation_name"]: s.value for s in families[OTEL_HISTOGRAMS[0]].samples if s.name.endswith("_count")}
    assert counts == {"chat": 2, "text_completion": 1}
    assert {name for name in families if name.startswith("gen_ai")} == set(OTEL_HISTOGRAMS)


def test_the_copies_say_what_ours_say(served: Recorder) -> None:
    """Running, waiting, tokens by source, ends by reason, rejections by reason; a tool call is a stop to vLLM."""
    families = _families(served)
    assert [families[f"vllm:num_requests_{state}"].samples[0].value for state in ("running", "waiting")] == [9, 3]
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0.4
    assert _values(families["vllm:prompt_tokens_by_source"], "source") == {"local_compute": 336, "local_cache_hit": 64, "external_kv_transfer": 0}
    assert _values(families["vllm:request_success"], "finished_reason") == {"stop": 3, "length": 0, "abort": 1, "error": 0, "repetition": 0}
    assert _values(families["vllm:admission_rejections"], "reason")["queue_full"] == 1
    assert _values(families["vllm:num_requests_waiting_by_reason"], "reason") == {"capacity": 3, "deferred": 0}
    assert _values(families["vllm:engine_sleep_state"], "sleep_state") == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    assert families["vllm:cache_config_info"].samples[0].labels["num_gpu_blocks"] == "100"


def test_their_edges_are_exact(served: Recorder) -> None:
    """A copy has exactly the other system's edges, and its counts are those of the values, not of our coarser buckets."""
    families = _families(served)
    for namespace in NAMESPACES.values():
        for metric in namespace.metrics:
            if metric.kind == "histogram":
                samples = families[metric.name].samples
                edges = {float(s.labels["le"]) for s in samples if s.name.endswith("_bucket")}
                assert edges == {*metric.edges, float("inf")}, metric.name
    first = {s.labels["le"]: s.value for s in families["vllm:time_to_first_token_seconds"].samples if s.name.endswith("_bucket")}
    assert (first["0.02"], first["0.04"], first["0.25"], first["0.5"], first["+Inf"]) == (0, 1, 1, 2, 2)
    durations = {s.labels["le"]: s.value for s in families["vllm:e2e_request_latency_seconds"].samples if s.name.endswith("_bucket")}
    assert (durations["0.5"], durations["0.8"], durations["1.5"], durations["2.0"]) == (0, 1, 1, 3)
    longest = next(s.value for s in families["vllm:request_max_num_generation_tokens"].samples if s.name.endswith("_sum"))
    assert longest == 30 + 3 * 50


def test_openmetrics_parses_with_both_namespaces(served: Recorder) -> None:
    """The strict format takes their names too."""
    body, _ = served.exposition("application/openmetrics-text; version=1.0.0")
    families = {family.name for family in parse_openmetrics(body.decode())}
    assert {"vllm:num_requests_running", *OTEL_HISTOGRAMS} <= families


def test_sources_are_of_the_catalogue_and_of_its_kind() -> None:
    """A row that names a family or a label that is none, or makes a counter of a gauge, would fail in somebody's dashboard only."""
    catalogue = {metric.name: metric for metric in CATALOGUE}
    for metric in (*VLLM.metrics, *OTEL.metrics):
        for term in metric.terms:
            for source in (term.source, term.less):
                if source is not None:
                    assert catalogue[source].kind == metric.kind, metric.name
                    assert set(term.labels.values()) <= set(catalogue[source].labels), metric.name
        assert len({term.label_names for term in metric.terms}) == 1, metric.name


def test_nothing_of_theirs_is_served_unasked(recorder: Recorder) -> None:
    """Off by default: their names would be counted twice where a real vLLM is scraped too."""
    assert all(name.startswith("appliance_") for name in _families(recorder))
