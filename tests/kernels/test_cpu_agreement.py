"""The quantised path against float32 over a text: the promise of docs/benchmarks.md, by the benchmark that measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.model_files import resolve_model
from appliance.settings import default_state_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.acceptance
@pytest.mark.parametrize("architecture", ["native", "x86-64-v3"])
def test_greedy_tokens_and_perplexity_hold_at_small_and_large_steps(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 2,000 tokens, at least 97 % of greedy tokens are float32's and perplexity is within 1 %, at steps of 1 to 512 tokens."""
    monkeypatch.setenv("APPLIANCE_CPU_ARCHITECTURE", architecture)
    model = resolve_model("embedded", default_state_dir(), lambda *_: None)
    file = tmp_path / "agreement.json"
    command = [sys.executable, str(ROOT / "benchmarks/agreement.py"), "--model", model, "--json", str(file)]
    done = subprocess.run([*command, "--steps", "1,8,64,65,256,512", "--min-agreement", "0.97"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["kernels"] == "cpu"
    assert [step["step_tokens"] for step in report["steps"]] == [1, 8, 64, 65, 256, 512]
