"""docs/metrics.md, made from the catalogue: `python -m appliance.metrics.reference > docs/metrics.md`. A test holds the file current."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from appliance.metrics.catalogue import CATALOGUE, Metric

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
Made from `appliance/metrics/catalogue.py` by `python -m appliance.metrics.reference`; do not edit.
"""


def reference(catalogue: Iterable[Metric] = CATALOGUE) -> str:
    """The documentation of every family as Markdown, one table a group, in the catalogue's order."""
    groups: dict[str, list[Metric]] = {}
    for metric in catalogue:
        groups.setdefault(metric.group, []).append(metric)
    parts = [_HEAD]
    for group, metrics in groups.items():
        parts.append(f"\n## {_TITLES[group]}\n\n| name | type | labels | meaning |\n|---|---|---|---|\n")
        parts += [f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {_meaning(m)} |\n" for m in metrics]
    return "".join(parts)


def _meaning(metric: Metric) -> str:
    if metric.kind != "histogram":
        return metric.help
    objective = f", and the {metric.objective.upper()} SLO" if metric.objective else ""
    return f"{metric.help} Buckets: {' '.join(f'{edge:g}' for edge in metric.buckets)}{objective}."


if __name__ == "__main__":
    sys.stdout.write(reference())
