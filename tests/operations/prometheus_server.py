"""A real Prometheus that scrapes one server, with our rules."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml


class PrometheusServer:
    """Started with `running_prometheus`; asked through its HTTP API."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    def get(self, path: str, **parameters: object) -> Any:
        """`data` of an API answer. Raises AssertionError with Prometheus' own words where it answers with an error."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector of `expr` now."""
        result: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return result

    def value(self, expr: str) -> float:
        """The only value of `expr` now; 0 where there is none."""
        found = self.query(expr)
        assert len(found) <= 1, (expr, found)
        return float(found[0]["value"][1]) if found else 0.0

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of `expr`, each with its `metric` and `values`."""
        result: list[dict[str, Any]] = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return result

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> None:
        """Poll `condition` five times a second."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self._log.read_text()[-3000:]}"
            time.sleep(0.2)


@contextmanager
def running_prometheus(folder: Path, target: str, rules: str, *, interval_seconds: float = 1.0, credentials: str = "") -> Iterator[PrometheusServer]:
    """A Prometheus for the length of the block; the test is skipped where there is none to start.

    `target` is host:port; `rules` the text of a rule file; `credentials` the scraper's key. Scrapes and rules run every `interval_seconds`.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    interval = f"{round(interval_seconds * 1000)}ms"
    scrape: dict[str, Any] = {"job_name": "appliance", "static_configs": [{"targets": [target]}]}
    if credentials:
        scrape["authorization"] = {"credentials": credentials}
    config = {"global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}, "rule_files": ["rules.yml"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config | {"scrape_configs": [scrape]}))
    (folder / "rules.yml").write_text(rules)
    log = folder / "log"
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--enable-feature=exemplar-storage"], cwd=folder, stdout=output, stderr=output)
    try:
        server = PrometheusServer(f"http://{address}", process, log)
        server.wait(lambda: _is_ready(server.url), "Prometheus is ready", 90)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
