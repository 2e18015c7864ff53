"""Every query of dashboards and rules, asked of a live Prometheus as Grafana would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from board_queries import as_bool, comparisons_stripped, fill_promql, promql, rules
from prometheus_server import PrometheusServer


@dataclass(frozen=True, slots=True)
class Live:
    """One query to ask."""

    origin: str
    expr: str


def panel_queries(range_seconds: float, interval_seconds: float, *kinds: str) -> Iterator[Live]:
    """The queries of panels (or of annotations), variables filled in."""
    for target in promql(*kinds):
        filled = fill_promql(target.text, rate_interval=f"{math.ceil(4 * interval_seconds)}s", range_=f"{math.ceil(range_seconds)}s")
        yield Live(f"{target.board}: {target.title}", filled)


def rule_queries() -> Iterator[Live]:
    """What recording rules record and the series that they made; what alerts compare, and the comparisons with their joins."""
    for rule in rules():
        if "record" in rule:
            yield Live(rule["record"], rule["expr"])
            yield Live(f"recorded {rule['record']}", rule["record"])
        else:
            for part in comparisons_stripped(rule["expr"]):
                yield Live(rule["alert"], part)
            if "absent(" not in rule["expr"]:
                yield Live(f"{rule['alert']}, as 0 or 1", as_bool(rule["expr"]))


def faults(prometheus: PrometheusServer, queries: Iterable[Live], start: float, end: float, step: float) -> list[str]:
    """Of these queries, those without data and those with a value that is not finite, from `start` to `end`."""
    found = []
    for query in queries:
        result: list[dict[str, Any]] = prometheus.query_range(query.expr, start, end, step)
        if not any(series["values"] for series in result):
            found.append(f"no data: {query.origin}: {query.expr}")
        for series in result:
            bad = [at - start for at, value in series["values"] if not math.isfinite(float(value))]
            if bad:
                times = f"{len(bad)} of {len(series['values'])} times, first after {bad[0]:.0f} s"
                found.append(f"not finite {times}: {query.origin}: {query.expr}: {series['metric']}")
    return found
