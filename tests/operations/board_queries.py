"""The queries of the committed dashboards and rules, with Grafana's variables and macros filled in as Grafana would."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dashboards"


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel, a variable or an annotation."""

    board: str
    title: str
    kind: str  # panel, variable or annotation
    source: str  # the data source's type
    text: str  # PromQL or SQL, unfilled
    panel_type: str = ""
    time_series: bool = False  # SQL that must have a column `time`

    def __str__(self) -> str:
        return f"{self.board}: {self.title}: {self.text}"


@cache
def boards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by uid."""
    loaded = [json.loads(path.read_text()) for path in sorted((FOLDER / "json").glob("*.json"))]
    return {board["uid"]: board for board in loaded}


@cache
def rules() -> tuple[dict[str, Any], ...]:
    """Every rule of alerts.yml, recording and alerting."""
    return tuple(rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"])


def targets() -> Iterator[Target]:
    """Every query of every dashboard."""
    for uid, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                text = target["expr"] if "expr" in target else target["rawSql"]
                source = target["datasource"]["type"]
                yield Target(uid, panel["title"], "panel", source, text, panel["type"], target.get("format") == "time_series" and "rawSql" in target)
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield Target(uid, variable["name"], "variable", variable["datasource"]["type"], variable["query"])
        for annotation in board["annotations"]["list"]:
            text = annotation["expr"] if "expr" in annotation else annotation["target"]["rawSql"]
            yield Target(uid, annotation["name"], "annotation", annotation["datasource"]["type"], text)


def promql(*kinds: str) -> list[Target]:
    """The PromQL of these kinds (all, if none is named), each once; label_values(...) of variables is no PromQL."""
    return [t for t in targets() if t.source == "prometheus" and (not kinds or t.kind in kinds) and not t.text.startswith("label_values(")]


def sql() -> list[Target]:
    """Every query of the PostgreSQL data source."""
    return [t for t in targets() if t.source == "grafana-postgresql-datasource"]


def fill_promql(expr: str, *, rate_interval: str, range_: str, instance: str = ".+", model: str = ".+") -> str:
    """`expr` with Grafana's variables replaced. Raises AssertionError where one is left."""
    known = {"$__rate_interval": rate_interval, "$__range": range_, "$instance": instance, "$model": model}
    for name, value in known.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def fill_sql(text: str, *, since: float, until: float, interval_seconds: float, choices: dict[str, list[str]], texts: dict[str, str]) -> str:
    """`text` with Grafana's macros and variables replaced, by the rules of its PostgreSQL data source. Raises AssertionError where one is left."""

    def group(match: re.Match[str]) -> str:
        assert match[2] == "$__interval", match[0]
        return f"floor(({match[1]})/{interval_seconds:g})*{interval_seconds:g}"

    def quoted(match: re.Match[str]) -> str:
        values = choices[match[1]] if match[1] in choices else [texts[match[1]]]
        return ",".join("'" + value.replace("'", "''") + "'" for value in values)

    text = re.sub(r"\$__unixEpochGroup\(([^,]+), ([^)]+)\)", group, text)
    text = re.sub(r"\$__unixEpochFilter\(([^)]+)\)", rf"\1 >= {int(since)} AND \1 <= {int(until)}", text)
    text = text.replace("$__unixEpochFrom()", str(int(since))).replace("$__unixEpochTo()", str(int(until)))
    text = re.sub(r"\$\{(\w+):sqlstring\}", quoted, text)
    assert "$" not in text, text
    return text


def metric_names(expr: str) -> set[str]:
    """Families that `expr` reads: every appliance_... name, histogram suffixes taken off."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"(?<![\w:])appliance_[a-z0-9_]+", expr)}


def comparisons_stripped(expr: str) -> list[str]:
    """What an alert's expression compares, without the comparing: the operands of its and/or/unless, both sides of each comparison.

    Numbers are left out; absent(x) becomes x.
    """
    parts = _split(expr, r"\b(?:and|unless)\b(?:\s+(?:on|ignoring)\s*\([^)]*\))?")
    if len(parts) > 1:
        return [found for part in parts for found in comparisons_stripped(part)]
    bare = _unwrapped(expr.strip())
    if bare != expr.strip():
        return comparisons_stripped(bare)
    sides = _split(bare, r"(?:==|!=|>=|<=|>|<)(?:\s*bool)?(?:\s+(?:on|ignoring)\s*\([^)]*\))?(?:\s+group_(?:left|right)\s*\([^)]*\))?")
    found = [side.strip() for side in sides if not re.fullmatch(r"[-+.\de]+", side.strip())]
    return [re.sub(r"^absent\((.*)\)$", r"\1", side) for side in found]


def as_bool(expr: str) -> str:
    """`expr` with every comparison made to answer 0 or 1 instead of filtering: it has data exactly where its sides match each other."""
    return "".join(
        piece if piece.startswith(("{", '"')) else re.sub(r"(==|!=|>=|<=|>|<)(?!\s*bool)", r"\1 bool ", piece)
        for piece in re.split(r"(\{[^}]*\}|\"[^\"]*\")", expr)
    )


def _split(expr: str, separator: str) -> list[str]:
    """`expr` cut at `separator` where no bracket or quote is open."""
    pattern, parts, depth, begin, at = re.compile(separator), [], 0, 0, 0
    while at < len(expr):
        if expr[at] == '"':
            at = expr.index('"', at + 1) + 1
            continue
        depth += (expr[at] in "({[") - (expr[at] in ")}]")
        if depth == 0 and (match := pattern.match(expr, at)):
            parts.append(expr[begin:at])
            begin = at = match.end()
        else:
            at += 1
    return [*parts, expr[begin:]]


def _unwrapped(expr: str) -> str:
    """`expr` without brackets around all of it."""
    if not (expr.startswith("(") and expr.endswith(")")):
        return expr
    depth = 0
    for at, character in enumerate(expr):
        depth += (character == "(") - (character == ")")
        if depth == 0 and at < len(expr) - 1:
            return expr
    return expr[1:-1].strip()
