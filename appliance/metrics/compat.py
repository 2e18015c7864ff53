"""Other systems' metric names, made from ours: one row a family, so that dashboards and autoscalers written for them keep working.

`vllm` is what vLLM exports (docs.vllm.ai, metrics), `otel` the server metrics of OpenTelemetry's GenAI conventions under their Prometheus names.
A histogram's copy has the other system's edges; ours gets them beside its own where a namespace is on, so the counts are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from appliance.metrics import buckets
from appliance.metrics.exposition import Kind

_VLLM_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_VLLM_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_VLLM_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_VLLM_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_VLLM_STEP = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_OTEL_DURATION = tuple(0.01 * 2**doubling for doubling in range(14))
_OTEL_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OTEL_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FINISH_REASONS = {"tool_calls": "stop", "deadline": "error", "other": "error", "none": "error"}
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


@dataclass(frozen=True, slots=True)
class Term:
    """Where samples come from: `source`, a family of the catalogue, less the family `less`; or, without a source, the constant `value`.

    Series are summed over the labels of ours that no label of theirs takes. A value of ours that `values` does not name stays as it is.
    """

    source: str | None = None
    less: str | None = None
    value: float = 0.0
    constant: Mapping[str, str] = field(default_factory=dict)  # their label -> its value
    labels: Mapping[str, str] = field(default_factory=dict)  # their label -> ours
    values: Mapping[str, str] = field(default_factory=dict)  # our label value -> theirs

    @property
    def label_names(self) -> tuple[str, ...]:
        """Their labels that this term sets."""
        return (*self.constant, *self.labels)


@dataclass(frozen=True, slots=True)
class CompatMetric:
    """One family under another system's name (`_total` included)."""

    name: str
    kind: Kind
    terms: tuple[Term, ...]
    edges: tuple[float, ...] = ()

    @property
    def help(self) -> str:
        """Says whose name it is, and what it is made of."""
        sources = [term.source + (f" less {term.less}" if term.less else "") for term in self.terms if term.source]
        return f"Copy of {', '.join(sources)}." if sources else "Constant: this engine has no such thing."


@dataclass(frozen=True, slots=True)
class Namespace:
    """All families of one system, with the labels that every sample carries; "{model}" stands for the served model's name."""

    name: str
    labels: Mapping[str, str]
    metrics: tuple[CompatMetric, ...]


def _gauge(name: str, source: str, **labels: str) -> CompatMetric:
    return CompatMetric(f"vllm:{name}", "gauge", (Term(f"appliance_{source}", labels=labels),))


def _counter(name: str, source: str, values: Mapping[str, str] | None = None, **labels: str) -> CompatMetric:
    return CompatMetric(f"vllm:{name}_total", "counter", (Term(f"appliance_{source}_total", labels=labels, values=values or {}),))


def _histogram(name: str, source: str, edges: tuple[float, ...]) -> CompatMetric:
    return CompatMetric(f"vllm:{name}", "histogram", (Term(f"appliance_{source}"),), edges)


def _otel(name: str, source: str, edges: tuple[float, ...]) -> CompatMetric:
    term = Term(f"appliance_{source}", labels={"gen_ai_operation_name": "endpoint"}, values=_OPERATIONS)
    return CompatMetric(f"gen_ai_server_{name}", "histogram", (term,), edges)


VLLM = Namespace(
    "vllm",
    {"model_name": "{model}", "engine": "0"},
    (
        _gauge("num_requests_running", "requests_running"),
        _gauge("num_requests_waiting", "requests_waiting"),
        CompatMetric(
            "vllm:num_requests_waiting_by_reason",
            "gauge",
            (Term("appliance_requests_waiting", constant={"reason": "capacity"}), Term(constant={"reason": "deferred"})),
        ),
        CompatMetric(
            "vllm:engine_sleep_state",
            "gauge",
            (
                Term(value=1.0, constant={"sleep_state": "awake"}),
                Term(constant={"sleep_state": "weights_offloaded"}),
                Term(constant={"sleep_state": "discard_all"}),
            ),
        ),
        _gauge("kv_cache_usage_perc", "kv_utilisation_ratio"),
        _gauge(
            "cache_config_info",
            "kv_info",
            block_size="block_size",
            num_gpu_blocks="num_blocks",
            cache_dtype="dtype",
            enable_prefix_caching="prefix_caching",
        ),
        CompatMetric(
            "vllm:lora_requests_info",
            "gauge",
            (Term(constant={"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}),),
        ),
        _counter("prompt_tokens", "prompt_tokens"),
        CompatMetric(
            "vllm:prompt_tokens_by_source_total",
            "counter",
            (
                Term("appliance_prompt_tokens_total", less="appliance_cached_tokens_total", constant={"source": "local_compute"}),
                Term("appliance_cached_tokens_total", constant={"source": "local_cache_hit"}),
                Term(constant={"source": "external_kv_transfer"}),
            ),
        ),
        _counter("prompt_tokens_cached", "cached_tokens"),
        _counter("generation_tokens", "output_tokens"),
        CompatMetric(
            "vllm:request_success_total",
            "counter",
            (
                *(Term(constant={"finished_reason": reason}) for reason in ("stop", "length", "abort", "error", "repetition")),
                Term("appliance_requests_total", labels={"finished_reason": "finish_reason"}, values=_FINISH_REASONS),
            ),
        ),
        _counter("num_preemptions", "preemptions"),
        _counter("prefix_cache_queries", "prefix_query_tokens"),
        _counter("prefix_cache_hits", "prefix_hit_tokens"),
        _counter("admission_rejections", "rejections", reason="code"),
        _histogram("time_to_first_token_seconds", "time_to_first_token_seconds", _VLLM_FIRST_TOKEN),
        _histogram("inter_token_latency_seconds", "inter_token_latency_seconds", _VLLM_TOKEN),
        _histogram("request_time_per_output_token_seconds", "time_per_output_token_seconds", _VLLM_TOKEN),
        _histogram("e2e_request_latency_seconds", "request_duration_seconds", _VLLM_REQUEST),
        _histogram("request_queue_time_seconds", "request_queue_seconds", _VLLM_REQUEST),
        _histogram("request_inference_time_seconds", "request_inference_seconds", _VLLM_REQUEST),
        _histogram("request_prefill_time_seconds", "request_prefill_seconds", _VLLM_REQUEST),
        _histogram("request_decode_time_seconds", "request_decode_seconds", _VLLM_REQUEST),
        _histogram("request_prompt_tokens", "request_prompt_tokens", buckets.TOKENS),
        _histogram("request_generation_tokens", "request_generated_tokens", buckets.TOKENS),
        _histogram("request_max_num_generation_tokens", "request_longest_choice_tokens", buckets.TOKENS),
        _histogram("request_params_n", "request_choices", _VLLM_CHOICES),
        _histogram("request_params_max_tokens", "request_max_tokens", buckets.TOKENS),
        _histogram("iteration_tokens_total", "engine_step_tokens", _VLLM_STEP),
        _histogram("request_num_preemptions", "request_preemptions", buckets.COUNT),
    ),
)
OTEL = Namespace(
    "otel",
    {"gen_ai_provider_name": "appliance", "gen_ai_request_model": "{model}"},
    (
        _otel("request_duration_seconds", "request_duration_seconds", _OTEL_DURATION),
        _otel("time_to_first_token_seconds", "time_to_first_token_seconds", _OTEL_FIRST_TOKEN),
        _otel("time_per_output_token_seconds", "time_per_output_token_seconds", _OTEL_TOKEN),
    ),
)
NAMESPACES: Mapping[str, Namespace] = {namespace.name: namespace for namespace in (VLLM, OTEL)}


def more_edges(namespaces: Iterable[Namespace]) -> dict[str, set[float]]:
    """The edges that our histograms need so that these namespaces' copies are exact, by name."""
    edges: dict[str, set[float]] = {}
    for namespace in namespaces:
        for metric in namespace.metrics:
            for term in metric.terms:
                if metric.kind == "histogram" and term.source is not None:
                    edges.setdefault(term.source, set()).update(metric.edges)
    return edges
