"""What all boards share: variables, annotations, links, layout; and a board's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog import builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from boards.panels import PROMETHEUS, SQL
from boards.promql import increase

Source = Literal["prometheus", "sql", "both"]
Row = tuple[str, Sequence[Any]]  # (title, panels)

# What a decision was and why, as Grafana's annotations want it: time in seconds, a text, tags separated by commas
DECISIONS_SQL = (
    "SELECT to_timestamp(at_wall) AS time, direction || ': ' || current_replicas || ' to ' || desired_replicas || ' replicas, ' || reason AS text, "
    "instance_id || ',' || direction AS tags FROM scale_decisions WHERE $__unixEpochFilter(at_wall) ORDER BY at_wall DESC LIMIT 500"
)
# Requests of servers without keys have the key "", which Grafana would not offer as a choice
KEY = "coalesce(nullif(key_id, ''), '(no key)')"
# What the variables of the SQL boards offer: the daily rollup is the smallest table that knows every key
_KNOWN = "SELECT DISTINCT {column} FROM usage_rollup WHERE period_seconds = 86400 ORDER BY 1"


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. `uid` is what links and bookmarks hold on to: it never changes."""

    uid: str
    title: str
    text: str
    rows: Sequence[Row]
    source: Source = "prometheus"
    hours: int = 1  # shown when opened


class _Annotation(models.AnnotationQuery, builder.Builder[models.AnnotationQuery]):
    """An annotation with fields that the SDK does not know."""

    def __init__(self, name: str, source: models.DataSourceRef, colour: str, *, enable: bool, **fields: object) -> None:
        super().__init__(name=name, datasource=source, enable=enable, icon_color=colour)
        self._fields = fields

    def build(self) -> models.AnnotationQuery:
        return self

    def to_json(self) -> dict[str, object]:
        return super().to_json() | self._fields


def render(board: Board) -> str:
    """The JSON, as committed."""
    made = dashboard.Dashboard(board.title).uid(board.uid).tags(["appliance", "llm"]).timezone("browser").refresh("30s")
    made.time(f"now-{board.hours}h", "now").description(board.text).tooltip(models.DashboardCursorSync.CROSSHAIR).editable()
    link = dashboard.DashboardLink("Appliance").type(models.DashboardLinkType.DASHBOARDS).tags(["appliance"])
    made.link(link.as_dropdown(False).include_vars(True).keep_time(True))
    _variables(made, board.source)
    _annotations(made, board.source)
    for title, panels in board.rows:
        made.with_row(dashboard.Row(title))
        for panel in panels:
            made.with_panel(panel)
    result = made.build()
    panels = list(result.panels or [])
    for index, panel in enumerate(panels, start=1):
        panel.id_val = index
    _lay_out(panels)
    return JSONEncoder(sort_keys=True, indent=2).encode(result) + "\n"


def _lay_out(panels: Sequence[Any]) -> None:
    """Place panels from left to right in lines of 24 columns, each row's title on a line of its own; the last of a line takes what is left of it."""
    y = height = 0
    line: list[models.GridPos] = []
    for panel in panels:
        place = panel.grid_pos or models.GridPos(h=1, w=24)
        is_title = isinstance(panel, models.RowPanel)
        if line and (is_title or sum(before.w for before in line) + place.w > 24):
            line[-1].w += 24 - sum(before.w for before in line)
            y, height, line = y + height, 0, []
        place.x, place.y = sum(before.w for before in line), y
        panel.grid_pos = place
        line.append(place)
        height = max(height, place.h)
    if line:
        line[-1].w += 24 - sum(before.w for before in line)


def _variables(made: dashboard.Dashboard, source: Source) -> None:
    if source != "sql":
        made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        made.with_variable(_choice("model", "Model", "label_values(appliance_build_info, model)", PROMETHEUS))
        made.with_variable(_choice("instance", "Instance", 'label_values(appliance_build_info{model=~"$model"}, instance)', PROMETHEUS))
    if source != "prometheus":
        made.with_variable(dashboard.DatasourceVariable("sql").label("PostgreSQL").type("grafana-postgresql-datasource"))
    if source == "sql":
        for name, label, column in (("fleet", "Fleet", "fleet"), ("served", "Model", "model"), ("key", "Key", KEY)):
            made.with_variable(_choice(name, label, _KNOWN.format(column=column), SQL))
        for name, label, price in (
            ("prompt_price", "Price of a million prompt tokens", "0.10"),
            ("cached_price", "of a million cached ones", "0.10"),
            ("output_price", "of a million output tokens", "0.40"),
        ):
            made.with_variable(dashboard.TextBoxVariable(name).label(label).default_value(price))


def _choice(name: str, label: str, query: str, source: models.DataSourceRef) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).datasource(source).query(query).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    everything = models.VariableOption(True, ["All"], ["$__all"])
    return variable.multi(True).include_all(True).current(everything).sort(models.VariableSort.ALPHABETICAL_ASC)


def _annotations(made: dashboard.Dashboard, source: Source) -> None:
    if source != "sql":
        for name, colour, counter, label in (
            ("Scale decisions", "blue", "scaling_decisions_total", "direction"),
            ("Engine restarts", "red", "engine_restarts_total", "instance"),
        ):
            expr = f"{increase(counter, f'{label}')} > 0"
            made.annotation(_Annotation(name, PROMETHEUS, colour, enable=True, expr=expr, titleFormat=name, textFormat=f"{{{{{label}}}}}"))
    if source != "prometheus":
        # A toggle at the top of the board that needs no PostgreSQL otherwise: a missing data source would complain at each load.
        target = {"editorMode": "code", "format": "table", "rawQuery": True, "rawSql": DECISIONS_SQL, "refId": "Anno"}
        made.annotation(_Annotation("Scale decisions with their reasons", SQL, "purple", enable=source == "sql", target=target))
