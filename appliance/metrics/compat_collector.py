"""Exports a compatible namespace: reads the instruments' cells at the scrape, by the rows of `compat`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric as Family
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from appliance.metrics.compat import CompatMetric, Namespace, Term
from appliance.metrics.instruments import AnyFamily, Histogram, Instruments, cumulative, make_family


class CompatCollector(Collector):
    """The families of one namespace. Register it after the instruments, whose hooks set the gauges that it copies."""

    def __init__(self, namespace: Namespace, instruments: Instruments, model: str) -> None:
        self._namespace = namespace
        self._instruments = instruments
        self._labels = {name: value.replace("{model}", model) for name, value in namespace.labels.items()}

    def describe(self) -> Iterator[Family]:
        for metric in self._namespace.metrics:
            yield self._family(metric)

    def collect(self) -> Iterator[Family]:
        for metric in self._namespace.metrics:
            family = self._family(metric)
            if isinstance(family, HistogramMetricFamily):
                for labels, merged in self._histograms(metric).items():
                    family.add_metric([*self._labels.values(), *labels], cumulative(metric.edges, merged.counts), merged.sum)
            else:
                for labels, value in self._values(metric).items():
                    family.add_metric([*self._labels.values(), *labels], value)
            yield family

    def _family(self, metric: CompatMetric) -> AnyFamily:
        return make_family(metric.kind, metric.name, metric.help, (*self._labels, *metric.terms[0].label_names))

    def _values(self, metric: CompatMetric) -> dict[tuple[str, ...], float]:
        """Of a counter or gauge, by the values of its own labels."""
        values: dict[tuple[str, ...], float] = {}
        for term in metric.terms:
            if term.source is None:
                labels = tuple(term.constant.values())
                values[labels] = values.get(labels, 0.0) + term.value
                continue
            for source, sign in ((term.source, 1.0), (term.less, -1.0)):
                for ours, cell in (self._instruments.cells(source) if source is not None else {}).items():
                    labels = self._translate(term, term.source, ours)
                    values[labels] = values.get(labels, 0.0) + sign * cell.value
        return values

    def _histograms(self, metric: CompatMetric) -> dict[tuple[str, ...], Histogram]:
        """Of a histogram, by the values of its own labels: the counts between the namespace's edges."""
        merged: dict[tuple[str, ...], Histogram] = {}
        for term in metric.terms:
            if term.source is None:
                continue
            for ours, histogram in self._instruments.histograms(term.source).items():
                target = merged.setdefault(self._translate(term, term.source, ours), Histogram(metric.edges))
                target.add(histogram)
        return merged

    def _translate(self, term: Term, source: str, ours: tuple[str, ...]) -> tuple[str, ...]:
        by_name = dict(zip(self._instruments.label_names(source), ours, strict=True))
        taken = (by_name[label] for label in term.labels.values())
        return (*term.constant.values(), *(term.values.get(value, value) for value in taken))
