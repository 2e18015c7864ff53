"""Dashboards and alerts: current, read only what the catalogue declares, leave no family out, and accepted and exercised by promtool."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from appliance.metrics.catalogue import CATALOGUE
from appliance.metrics.labels import DIRECTIONS, ENGINE_STATES, OUTCOMES, THROTTLE_REASONS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dashboards"
NOT_CHARTED = {
    "appliance_build_info": "read by the variables",
    "appliance_engine_info": "facts, not a course",
    "appliance_gpu_info": "facts, not a course",
}
FAMILIES = {metric.name: metric for metric in CATALOGUE}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """dashboards/build.py as a module. Skips where the dashboards' library is not installed."""
    pytest.importorskip("grafana_foundation_sdk")
    spec = importlib.util.spec_from_file_location("dashboards_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    """The committed dashboard."""
    loaded: dict[str, Any] = json.loads((FOLDER / "appliance-overview.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    """Every rule of alerts.yml."""
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def test_the_committed_dashboard_is_current(build: ModuleType) -> None:
    """`python dashboards/build.py` would change nothing."""
    assert (FOLDER / "appliance-overview.json").read_text() == build.build()


def test_the_dashboard_can_be_provisioned_anywhere(build: ModuleType, board: dict[str, Any]) -> None:
    """Fixed uid, no fixed data source, unique panel ids, the SLO row first, nothing overlapping."""
    assert board["uid"] == "appliance-overview"
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "model", "instance"]
    panels = board["panels"]
    assert panels[0]["type"] == "row"
    assert panels[0]["title"] == "Service level"
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert sum(panel["type"] == "heatmap" for panel in panels) >= 3


def test_every_query_of_the_dashboard_is_narrowed_and_follows_the_zoom(build: ModuleType, board: dict[str, Any]) -> None:
    """All series are of the chosen instances, and rates use Grafana's own interval (or one that the panel's title names)."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            for selector in re.findall(r"appliance_[a-z0-9_]+(\{[^}]*\})?", expr):
                assert 'instance=~"$instance"' in selector, expr
            assert set(re.findall(r"\[([^\]]+)\]", expr)) <= {"$__rate_interval", "$__range", "1h"}, expr


def test_dashboards_and_alerts_read_only_what_is_exported(build: ModuleType, board: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    """Every name is in the catalogue, every label belongs to its family."""
    texts = build.expressions(board) + [rule["expr"] for rule in rules] + (FOLDER / "alerts_test.yml").read_text().splitlines()
    for text in texts:
        assert build.metric_names(text) <= FAMILIES.keys(), text
        for name, matchers in re.findall(r"(appliance_[a-z0-9_]+)\{([^}]*)\}", text):
            metric = FAMILIES[build.metric_names(name).pop()]
            labels = set(re.findall(r"(\w+)=", matchers)) - {"instance", "job"}
            assert labels <= set(metric.labels), text


def test_label_values_in_alerts_exist(rules: list[dict[str, Any]]) -> None:
    """A misspelt outcome or state would never fire."""
    known = {"outcome": OUTCOMES, "state": set(ENGINE_STATES), "reason": set(THROTTLE_REASONS), "direction": DIRECTIONS}
    seen = 0
    for rule in rules:
        for label, values in re.findall(r'(outcome|state|reason|direction)=~?"([^"]+)"', rule["expr"]):
            assert set(values.split("|")) <= known[label], rule
            seen += 1
    assert seen >= 3


def test_every_family_is_charted_or_waived(build: ModuleType, board: dict[str, Any]) -> None:
    """What is exported is seen somewhere."""
    charted: set[str] = set()
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            charted |= build.metric_names(target["expr"])
    assert FAMILIES.keys() - charted == NOT_CHARTED.keys()


def test_rates_are_of_counters_and_quantiles_of_histograms(build: ModuleType, board: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    """A rate over a gauge is nonsense that Prometheus computes without a word."""
    for text in build.expressions(board) + [rule["expr"] for rule in rules]:
        for name in re.findall(r"(?:rate|increase)\((appliance_[a-z0-9_]+)", text):
            metric = FAMILIES[build.metric_names(name).pop()]
            assert metric.kind == ("histogram" if re.search(r"_(bucket|sum|count)$", name) else "counter"), text


def test_every_alert_has_a_runbook(rules: list[dict[str, Any]]) -> None:
    """It exists, names the alert, and says what to look at and what to do."""
    alerts = [rule for rule in rules if "alert" in rule]
    assert len(alerts) >= 15
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description", "runbook_url"} <= rule["annotations"].keys()
        text = (ROOT / rule["annotations"]["runbook_url"]).read_text()
        assert rule["alert"] in text
        assert "## Look" in text
        assert "## Do" in text


def test_no_burn_alert_is_out_of_reach(rules: list[dict[str, Any]]) -> None:
    """At any target the threshold lies under 100 % of errors: the factors are capped."""
    burns = [rule for rule in rules if rule.get("alert", "").startswith("ApplianceSloBurn")]
    assert len(burns) == 4
    for rule in burns:
        found = re.search(r"clamp_max\(([\d.]+) \* \(1 - appliance_slo_target_ratio\), ([\d.]+)\)", rule["expr"])
        factor, cap = (float(found[1]), float(found[2])) if found else (1.0, 1.0)
        for target in (0.5, 0.8, 0.9, 0.99, 0.999):
            assert min(factor * (1 - target), cap) < 1.0


def test_every_alert_is_exercised(rules: list[dict[str, Any]]) -> None:
    """The promtool tests make each of them fire at least once."""
    fired = set()
    for name in ("alerts_test.yml", "alerts_slo_test.yml"):
        for case in yaml.safe_load((FOLDER / name).read_text())["tests"]:
            fired |= {check["alertname"] for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert {rule["alert"] for rule in rules if "alert" in rule} == fired


def test_recorded_names_that_are_read_are_recorded(rules: list[dict[str, Any]]) -> None:
    """An alert on a series that nobody records would be silent."""
    recorded = {rule["record"] for rule in rules if "record" in rule}
    read = {name for rule in rules for name in re.findall(r"appliance:[a-z_]+:[a-z0-9_]+", rule["expr"])}
    assert read <= recorded


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("test", "rules", "alerts_slo_test.yml")]
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    """The rules are valid, and fire and stay quiet as the test files say."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_every_panel_s_query(build: ModuleType, board: dict[str, Any], tmp_path: Path) -> None:
    """Each query, its variables filled in, is valid PromQL."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    queries = [expr for expr in build.expressions(board) if not expr.startswith("label_values(")]
    filled = [q.replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$instance", ".*").replace("$model", ".*") for q in queries]
    records = [{"record": f"panel:query:{index}".replace("-", "_"), "expr": expr} for index, expr in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
