"""A wheel built from the tree serves from an empty folder, in an environment that has never seen the checkout."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest
from appliance_server import ApplianceServer, clean_environment, prepare_state

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
NO_PATH = {"PYTHONPATH": ""}


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=clean_environment() | NO_PATH, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; what it stands on comes from this one's packages, the editable checkout does not."""
    source = tmp_path_factory.mktemp("source")
    for name in ("appliance", "kernels", "alembic", "dashboards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--wheel", "--outdir", str(source / "dist"), cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    venv = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", str(venv), cwd=venv)
    _run(sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--no-deps", "--no-index", "-q", str(wheel), cwd=venv)
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # a plain path: .pth files in it are not read
    return venv


def test_the_wheel_serves_from_an_empty_folder(environment: Path, embedded_model: Path, shared_state: Path, tmp_path: Path) -> None:
    """It migrates its database, loads the embedded model, answers, and leaves with 0; every module comes from the wheel."""
    where = "import appliance, appliance.kernels; print(appliance.__file__); print(appliance.kernels.__file__)"
    for line in _run(str(environment / "bin/python"), "-P", "-c", where, cwd=tmp_path).split():
        assert line.startswith(str(environment)), line
    state = tmp_path / "state"
    prepare_state(state, shared_state)
    server = ApplianceServer(state, {"model.context_length": 512}, NO_PATH, command=str(environment / "bin/appliance"))
    try:
        server.wait_ready(120)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": 32}).encode()
        request = urllib.request.Request(server.url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            reply = json.load(response)
        assert "Paris" in reply["choices"][0]["message"]["content"]
        status, page = server.get("/")  # the console's files are in the wheel too
        assert status == 200
        for path in re.findall(r'(?:src|href)="(/console/static/[^"]+)"', page):
            assert server.status(path) == 200, path
        (row,) = server.wait_rows("select * from requests")
        assert row["num_generated_tokens"] == reply["usage"]["completion_tokens"]
    finally:
        status = server.stop()
    assert status == 0
    assert not any("Traceback" in line for line in server.output)
