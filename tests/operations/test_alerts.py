"""The alerts: each reads what exists, has a runbook, can fire and does so in a promtool test."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from board_queries import FOLDER, ROOT, as_bool, comparisons_stripped, rules

from appliance.metrics.labels import DIRECTIONS, ENGINE_STATES, OUTCOMES, THROTTLE_REASONS

ALERTS = [rule for rule in rules() if "alert" in rule]


def test_label_values_in_alerts_exist() -> None:
    """A misspelt outcome or state would never fire."""
    known = {"outcome": OUTCOMES, "state": set(ENGINE_STATES), "reason": set(THROTTLE_REASONS), "direction": DIRECTIONS}
    seen = 0
    for rule in rules():
        for label, values in re.findall(r'(outcome|state|reason|direction)=~?"([^"]+)"', rule["expr"]):
            assert set(values.split("|")) <= known[label], rule
            seen += 1
    assert seen >= 3


def test_every_alert_has_a_runbook() -> None:
    """It exists, names the alert, and says what to look at and what to do; and every runbook belongs to an alert."""
    assert len(ALERTS) >= 15
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description", "runbook_url"} <= rule["annotations"].keys()
        text = (ROOT / rule["annotations"]["runbook_url"]).read_text()
        assert rule["alert"] in text
        assert "## Look" in text
        assert "## Do" in text
    named = {rule["annotations"]["runbook_url"] for rule in ALERTS}
    assert named == {f"docs/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}


def test_the_guide_lists_every_alert() -> None:
    """docs/operations.md has each with its severity, in the order of the file, and no other."""
    table = re.findall(r"^\| `(Appliance\w+)` \| (\w+) \| .+ \|$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert table == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]


def test_no_burn_alert_is_out_of_reach() -> None:
    """At any target the threshold lies under 100 % of errors: the factors are capped."""
    burns = [rule for rule in ALERTS if rule["alert"].startswith("ApplianceSloBurn")]
    assert len(burns) == 4
    for rule in burns:
        found = re.search(r"clamp_max\(([\d.]+) \* \(1 - appliance_slo_target_ratio\), ([\d.]+)\)", rule["expr"])
        factor, cap = (float(found[1]), float(found[2])) if found else (1.0, 1.0)
        for target in (0.5, 0.8, 0.9, 0.99, 0.999):
            assert min(factor * (1 - target), cap) < 1.0


def test_every_alert_is_exercised() -> None:
    """The promtool tests make each of them fire at least once."""
    fired = set()
    for name in ("alerts_test.yml", "alerts_slo_test.yml"):
        for case in yaml.safe_load((FOLDER / name).read_text())["tests"]:
            fired |= {check["alertname"] for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert {rule["alert"] for rule in ALERTS} == fired


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("test", "rules", "alerts_slo_test.yml")]
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    """The rules are valid, and fire and stay quiet as the test files say."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_comparisons_are_taken_apart() -> None:
    """What the live tests ask of each alert: the sides of its comparisons, and the whole with comparisons that answer 0 or 1."""
    assert comparisons_stripped('a{x=~"and|>"} > 0 and on (job) (b >= on (job) group_left () clamp_max(2 * c, 0.5))') == [
        'a{x=~"and|>"}',
        "b",
        "clamp_max(2 * c, 0.5)",
    ]
    assert comparisons_stripped("absent(a)") == ["a"]
    assert as_bool('a{x=~">"} >= 1 and b == 0') == 'a{x=~">"} >= bool  1 and b == bool  0'
    for rule in ALERTS:
        parts = comparisons_stripped(rule["expr"])
        assert parts, rule
        assert not any(re.search(r"[<>]|==|!=|\band\b", re.sub(r"\{[^}]*\}", "", part)) for part in parts), parts
