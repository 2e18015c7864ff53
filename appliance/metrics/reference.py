"""docs/metrics.md, made from the catalogue: `python -m appliance.metrics.reference > docs/metrics.md`. A test holds the file current."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from appliance.metrics.catalogue import CATALOGUE, Metric
from appliance.metrics.compat import NAMESPACES, CompatMetric, Namespace

_TITLES = {
    "latency": "Latency",
    "requests": "Requests",
    "tokens": "Tokens",
    "slo": "SLO",
    "keys": "API keys",
    "kv": "KV cache",
    "engine": "Engine",
    "scaling": "Scaling",
    "store": "SQL writer",
    "host": "Processes and host",
    "gpu": "GPU",
    "energy": "Energy",
}
_HEAD = """# Metrics

`/metrics` serves these families in Prometheus' text format, or in OpenMetrics (with request ids as exemplars) where the scraper asks for it.
Durations are seconds, sizes bytes, shares 0-1. The SLO thresholds are bucket edges of the histograms that name them: a share within the SLO is exact.
`--compat-metrics vllm,otel` serves other systems' names beside these (at the end of this page); `metrics.enabled = false` measures nothing.

- **Goodput** is `appliance_slo_good_requests_total{objective="both"}` over `appliance_slo_requests_total{objective="both"}`; of tokens likewise,
  and by key `appliance_key_slo_good_requests_total` over `appliance_key_slo_requests_total`. What is judged: `appliance/metrics/goodput.py`.
- **Model FLOPs** of a step: tokens x 2 x weights of the layers, + sampled rows x 2 x weights of the head, + pairs of query and position x 4 x
  layers x heads x head_dim. **Model bytes**: the weights once, K and V of every decode's context and of every chunk's start, and those of the new
  tokens. Utilisation is their rate over the device's peak: from a table of data sheets by the GPU's name (dense bfloat16), else measured as the
  model loads (a square product, and a sum over a large buffer). Over busy time instead of wall time:
  `rate(appliance_engine_model_flops_total[5m]) / rate(appliance_engine_busy_seconds_total[5m]) / appliance_engine_peak_flops_per_second`.
- **Energy** is NVML's counter of the engine's GPU, read every ten seconds, and its power, integrated, in between and where there is none. An interval
  between two readings is split into time with and without a step; idle time costs what idle intervals did, the rest is serving. A step's joules are
  its busy time at the serving power, split over its rows: the linear layers equally by token, attention by context (`appliance/engine/costs.py`).
  Joules per token:
  `rate(appliance_energy_joules_total{use="serving"}[5m]) / rate(appliance_output_tokens_total[5m])`.
- **Engine seconds** of a key are split in the same way: over all keys they are the engine's busy time, less what rows took whose request had
  ended by then (surplus, clients that left).

Made from `appliance/metrics/catalogue.py` by `python -m appliance.metrics.reference`; do not edit.
"""


def reference(catalogue: Iterable[Metric] = CATALOGUE) -> str:
    """The documentation of every family as Markdown, one table a group, in the catalogue's order; then the compatible namespaces."""
    groups: dict[str, list[Metric]] = {}
    for metric in catalogue:
        groups.setdefault(metric.group, []).append(metric)
    parts = [_HEAD]
    for group, metrics in groups.items():
        parts.append(f"\n## {_TITLES[group]}\n\n| name | type | labels | meaning |\n|---|---|---|---|\n")
        parts += [f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {_meaning(m)} |\n" for m in metrics]
    parts += [_namespace(namespace) for namespace in NAMESPACES.values()]
    return "".join(parts)


def _namespace(namespace: Namespace) -> str:
    labels = ", ".join(f"`{label}`" for label in namespace.labels)
    rows = "".join(f"| `{m.name}` | {m.kind} | {_own_labels(m)} | {m.help} |\n" for m in namespace.metrics)
    return (
        f"\n## Compatible names: `--compat-metrics {namespace.name}`\n\nEvery sample carries {labels}.\n\n"
        f"| name | type | other labels | meaning |\n|---|---|---|---|\n{rows}"
    )


def _own_labels(metric: CompatMetric) -> str:
    return ", ".join(f"`{label}`" for label in metric.terms[0].label_names)


def _meaning(metric: Metric) -> str:
    if metric.kind != "histogram":
        return metric.help
    objective = f", and the {metric.objective.upper()} SLO" if metric.objective else ""
    return f"{metric.help} Buckets: {' '.join(f'{edge:g}' for edge in metric.buckets)}{objective}."


if __name__ == "__main__":
    sys.stdout.write(reference())
