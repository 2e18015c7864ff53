"""Whole runs against the null server: counts, bounds, files, and the client's ceiling."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.bench.load import measure_ceiling, run_level
from appliance.bench.main import run_bench
from appliance.bench.options import add_options
from appliance.bench.records import Job, Outcome
from appliance.bench.workload import request_body


@pytest.fixture(scope="module")
def null_url() -> Iterator[str]:
    """A null server's base URL."""
    process = subprocess.Popen([sys.executable, "-m", "appliance.bench.null_server"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def options(*words: str) -> argparse.Namespace:
    """Parsed flags."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def test_a_sweep_counts_what_the_server_sent(null_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every request and token of each level is in the JSON; table and plot are made."""
    file, plot = tmp_path / "r.json", tmp_path / "r.png"
    words = ["--base-url", f"{null_url}/v1/", "--concurrency", "1,3", "--num-requests", "7", "--output-len", "40", "--processes", "2", "--no-ceiling"]
    assert run_bench(options(*words, "--json", str(file), "--plot", str(plot))) == 0
    report = json.loads(file.read_text())
    assert report["model"] == "null"
    assert [level["label"] for level in report["levels"]] == ["c=1", "c=3"]
    for level in report["levels"]:
        assert (level["num_requests"], level["num_failed"], level["num_output_tokens"]) == (7, 0, 280)
        assert level["ttft"]["num_samples"] == 7
        assert level["itl"]["num_samples"] == 7 * 39
        assert 0 < level["ttft"]["p50"] <= level["ttft"]["p99"] <= level["e2e"]["max"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "output tokens/s" in capsys.readouterr().out


def test_levels_of_a_run_share_no_prompt(null_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix cache must not answer one level with what another has computed; the prefix that was asked for is all that prompts share."""
    prompts: list[list[int]] = []

    async def recorded(jobs: list[Job], on_progress: Callable[[int], None]) -> tuple[list[Outcome], float]:
        prompts.extend(json.loads(request_body(job, plan))["prompt"] for job in jobs for plan in job.plans)
        return await run_level(jobs, on_progress)

    monkeypatch.setattr("appliance.bench.main.run_level", recorded)
    words = ["--concurrency", "1,2", "--num-requests", "5", "--input-len", "12", "--prefix-len", "4", "--output-len", "2", "--warmup", "0"]
    assert run_bench(options("--base-url", null_url, *words, "--no-ceiling")) == 0
    assert len(prompts) == 10
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1
    assert len({tuple(prompt[4:]) for prompt in prompts}) == 10


def test_an_open_loop_keeps_its_rate(null_url: str, tmp_path: Path) -> None:
    """Forty requests at 40 a second take about a second: the Poisson arrivals of this seed, and not as fast as the server can."""
    file = tmp_path / "r.json"
    words = ["--base-url", null_url, "--request-rate", "40", "--num-requests", "40", "--output-len", "2", "--no-ceiling", "--json", str(file)]
    assert run_bench(options(*words)) == 0
    (level,) = json.loads(file.read_text())["levels"]
    assert level["num_requests"] == 40
    assert 0.6 < level["duration_seconds"] < 3.0
    assert level["send_lag_p99_seconds"] >= 0.0


def test_the_time_limit_holds(null_url: str, tmp_path: Path) -> None:
    """A level that would take minutes is cut at its bound; what was not sent or not finished counts as failed, with the reason."""
    file = tmp_path / "r.json"
    words = ["--base-url", null_url, "--request-rate", "1", "--num-requests", "500", "--output-len", "2", "--no-ceiling", "--max-seconds", "0.5"]
    assert run_bench(options(*words, "--json", str(file))) == 1
    (level,) = json.loads(file.read_text())["levels"]
    assert level["num_requests"] == 500
    assert level["num_failed"] >= 490
    assert "not started within the time limit" in level["errors"]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--concurrency", "1", "--request-rate", "1"], 2),
        (["--endpoint", "chat", "--prompts", "ids"], 2),
        (["--input-len", "9:3"], 2),
        (["--input-len", "20:30", "--prefix-len", "20"], 2),
        (["--prefix-len", "-1"], 2),
        (["--extra-body", "[1]"], 2),
        (["--extra-body", "{"], 2),
        (["--base-url", "ftp://x"], 2),
        (["--json", "/nowhere/figures.json"], 2),
        (["--base-url", "http://127.0.0.1:1"], 1),
    ],
)
def test_what_cannot_run_says_so(null_url: str, words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that contradict each other exit with 2, an absent server with 1; both with one line."""
    assert run_bench(options("--base-url", null_url, *words)) == status
    assert capsys.readouterr().err.startswith("bench: ")


async def test_the_ceiling_is_measured() -> None:
    """Two client processes against two null servers see events, far more than any model sends on this machine."""
    assert await measure_ceiling(2, 4) > 5_000


@pytest.mark.acceptance
async def test_one_client_process_sees_fifty_thousand_events_a_second() -> None:
    """The best of three, on a machine with a core for each side."""
    assert max([await measure_ceiling(1, 32) for _ in range(3)]) >= 50_000


def test_it_runs_without_rich_and_matplotlib(null_url: str) -> None:
    """From a bare checkout: a plain table, no plot, and the same figures."""
    script = (
        "import sys, runpy\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rich', 'matplotlib', 'uvloop', 'aiohttp', 'pydantic', 'numpy'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        f"sys.argv = ['bench', '--base-url', '{null_url}', '--concurrency', '2', '--output-len', '5', '--no-ceiling', '--plot', '/tmp/x.png']\n"
        "runpy.run_module('appliance.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "TTFT p50, ms" in done.stdout
    assert "matplotlib is not installed" in done.stderr
