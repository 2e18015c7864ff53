"""The provisioning files and the compose file fit the dashboards, the rules, the settings and each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from board_queries import FOLDER, ROOT, boards, rules


def _load(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / path).read_text())
    return loaded


COMPOSE = _load("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = dict.fromkeys(("APPLIANCE_API_KEY", "POSTGRES_PASSWORD", "GRAFANA_SQL_PASSWORD", "GRAFANA_ADMIN_PASSWORD"), "0123abcd")


def _environment(service: str) -> dict[str, str]:
    """The service's environment with secrets filled in as compose would."""
    filled = {
        name: re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda m: SECRETS[m[1]], str(value)) for name, value in SERVICES[service]["environment"].items()
    }
    assert not any("$" in value for value in filled.values())
    return filled


def test_data_sources_are_those_that_the_boards_ask_for() -> None:
    """One of each type that a board's variables choose from; none is written to; their variables are in Grafana's environment."""
    text = (FOLDER / "provisioning/datasources/appliance.yaml").read_text()
    sources = yaml.safe_load(text)["datasources"]
    asked = {v["query"] for board in boards().values() for v in board["templating"]["list"] if v["type"] == "datasource"}
    assert {source["type"] for source in sources} == asked == {"prometheus", "grafana-postgresql-datasource"}
    assert len({source["uid"] for source in sources}) == len(sources)
    assert [source["isDefault"] for source in sources if "isDefault" in source] == [True]
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= _environment("grafana").keys()
    prometheus, sql = sorted(sources, key=lambda source: source["type"] != "prometheus")
    (exemplar,) = prometheus["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplar["name"] == "request_id", "the label of our exemplars"
    assert "#requests/$${__value.raw}" in exemplar["url"], "the console's address of one request; $$ is a dollar that Grafana leaves alone"
    assert "requests.find(" in (ROOT / "appliance/console/static/main.js").read_text()
    assert (sql["user"], sql["jsonData"]["database"]) == ("grafana", _environment("postgres")["POSTGRES_DB"])
    role = (FOLDER / "postgres/grafana-role.sh").read_text()
    assert "CREATE ROLE grafana LOGIN" in role
    assert os.access(FOLDER / "postgres/grafana-role.sh", os.X_OK)


def test_the_rate_interval_is_made_from_the_scrape_interval() -> None:
    """Grafana makes $__rate_interval from the data source's interval: a wrong one leaves rates without data."""
    (prometheus,) = (s for s in _load("provisioning/datasources/appliance.yaml")["datasources"] if s["type"] == "prometheus")
    assert prometheus["jsonData"]["timeInterval"] == _load("prometheus.yml")["global"]["scrape_interval"]


def test_boards_lie_where_the_provider_looks() -> None:
    """The folder of json/ in Grafana's container is the provider's, and the home board is in it."""
    (provider,) = _load("provisioning/dashboards/appliance.yaml")["providers"]
    path = provider["options"]["path"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./json"] == path
    assert (mounts["./provisioning/datasources"], mounts["./provisioning/dashboards"]) == (
        "/etc/grafana/provisioning/datasources",
        "/etc/grafana/provisioning/dashboards",
    )
    home = _environment("grafana")["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(path + "/").removesuffix(".json") in boards()


def test_the_compose_file_is_whole() -> None:
    """Mounted files exist, named volumes and secrets are declared, services depend on services, ports are on loopback, images have a version."""
    assert SERVICES.keys() == {"appliance", "postgres", "prometheus", "grafana"}
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
        assert set(service.get("depends_on", [])) <= SERVICES.keys()
        for needed, condition in service["depends_on"].items() if isinstance(service.get("depends_on"), dict) else ():
            assert condition["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[needed]
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        if "build" in service:
            assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+", service["image"]), name
    used = {name for service in SERVICES for name in re.findall(r"\$\{(\w+)", str(SERVICES[service]))}
    used |= {secret["environment"] for secret in COMPOSE["secrets"].values()}
    lines = (FOLDER / "env.example").read_text().splitlines()
    assert {line.rstrip("=") for line in lines if not line.startswith("#")} == used == SECRETS.keys(), "env.example says what to set, and no value"
    assert ".env" in (FOLDER / ".gitignore").read_text().split()


def test_the_appliance_accepts_its_environment(tmp_path: Path) -> None:
    """The settings that the compose file gives are ours and fit together: `appliance config --check` finds nothing."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "STATE_DIRECTORY": str(tmp_path), **_environment("appliance")}
    command = [str(Path(sys.executable).with_name("appliance")), "config", "--check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = subprocess.run(
        command, cwd=tmp_path, env={**environment, "APPLIANCE_STORE__URL": "mysql://x"}, capture_output=True, timeout=60, check=False
    )
    assert refused.returncode == 2


def test_the_image_has_what_it_copies_and_the_database_driver() -> None:
    """Each COPY is a path of the repository, and they are those that the wheel is built from; PostgreSQL's driver is installed."""
    text = (FOLDER / "Dockerfile").read_text()
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "appliance", "kernels", "alembic", "dashboards"} <= set(copied)
    assert "'.[postgresql]'" in text
    assert re.search(r"^USER appliance$", text, re.MULTILINE)


def test_prometheus_is_configured_for_the_alerts(tmp_path: Path) -> None:
    """The job has the name that the alerts use, its target is the service, the rules are mounted beside the file; promtool accepts all."""
    config = _load("prometheus.yml")
    (job,) = config["scrape_configs"]
    named = {name for rule in rules() for name in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert named <= {job["job_name"]}
    assert job["static_configs"][0]["targets"] == ["appliance:" + SERVICES["appliance"]["ports"][0].split(":")[-1]]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert [str(Path(mounts["./prometheus.yml"]).parent / name) for name in config["rule_files"]] == [mounts["./alerts.yml"]]
    assert job["authorization"]["credentials_file"] == "/run/secrets/" + SERVICES["prometheus"]["secrets"][0]
    assert f"--config.file={mounts['./prometheus.yml']}" in SERVICES["prometheus"]["command"]
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    (tmp_path / "key").write_text("k")
    (tmp_path / "prometheus.yml").write_text((FOLDER / "prometheus.yml").read_text().replace("/run/secrets/appliance_api_key", str(tmp_path / "key")))
    done = subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
