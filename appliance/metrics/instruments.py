"""Plain cells that count, and what turns them into Prometheus families when scraped.

prometheus_client's own instruments take a lock and a dict lookup at each observation; the step loop's observer runs hundreds of times a second with
dozens of observations each, so here an observation is an addition to a Python number and everything else happens at the scrape. All on one
thread (the event loop's).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from appliance.metrics.catalogue import Metric
from appliance.metrics.exposition import Exemplar, FamilyText
from appliance.metrics.goodput import Slo

_exemplar: Callable[[tuple[str, float, float]], Exemplar] = partial(tuple.__new__, Exemplar)  # a third of what its own constructor takes


class Cell:
    """A number: a counter's or a gauge's. Add to or assign `value`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Histogram:
    """Counts by bucket (not cumulative; the last is beyond every edge) and the sum, with the newest exemplar of each bucket."""

    __slots__ = ("counts", "edges", "exemplars", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = list(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of `value`; an edge belongs to the bucket below it (`le`)."""
        self.counts[bisect_left(self.edges, value)] += count
        self.sum += value * count

    def observe_all(self, values: Sequence[float]) -> None:
        """One observation of each of `values`."""
        counts, edges = self.counts, self.edges
        for value in values:
            counts[bisect_left(edges, value)] += 1
        self.sum += sum(values)

    def observe_counts(self, pairs: Sequence[tuple[float, int]]) -> None:
        """Of each pair, as many observations of its first as its second says."""
        counts, edges = self.counts, self.edges
        for value, count in pairs:
            counts[bisect_left(edges, value)] += count
            self.sum += value * count

    def observe_with(self, value: float, request_id: str, wall: float) -> None:
        """One observation, remembered as its bucket's exemplar."""
        index = bisect_left(self.edges, value)
        self.counts[index] += 1
        self.sum += value
        self.exemplars[index] = _exemplar((request_id, value, wall))

    def observe_bits(self, pairs: Iterable[tuple[int, int]], unit: float, total: float) -> None:
        """Observations counted by bit length, (bits, count), of values in `unit`s; `total` is their sum. Edges are powers of two of the unit."""
        for bits, count in pairs:
            self.counts[bisect_left(self.edges, ((1 << bits) - 1) * unit)] += count
        self.sum += total

    def add(self, other: Histogram) -> None:
        """All observations of `other`, whose edges include ours or are finer."""
        for edge, count in zip([*other.edges, math.inf], other.counts, strict=True):
            self.counts[bisect_left(self.edges, edge)] += count
        self.sum += other.sum


class Instruments:
    """The cells and histograms of every metric in a catalogue. Unlabelled ones exist from the start; labelled ones from their first use."""

    def __init__(self, catalogue: Iterable[Metric], slo: Slo, more_edges: Mapping[str, Iterable[float]] | None = None) -> None:
        """`more_edges`: by name, edges that a histogram gets beside its own and the SLO's."""
        self._metrics = {metric.name: metric for metric in catalogue}
        more = more_edges or {}
        self._edges = {name: metric.edges(slo, more.get(name, ())) for name, metric in self._metrics.items() if metric.kind == "histogram"}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {
            name: {} if self._metrics[name].labels else {(): Histogram(edges)} for name, edges in self._edges.items()
        }
        self._cells: dict[str, dict[tuple[str, ...], Cell]] = {
            name: {} if metric.labels else {(): Cell()} for name, metric in self._metrics.items() if metric.kind != "histogram"
        }
        self._texts = {name: _text(metric) for name, metric in self._metrics.items()}
        self.before_render: list[Callable[[], None]] = []  # each sets the gauges that are only known now

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram `name` with these label values, made at first use. KeyError where the catalogue has none."""
        histograms = self._histograms[name]
        if (histogram := histograms.get(labels)) is None:
            self._check(name, labels)
            histogram = histograms[labels] = Histogram(self._edges[name])
        return histogram

    def cell(self, name: str, *labels: str) -> Cell:
        """The counter or gauge `name` with these label values, made at first use. KeyError where the catalogue has none."""
        cells = self._cells[name]
        if (cell := cells.get(labels)) is None:
            self._check(name, labels)
            cell = cells[labels] = Cell()
        return cell

    def total(self, name: str, matching: Callable[[tuple[str, ...]], bool] = lambda _: True) -> float:
        """Sum of the counter or gauge `name` over the label values that match."""
        return sum(cell.value for labels, cell in self._cells[name].items() if matching(labels))

    def cells(self, name: str) -> Mapping[tuple[str, ...], Cell]:
        """Every cell of the counter or gauge `name` by its label values."""
        return self._cells[name]

    def histograms(self, name: str) -> Mapping[tuple[str, ...], Histogram]:
        """Every histogram `name` by its label values."""
        return self._histograms[name]

    def label_names(self, name: str) -> tuple[str, ...]:
        """The labels of the family `name`."""
        return self._metrics[name].labels

    def forget(self, name: str) -> None:
        """Drop the labelled cells of `name`: what it described is gone (or not known now)."""
        self._cells[name].clear()

    def render(self, out: list[str], *, openmetrics: bool) -> None:
        """Append every family's lines, after the hooks have set what is only known now. Exemplars are OpenMetrics' alone."""
        for hook in self.before_render:
            hook()
        for name, text in self._texts.items():
            out.append(text.head(openmetrics=openmetrics))
            if (histograms := self._histograms.get(name)) is not None:
                for labels, histogram in histograms.items():
                    exemplars = histogram.exemplars if openmetrics else None
                    text.histogram(out, labels, histogram.edges, histogram.counts, histogram.sum, exemplars)
            else:
                cells = self._cells[name]
                text.forget(cells)
                for labels, cell in cells.items():
                    text.value(out, labels, cell.value)

    def _check(self, name: str, labels: tuple[str, ...]) -> None:
        if len(labels) != len(self._metrics[name].labels):
            raise ValueError(f"{name} has labels {self._metrics[name].labels}, got {labels}")


def _text(metric: Metric) -> FamilyText:
    # OpenMetrics wants the unit to end the name, before _total
    unit = metric.unit if metric.name.removesuffix("_total").endswith("_" + metric.unit) else ""
    return FamilyText(metric.kind, metric.name, metric.help, metric.labels, unit)
