"""Families as Prometheus' text format and as OpenMetrics 1.0. Every series' name and labels are rendered once and kept.

prometheus_client builds an object for each sample and formats every label again: at each scrape of 1,100 lines in OpenMetrics that held the event
loop for 8 ms (15 ms with the compatible namespaces), and every stream's next token with it; this takes 0.2 ms (0.5 ms).
https://prometheus.io/docs/instrumenting/exposition_formats/, https://prometheus.io/docs/specs/om/open_metrics_spec/
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
END = "# EOF\n"  # of an OpenMetrics exposition


class Exemplar(NamedTuple):
    """A request that fell into a bucket."""

    request_id: str
    value: float
    wall: float


class FamilyText:
    """The lines of one family. `unit` must end the name, before `_total`, or be empty."""

    __slots__ = ("_heads", "_labels", "_name", "_series")

    def __init__(self, kind: Kind, name: str, text: str, labels: Sequence[str], unit: str = "") -> None:
        self._name = name
        self._labels = tuple(labels)
        self._series: dict[tuple[str, ...], list[str]] = {}
        family = name.removesuffix("_total") if kind == "counter" else name
        help_text = text.replace("\\", "\\\\").replace("\n", "\\n")
        plain = f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        unit_line = f"# UNIT {family} {unit}\n" if unit else ""
        self._heads = (plain, f"# HELP {family} {_escape(text)}\n# TYPE {family} {kind}\n{unit_line}")

    def head(self, *, openmetrics: bool) -> str:
        """Help, type and unit."""
        return self._heads[openmetrics]

    def value(self, out: list[str], labels: tuple[str, ...], value: float) -> None:
        """Append a counter's or gauge's sample."""
        prefixes = self._series.get(labels)
        if prefixes is None:
            prefixes = self._series[labels] = [f"{self._name}{self._braces(labels)} "]
        out.append(f"{prefixes[0]}{number(value)}\n")

    def histogram(
        self,
        out: list[str],
        labels: tuple[str, ...],
        edges: Sequence[float],
        counts: Sequence[int],
        total: float,
        exemplars: Mapping[int, Exemplar] | None = None,
    ) -> None:
        """Append a histogram's samples. `counts` are by bucket, the last beyond every edge; `exemplars` by the bucket's number."""
        prefixes = self._series.get(labels)
        if prefixes is None:
            prefixes = self._series[labels] = self._bucket_prefixes(labels, edges)
        below = 0
        for index, count in enumerate(counts):
            below += count
            if exemplars and (exemplar := exemplars.get(index)) is not None:
                mark = f' # {{request_id="{_escape(exemplar.request_id)}"}} {number(exemplar.value)} {number(exemplar.wall)}'
                out.append(f"{prefixes[index]}{below}.0{mark}\n")
            else:
                out.append(f"{prefixes[index]}{below}.0\n")
        out.append(f"{prefixes[-2]}{below}.0\n{prefixes[-1]}{number(total)}\n")

    def forget(self, kept: Mapping[tuple[str, ...], object]) -> None:
        """Drop what is kept of series that are gone, once those are many."""
        if len(self._series) > 2 * len(kept) + 64:
            self._series = {labels: prefixes for labels, prefixes in self._series.items() if labels in kept}

    def _bucket_prefixes(self, labels: tuple[str, ...], edges: Sequence[float]) -> list[str]:
        buckets = [f"{self._name}_bucket{self._braces(labels, number(edge))} " for edge in (*edges, math.inf)]
        return [*buckets, f"{self._name}_count{self._braces(labels)} ", f"{self._name}_sum{self._braces(labels)} "]

    def _braces(self, values: tuple[str, ...], le: str = "") -> str:
        pairs = [f'{name}="{_escape(value)}"' for name, value in zip(self._labels, values, strict=True)]
        if le:
            pairs.append(f'le="{le}"')
        return f"{{{','.join(pairs)}}}" if pairs else ""


def number(value: float) -> str:
    """A sample's value or a bucket's edge."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
