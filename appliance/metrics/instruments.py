"""Plain cells that count, and the collector that turns them into Prometheus families when scraped.

prometheus_client's own instruments take a lock and a dict lookup at each observation; the step loop's observer runs hundreds of times a second with
dozens of observations each, so here an observation is an addition to a Python number and everything else happens at the scrape. All on one
thread (the event loop's).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from appliance.metrics.catalogue import Kind, Metric
from appliance.metrics.goodput import Slo

AnyFamily = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Bucket = tuple[str, float] | tuple[str, float, Exemplar]


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

    def observe_with(self, value: float, request_id: str, wall: float) -> None:
        """One observation, remembered as its bucket's exemplar."""
        index = bisect_left(self.edges, value)
        self.counts[index] += 1
        self.sum += value
        self.exemplars[index] = Exemplar({"request_id": request_id}, value, wall)

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

    def buckets(self) -> list[Bucket]:
        """The cumulative buckets in Prometheus' form, +Inf last."""
        return cumulative(self.edges, self.counts, self.exemplars)


def cumulative(edges: Sequence[float], counts: Sequence[int], exemplars: Mapping[int, Exemplar] | None = None) -> list[Bucket]:
    """Counts by bucket as Prometheus wants them: each with all below it, +Inf last."""
    result: list[Bucket] = []
    total = 0
    for index, (label, count) in enumerate(zip([*map(_edge, edges), "+Inf"], counts, strict=True)):
        total += count
        exemplar = None if exemplars is None else exemplars.get(index)
        result.append((label, float(total)) if exemplar is None else (label, float(total), exemplar))
    return result


def _edge(value: float) -> str:
    return repr(float(value))


class Instruments(Collector):
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
        self.before_collect: list[Callable[[], None]] = []  # each sets the gauges that are only known now

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

    def describe(self) -> Iterator[Family]:
        for metric in self._metrics.values():
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        for hook in self.before_collect:
            hook()
        for name, metric in self._metrics.items():
            family = _family(metric)
            if isinstance(family, HistogramMetricFamily):
                for labels, histogram in self._histograms[name].items():
                    family.add_metric(list(labels), histogram.buckets(), histogram.sum)
            else:
                for labels, cell in self._cells[name].items():
                    family.add_metric(list(labels), cell.value)
            yield family

    def _check(self, name: str, labels: tuple[str, ...]) -> None:
        if len(labels) != len(self._metrics[name].labels):
            raise ValueError(f"{name} has labels {self._metrics[name].labels}, got {labels}")


def make_family(kind: Kind, name: str, text: str, labels: tuple[str, ...], unit: str = "") -> AnyFamily:
    """An empty family of prometheus_client's."""
    if kind == "histogram":
        return HistogramMetricFamily(name, text, labels=labels, unit=unit)
    return (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, labels=labels, unit=unit)


def _family(metric: Metric) -> AnyFamily:
    # OpenMetrics wants the unit to end the name, before _total
    unit = metric.unit if metric.name.removesuffix("_total").endswith("_" + metric.unit) else ""
    return make_family(metric.kind, metric.name, metric.help, metric.labels, unit)
