"""The dashboards: current, provisionable anywhere, reading only what the catalogue declares and leaving no family out; accepted by promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from board_queries import FOLDER, ROOT, boards, fill_promql, metric_names, promql, rules, targets

from appliance.metrics.catalogue import CATALOGUE

FAMILIES = {metric.name: metric for metric in CATALOGUE}
UIDS = {f"appliance-{name}" for name in ("slo", "latency", "engine", "gpu", "tenants", "scaling", "machine")}


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """dashboards/ importable, as it is for `python dashboards/build.py`. Skips where the dashboards' library is not installed."""
    pytest.importorskip("grafana_foundation_sdk")
    monkeypatch.syspath_prepend(str(FOLDER))


def _module(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def test_the_committed_dashboards_are_current(sources: None) -> None:
    """`python dashboards/build.py` would change nothing, and finds what is stale."""
    done = subprocess.run([sys.executable, str(FOLDER / "build.py"), "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_stale_files_are_found_and_mended(sources: None, tmp_path: Path) -> None:
    """A changed file and one that no board makes are named by --check, and put right without it."""
    shutil.copytree(FOLDER, tmp_path / "dashboards", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "dashboards"
    (copy / "json" / "old.json").write_text("{}")
    changed = copy / "json" / "appliance-slo.json"
    changed.write_text(changed.read_text().replace("Goodput", "Badput"))
    command = [sys.executable, str(copy / "build.py")]
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 1
    assert checked.stdout.split() == ["stale:", "appliance-slo.json", "old.json"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    assert changed.read_text() == (FOLDER / "json" / "appliance-slo.json").read_text()
    assert not (copy / "json" / "old.json").exists()


@pytest.mark.parametrize("uid", sorted(UIDS))
def test_a_dashboard_can_be_provisioned_anywhere(uid: str) -> None:
    """Fixed uid, file named for it, no fixed data source, unique panel ids, rows that hold panels, nothing overlapping, every panel explained."""
    board = boards()[uid]
    assert (FOLDER / "json" / f"{uid}.json").is_file()
    assert "appliance" in board["tags"]
    panels = board["panels"]
    assert panels[0]["type"] == "row"
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["datasource"]["uid"] in ("${datasource}", "${sql}")
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {panel["datasource"]["uid"]}


def test_the_boards_are_those_that_are_promised() -> None:
    """One a subject, the service level first on the first; heatmaps for latency; decisions as annotations with and without SQL."""
    assert boards().keys() == UIDS
    assert boards()["appliance-slo"]["panels"][0]["title"] == "Service level"
    assert sum(panel["type"] == "heatmap" for panel in boards()["appliance-latency"]["panels"]) >= 6
    for uid, board in boards().items():
        variables = [variable["name"] for variable in board["templating"]["list"]]
        annotations = {a["name"]: a for a in board["annotations"]["list"]}
        if uid == "appliance-tenants":
            assert variables[0] == "sql"
        else:
            assert variables[:3] == ["datasource", "model", "instance"]
            assert "Scale decisions" in annotations
        if uid in ("appliance-tenants", "appliance-scaling"):
            assert "reason" in annotations["Scale decisions with their reasons"]["target"]["rawSql"]


def test_the_guide_lists_every_board() -> None:
    """docs/grafana.md has each by its title and uid, and no other."""
    table = re.findall(r"^\| ([a-z A-Z]+) \| `(appliance-\w+)` \|", (ROOT / "docs" / "grafana.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted((board["title"].removeprefix("Appliance: "), uid) for uid, board in boards().items())


def test_every_query_is_narrowed_and_follows_the_zoom() -> None:
    """All series are of the chosen instances, and rates use Grafana's own interval (or one that the panel's title or legend names)."""
    for target in promql("panel", "annotation"):
        expr = target.text
        for selector in re.findall(r"appliance[_:][a-z0-9_:]+(\{[^}]*\})?", expr):
            assert 'instance=~"$instance"' in selector, expr
        windows = set(re.findall(r"\[([^\]]+)\]", expr)) - {"$__rate_interval", "$__range"}
        assert windows <= {"1h", "30d"}, target
        for window in windows:
            assert window.replace("h", " h").replace("d", " d") in target.title, target


def test_dashboards_and_alerts_read_only_what_is_exported() -> None:
    """Every name is in the catalogue, every label belongs to its family, every recorded series is recorded."""
    tests = [line for name in ("alerts_test.yml", "alerts_slo_test.yml") for line in (FOLDER / name).read_text().splitlines()]
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    texts = [target.text for target in targets() if target.source == "prometheus"]
    for text in texts + [rule["expr"] for rule in rules()] + tests:
        assert metric_names(text) <= FAMILIES.keys(), text
        assert set(re.findall(r"appliance:[a-z_]+:[a-z0-9_]+", text)) <= recorded, text
        for name, matchers in re.findall(r"(appliance_[a-z0-9_]+)\{([^}]*)\}", text):
            metric = FAMILIES[metric_names(name).pop()]
            assert set(re.findall(r"(\w+)=", matchers)) - {"instance", "job", "le"} <= set(metric.labels), text
        for by, inner in re.findall(r"sum by \(([\w, ]+)\) \((?:rate|increase)?\(?(appliance_[a-z0-9_]+)", text):
            metric = FAMILIES[metric_names(inner).pop()]
            assert set(by.split(", ")) <= {*metric.labels, "instance", "job", "le"}, text


def test_every_family_is_charted_or_waived(sources: None) -> None:
    """What is exported is seen on some panel, or the table says why not; no waiver is idle."""
    waived: dict[str, str] = _module("boards.coverage").NOT_CHARTED
    charted = {name for target in promql("panel") for name in metric_names(target.text)}
    assert FAMILIES.keys() - charted == waived.keys()
    assert all(len(reason) > 20 for reason in waived.values())


def test_every_recorded_series_is_read() -> None:
    """A recording rule that no panel, alert or other rule reads costs for nothing."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    texts = [target.text for target in promql()] + [rule["expr"] for rule in rules()]
    assert recorded == {name for text in texts for name in re.findall(r"appliance:[a-z_]+:[a-z0-9_]+", text)}


def test_rates_are_of_counters_and_quantiles_of_histograms() -> None:
    """A rate over a gauge is nonsense that Prometheus computes without a word."""
    for text in [target.text for target in promql()] + [rule["expr"] for rule in rules()]:
        for name in re.findall(r"(?:rate|increase)\((appliance_[a-z0-9_]+)", text):
            metric = FAMILIES[metric_names(name).pop()]
            assert metric.kind == ("histogram" if re.search(r"_(bucket|sum|count)$", name) else "counter"), text
        for name in re.findall(r"(?:max|min)(?: by \([^)]*\))? \((appliance_[a-z0-9_]+)", text):
            assert FAMILIES[name].kind == "gauge", text


def test_promtool_accepts_every_query(tmp_path: Path) -> None:
    """Each query of panels and annotations, its variables filled in, is valid PromQL."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    filled = [fill_promql(target.text, rate_interval="5m", range_="1h") for target in promql()]
    records = [{"record": f"panel:query:{index}", "expr": expr} for index, expr in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_that_the_runbooks_name_exist() -> None:
    """*Panel title* in a runbook is a board, or a panel or a row of one."""
    titles = {board["title"] for board in boards().values()} | {panel["title"] for board in boards().values() for panel in board["panels"]}
    for path in sorted((ROOT / "docs" / "runbooks").glob("*.md")):
        named = set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", path.read_text()))
        assert named <= titles, (path.name, named - titles)
