"""The kinds of panels that the boards are made of, with this project's look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder, variants
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from boards.promql import Query, rate

PROMETHEUS = models.DataSourceRef("prometheus", "${datasource}")
SQL = models.DataSourceRef("grafana-postgresql-datasource", "${sql}")

Steps = Sequence[tuple[float | None, str]]  # (from this value on, colour)
GOOD_ABOVE_99: Steps = ((None, "red"), (0.95, "orange"), (0.99, "green"))
BAD_ABOVE_ZERO: Steps = ((None, "green"), (1e-9, "red"))
ALWAYS_GREEN: Steps = ((None, "green"),)


class SqlQuery(variants.Dataquery, builder.Builder[variants.Dataquery]):
    """A query of Grafana's PostgreSQL data source, which the SDK does not know. `time_series` wants a column `time`."""

    def __init__(self, sql: str, *, time_series: bool = False) -> None:
        self._sql = sql
        self._format = "time_series" if time_series else "table"

    def build(self) -> SqlQuery:
        """Itself: there is nothing to add."""
        return self

    def to_json(self) -> dict[str, object]:
        """The target as Grafana stores it."""
        return {"datasource": SQL, "editorMode": "code", "format": self._format, "rawQuery": True, "rawSql": self._sql, "refId": "A"}


def number(title: str, expr: str, unit: str, text: str, *, steps: Steps = ALWAYS_GREEN, width: int = 4) -> stat.Panel:
    """One number with its recent course behind it."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(PROMETHEUS).span(width).height(5)
    panel.thresholds(_thresholds(steps)).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_target(expr, title, 0))


def lines(
    title: str, queries: Sequence[Query], unit: str, text: str, *, width: int = 8, stacked: bool = False, low: float | None = 0.0
) -> timeseries.Panel:
    """Curves over time."""
    panel = _curves(title, unit, text, width, stacked, low).datasource(PROMETHEUS)
    for index, (expr, legend) in enumerate(queries):
        panel.with_target(_target(expr, legend, index))
    return panel


def heat(title: str, name: str, unit: str, text: str, *, width: int = 8) -> heatmap.Panel:
    """A histogram's buckets over time, with exemplars."""
    panel = heatmap.Panel().title(title).description(text).datasource(PROMETHEUS).span(width).height(8).calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit(unit))
    panel.color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Turbo").exponent(0.5).steps(64))
    target = _target(rate(f"{name}_bucket", "le"), "{{le}}", 0)
    return panel.with_target(target.format(prometheus_models.PromQueryFormat.HEATMAP).exemplar(True))


def sql_number(title: str, sql: str, unit: str, text: str, *, width: int = 4) -> stat.Panel:
    """One number out of SQL."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(SQL).span(width).height(5).graph_mode(_NO_GRAPH)
    panel.thresholds(_thresholds(ALWAYS_GREEN)).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(SqlQuery(sql))


def sql_lines(title: str, sql: str, unit: str, text: str, *, width: int = 12, stacked: bool = True) -> timeseries.Panel:
    """Curves out of SQL: columns `time`, `metric` (the curve's name) and one value."""
    return _curves(title, unit, text, width, stacked, 0.0).datasource(SQL).with_target(SqlQuery(sql, time_series=True))


def sql_table(title: str, sql: str, text: str, *, width: int = 24, units: dict[str, str] | None = None) -> table.Panel:
    """Rows out of SQL; `units` by column name."""
    panel = table.Panel().title(title).description(text).datasource(SQL).span(width).height(9).show_header(True)
    for column, unit in (units or {}).items():
        panel.override_by_name(column, [models.DynamicConfigValue("unit", unit)])
    return panel.with_target(SqlQuery(sql))


_NO_GRAPH = common_models.BigValueGraphMode.NONE


def _curves(title: str, unit: str, text: str, width: int, stacked: bool, low: float | None) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).description(text).unit(unit).span(width).height(8)
    panel.line_width(1).fill_opacity(30 if stacked else 8).show_points(common_models.VisibilityMode.NEVER)
    if low is not None:
        panel.min(low)
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    return panel


def _target(expr: str, legend: str, index: int) -> Any:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + index)).datasource(PROMETHEUS)


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps([models.Threshold(value, colour) for value, colour in steps])
