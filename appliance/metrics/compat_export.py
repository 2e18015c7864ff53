"""Exports a compatible namespace: reads the instruments' cells at the scrape, by the rows of `compat`."""

from __future__ import annotations

from appliance.metrics.compat import CompatMetric, Namespace, Term
from appliance.metrics.exposition import FamilyText
from appliance.metrics.instruments import Histogram, Instruments


class CompatExport:
    """The families of one namespace. Render it after the instruments, whose hooks set the gauges that it copies."""

    def __init__(self, namespace: Namespace, instruments: Instruments, model: str) -> None:
        self._instruments = instruments
        labels = {name: value.replace("{model}", model) for name, value in namespace.labels.items()}
        self._values_of_all = tuple(labels.values())
        self._families = [
            (metric, FamilyText(metric.kind, metric.name, metric.help, (*labels, *metric.terms[0].label_names))) for metric in namespace.metrics
        ]

    def render(self, out: list[str], *, openmetrics: bool) -> None:
        """Append every family's lines."""
        for metric, text in self._families:
            out.append(text.head(openmetrics=openmetrics))
            if metric.kind == "histogram":
                for labels, merged in self._histograms(metric).items():
                    text.histogram(out, (*self._values_of_all, *labels), merged.edges, merged.counts, merged.sum)
            else:
                values = self._values(metric)
                for labels, value in values.items():
                    text.value(out, (*self._values_of_all, *labels), value)

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
