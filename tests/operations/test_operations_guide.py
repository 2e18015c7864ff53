"""docs/operations.md: its code works, its files exist, its names are ours."""

from __future__ import annotations

import base64
import re
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance.clock import SystemClock
from appliance.events import ScaleDecision
from appliance.scaling.webhook import Signer, cloud_event
from appliance.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text()
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


def test_the_receiver_of_the_guide_verifies_our_signals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The ten lines as printed accept a signal and refuse a tampered one."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(code, names)  # noqa: S102 (the guide's own code is what is tested)
    server = HTTPServer(("127.0.0.1", 0), type("Quiet", (names["Receiver"],), {"log_message": lambda *_: None}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        wall = SystemClock().wall()
        decision = ScaleDecision(
            id="01900000-0000-7000-8000-000000000001",
            sequence=1,
            at_wall=wall,
            expires_wall=wall + 300,
            instance_id="node",
            fleet="f",
            direction="up",
            current_replicas=1,
            desired_replicas=2,
            reason="the queue is old",
            inputs={},
        )
        body = cloud_event(decision)
        headers = Signer(SECRET).headers("id", wall, body)
        url = f"http://127.0.0.1:{server.server_port}/"
        with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=10) as answer:
            assert answer.status == 204
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(urllib.request.Request(url, body.replace('": 2', '": 9').encode(), headers), timeout=10)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "appliance.scale.up 2 the queue is old" in capsys.readouterr().out


def test_what_the_guide_names_exists() -> None:
    """Files, settings and routes."""
    for path in re.findall(r"(?:systemd|dashboards|docs)/[\w.-]+\.\w+", GUIDE):
        assert (ROOT / path).is_file(), path
    settings = Settings().model_dump()
    for section, key in re.findall(r"`(scaling|server|store|metrics)\.(\w+)`", GUIDE):
        assert key in settings[section], key
    source = (ROOT / "appliance" / "scaling" / "endpoint.py").read_text()
    for route in set(re.findall(r"(/v1/scale[\w/]*)", GUIDE)):
        assert f'"{route}' in source or f"{route}{{" in source, route
    for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL):
        assert yaml.safe_load(block)["scrape_configs"]


def test_the_backup_command_copies_a_live_database(tmp_path: Path) -> None:
    """The command as printed, on another folder, while a writer has the database open."""
    (command,) = re.findall(r"python3? -c '(import sqlite3.*?)'\n", GUIDE)
    live = sqlite3.connect(tmp_path / "appliance.db")
    live.execute("PRAGMA journal_mode = WAL")
    live.execute("CREATE TABLE t (x)")
    live.execute("INSERT INTO t VALUES (1)")
    live.commit()
    subprocess.run([sys.executable, "-c", command.replace("/var/lib/appliance", str(tmp_path))], check=True, timeout=30)
    copy = sqlite3.connect(tmp_path / "backup.db")
    assert copy.execute("SELECT x FROM t").fetchall() == [(1,)]
    copy.close()
    live.close()
