"""How the server starts and ends: signals, drains, bad settings, bad models, and what its process holds."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest
from appliance_server import COMMAND, EXACT, ApplianceServer, Stream, check_ledger, clean_environment, flags, run_stream, serving

LONG = {"prompt": "long", "ignore_eos": True, "max_tokens": 1500, "seed": 1}


def start(state: Path, dummy_model: str, **settings: object) -> ApplianceServer:
    """A ready server of a tiny model."""
    return ApplianceServer(state, {**EXACT, "model.path": dummy_model, "model.context_length": 8192, **settings}).wait_ready()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
async def test_a_signal_drains_and_leaves_with_0(number: signal.Signals, dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """Open streams finish, new requests and /ready get 503, rows are flushed, no process stays, the exit status is 0."""
    server = start(state_folder(), dummy_model)
    engine = server.engine_pid()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
            stream = Stream(request_id="open")
            running = asyncio.create_task(run_stream(session, server.url, LONG, stream))
            await stream.wait_tokens(10)
            server.signal(number)
            await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 503, 10, "not ready while draining")
            assert "draining" in server.get("/ready")[1]
            assert server.status("/health") == 200
            refused = await run_stream(session, server.url, LONG, Stream())
            assert (refused.status, (refused.error or {})["code"]) == (503, "draining")
            assert not stream.done, "the drain was over before it was looked at"
            await running
        assert stream.done
        assert len(stream.token_ids) == LONG["max_tokens"]
        assert await asyncio.to_thread(server.wait_exit, 30) == 0
    finally:
        server.stop()
    assert not psutil.pid_exists(engine)
    (row,) = server.sql("select * from requests where client_request_id = 'open'")
    check_ledger(row)
    assert (row["status"], row["num_written_tokens"]) == (200, LONG["max_tokens"])
    assert server.sql("select count(*) as n from requests")[0]["n"] == 2
    assert server.sql("select kind from engine_events order by at_wall desc limit 1") == [{"kind": "stopped"}]


async def test_a_second_signal_aborts(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """The second Ctrl-C ends what is open within moments: the stream says why, the ledger has its row, the exit status is 0."""
    server = start(state_folder(), dummy_model)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
            stream = Stream(request_id="cut")
            running = asyncio.create_task(run_stream(session, server.url, {**LONG, "max_tokens": 8000}, stream))
            await stream.wait_tokens(10)
            server.signal(signal.SIGINT)
            await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 503, 10, "draining")
            assert not stream.done
            aborted_at = time.monotonic()
            server.signal(signal.SIGINT)
            await running
            assert await asyncio.to_thread(server.wait_exit, 30) == 0
            took = time.monotonic() - aborted_at
    finally:
        server.stop()
    assert took < 3, f"{took:.1f} s"
    assert not stream.finish_reason
    assert stream.error is not None
    assert stream.error["code"] in ("aborted", "shutting_down")
    (row,) = server.sql("select * from requests where client_request_id = 'cut'")
    check_ledger(row)
    assert row["status"] == 503
    assert row["num_written_tokens"] >= len(stream.token_ids)


async def test_a_drain_ends_at_its_limit(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """Past server.drain_seconds the rest is aborted, and the exit status is 0 all the same."""
    server = start(state_folder(), dummy_model, **{"server.drain_seconds": 0.5})
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
            stream = Stream()
            running = asyncio.create_task(run_stream(session, server.url, {**LONG, "max_tokens": 8000}, stream))
            await stream.wait_tokens(10)
            server.signal(signal.SIGTERM)
            await running
            assert await asyncio.to_thread(server.wait_exit, 30) == 0
    finally:
        server.stop()
    assert stream.error is not None
    assert len(stream.token_ids) < 8000


def test_a_signal_while_the_model_loads_leaves_at_once(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """There is nothing to drain before the engine is ready."""
    server = ApplianceServer(state_folder(), {**EXACT, "model.path": dummy_model})
    assert server.status("/health") == 200
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.wait_exit(20) == 0
    assert time.monotonic() - began < 10


@pytest.mark.acceptance
async def test_a_client_that_does_not_read_holds_nothing_up(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """Its stream fills every buffer and stands; others are served meanwhile, the drain ends at its limit, and the ledger says write-blocked."""
    server = start(state_folder(), dummy_model, **{"server.drain_seconds": 1})
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps({**LONG, "max_tokens": 4000, "logprobs": 20, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: deaf\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    deaf = socket.socket()
    try:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(head.encode() + body)
        await asyncio.to_thread(server.wait_until, lambda: server.metrics().value("requests_running") == 1, 10, "the deaf one runs")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            other = await run_stream(session, server.url, {**LONG, "max_tokens": 200}, Stream())
        assert len(other.token_ids) == 200
        await asyncio.to_thread(server.wait_until, lambda: server.metrics().value("requests_running") == 0, 60, "its tokens are all made")
        assert server.metrics().value("kv_used_blocks") == 0
        server.signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait_exit, 30) == 0
    finally:
        deaf.close()
        server.stop()
    (row,) = server.sql("select * from requests where client_request_id = 'deaf'")
    check_ledger(row)
    assert row["write_blocked_seconds"] > 1
    assert row["num_written_tokens"] < 4000
    assert row["status"] in (499, 503)


def test_a_killed_server_takes_its_engine_along_and_leaves_its_state_to_the_next(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """SIGKILL of the server leaves no engine behind, the next server takes over state and database, and a third is refused beside it."""
    state = state_folder()
    server = start(state, dummy_model)
    engine = psutil.Process(server.engine_pid())
    server.signal(signal.SIGKILL)
    assert server.wait_exit(10) == -signal.SIGKILL
    engine.wait(10)
    with serving(state, {**EXACT, "model.path": dummy_model}) as again:
        again.wait_rows("select * from engine_events where kind = 'ready' and pid = ?", again.engine_pid())
        refused = run_serve(state, *flags({"model.path": dummy_model}))
        assert refused.returncode == 2
        assert f"pid {again.process.pid}" in refused.stderr
        assert again.status("/ready") == 200


def test_a_port_that_is_taken_is_one_line(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """No traceback, and status 1, so that a service manager tries again."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_serve(state_folder(), *flags({"model.path": dummy_model, "server.port": port}))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def run_serve(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`appliance serve` that is expected to leave by itself."""
    command = [COMMAND, "serve", "--port", "0", "--state-dir", str(state), *arguments]
    return subprocess.run(command, cwd=state, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False)


def test_bad_settings_leave_with_2_and_start_nothing(tmp_path: Path) -> None:
    """Every problem is told with its key, value and range; no database, no engine."""
    done = run_serve(tmp_path, "--set", "engine.block_size=17", "--set", "server.max_choices=0", "--set", "no.such=1", "--host", "0.0.0.0")
    assert done.returncode == 2
    for words in ("4 problems", 'engine.block_size = "17"', 'server.max_choices = "0"', "no.such", "server.host = 0.0.0.0"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_leaves_with_1_and_words(tmp_path: Path) -> None:
    """Without a traceback, and before anything is started."""
    done = run_serve(tmp_path, "--model", str(tmp_path / "nowhere.gguf"))
    assert done.returncode == 1
    assert "nowhere.gguf: no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_loaded_leaves_with_1_and_words(tmp_path: Path, dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """What only the engine finds out ends the server as well, with the engine's own words."""
    folder = tmp_path / "strange"
    folder.mkdir()
    config = json.loads((Path(dummy_model.removeprefix("dummy:")) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["StrangeForCausalLM"], "model_type": "strange"}))
    done = run_serve(state_folder(), "--model", f"dummy:{folder}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "strange" in done.stderr.splitlines()[-1].lower()


SERVE_AND_LOOK = """
import asyncio, json, sys, urllib.request
from pathlib import Path
from appliance.app import running
from appliance.settings import EngineSettings, ModelSettings, ServerSettings, Settings

async def main():
    settings = Settings(
        state_dir=Path(sys.argv[1]),
        server=ServerSettings(port=0),
        model=ModelSettings(path=sys.argv[2]),
        engine=EngineSettings(num_threads=1),
    )
    async with running(settings) as appliance:
        await appliance.engine.wait_ready(90)
        def post():
            body = json.dumps({"prompt": "abc", "max_tokens": 5}).encode()
            request = urllib.request.Request(appliance.url + "/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        assert (await asyncio.to_thread(post))["usage"]["completion_tokens"] == 5
        await asyncio.to_thread(lambda: urllib.request.urlopen(appliance.url + "/metrics").read())
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "triton"})
    print("loaded:", heavy)

asyncio.run(main())
"""


def test_the_server_process_holds_no_torch(dummy_model: str, state_folder: Callable[[], Path]) -> None:
    """Neither torch nor transformers nor triton is imported by a server that has served."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVE_AND_LOOK, str(state_folder()), dummy_model],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "loaded: []"
