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


def panel_queries(range_seconds: float, rate_seconds: float, *kinds: str) -> Iterator[Live]:
    """The queries of panels (or of annotations), variables filled in; `rate_seconds` is $__rate_interval, four scrapes in Grafana."""
    for target in promql(*kinds):
        filled = fill_promql(target.text, rate_interval=f"{math.ceil(rate_seconds)}s", range_=f"{math.ceil(range_seconds)}s")
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


def check(prometheus: PrometheusServer, queries: Iterable[Live], start: float, end: float, step: float, *, least_share: float = 0.9) -> None:
    """Each query has a series with a value at `least_share` of the steps from `start` to `end`, and no value that is not finite."""
    found = [
        fault
        for query in queries
        for fault in _faults(query, prometheus.query_range(query.expr, start, end, step), (end - start) / step * least_share)
    ]
    assert not found, "\n".join(found)


def _faults(query: Live, result: list[dict[str, Any]], least: float) -> Iterator[str]:
    longest = max((len(series["values"]) for series in result), default=0)
    if longest < max(1, math.floor(least)):
        yield f"{longest} values, {math.floor(least)} wanted: {query.origin}: {query.expr}"
    for series in result:
        bad = [value for _, value in series["values"] if not math.isfinite(float(value))]
        if bad:
            yield f"{len(bad)} of {len(series['values'])} values are not finite: {query.origin}: {query.expr}: {series['metric']}"
