"""`appliance serve` as a user runs it, in a process of its own, with what its measurements say from outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

COMMAND = str(Path(sys.executable).with_name("appliance"))
DUMMY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# One thread: beside other work on two cores, threads that meet in every layer wait for each other more than they compute.
EXACT = {"model.dtype": "float32", "model.quantization": "none", "engine.kernels": "cpu", "engine.num_threads": 1}


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of a user's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("APPLIANCE_") and name != "STATE_DIRECTORY"}


def prepare_state(folder: Path, shared: Path) -> Path:
    """A state folder of its own that shares fetched models and compiled kernels with other runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("models", "cache"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(shared / name)
    return folder


def write_dummy_model(folder: Path) -> str:
    """A tiny random model with a byte tokenizer; the value of model.path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DUMMY_CONFIG))
    return f"dummy:{folder}"


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line flags."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


class ApplianceServer:
    """A running `appliance serve`. Stop it with `stop`; its output is kept in `output`."""

    def __init__(self, state: Path, settings: dict[str, Any], environment: dict[str, str] | None = None, command: str = COMMAND) -> None:
        self.state = state
        self.output: list[str] = []
        self._printed = threading.Condition()
        arguments = [command, "serve", "--port", "0", "--state-dir", str(state), *flags(settings)]
        self.process = subprocess.Popen(
            arguments, cwd=state, env=clean_environment() | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self._wait_for(re.compile(r"^API\s+(\S+)/v1$")).group(1)
        except BaseException:
            self.process.kill()
            self.wait_exit()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._printed:
                self.output.append(line.rstrip("\n"))
                self._printed.notify_all()
        with self._printed:
            self._printed.notify_all()

    def _wait_for(self, pattern: re.Pattern[str], timeout: float = 60.0) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            return next((match for line in self.output if (match := pattern.search(line))), None)

        with self._printed:
            done = self._printed.wait_for(lambda: find() or not self._reader.is_alive(), timeout)
            match = find()
        assert done, "\n".join(["printed too little:", *self.output])
        assert match is not None, "\n".join(["ended early:", *self.output])
        return match

    def wait_ready(self, timeout: float = 90.0) -> ApplianceServer:
        """Return once /ready answers 200."""
        self.wait_until(lambda: self.status("/ready") == 200, timeout, "ready")
        return self

    def wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll `condition` ten times a second."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, "\n".join([f"exited while waiting for: {what}", *self.output[-30:]])
            assert time.monotonic() < deadline, "\n".join([f"not within {timeout} s: {what}", *self.output[-30:]])
            time.sleep(0.1)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of a GET."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers or {}), timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def status(self, path: str) -> int:
        """Status of a GET."""
        return self.get(path)[0]

    def metrics(self) -> Metrics:
        """The exposition now."""
        status, text = self.get("/metrics")
        assert status == 200, text
        return Metrics(text)

    def sql(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of the server's SQLite database."""
        connection = sqlite3.connect(f"file:{self.state / 'appliance.db'}?mode=ro", uri=True, timeout=30)
        try:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, values)]
        finally:
            connection.close()

    def wait_rows(self, query: str, *values: Any, count: int = 1, timeout: float = 20.0) -> list[dict[str, Any]]:
        """Rows of `query` once there are `count`: the writer batches them."""
        self.wait_until(lambda: len(self.sql(query, *values)) >= count, timeout, query)
        return self.sql(query, *values)

    def engine_pid(self) -> int:
        """The engine process: the only child of the server."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def signal(self, number: int) -> None:
        """Send a signal to the server process alone."""
        self.process.send_signal(number)

    def wait_exit(self, timeout: float = 60.0) -> int:
        """The exit status, with all output read."""
        status = self.process.wait(timeout)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def stop(self) -> int:
        """SIGTERM, then wait; SIGKILL if it does not leave."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_exit()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait_exit()
            raise AssertionError("\n".join(["did not leave at SIGTERM:", *self.output[-30:]])) from None


@dataclass
class Stream:
    """One streamed completion as its client saw it; filled as it comes."""

    status: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False  # the stream ended with [DONE]
    request_id: str = ""
    progressed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_tokens(self, count: int) -> None:
        """Until it has `count` tokens or is at its end."""
        while len(self.token_ids) < count and not (self.done or self.error or self.finish_reason):
            self.progressed.clear()
            await self.progressed.wait()


async def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> None:
    """Look at `condition` a hundred times a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


async def run_stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], stream: Stream, path: str = "/v1/completions") -> Stream:
    """Post `body` as a stream with usage and token ids and read it to its end into `stream`."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    async with session.post(url + path, json=asked, headers={"X-Request-Id": stream.request_id} if stream.request_id else {}) as response:
        stream.status = response.status
        if response.status != 200:
            stream.error = (await response.json())["error"]
            stream.progressed.set()
            return stream
        async for line in response.content:
            if line.startswith(b"data: "):
                _take_event(stream, line[6:].strip())
                stream.progressed.set()
    stream.progressed.set()
    return stream


def _take_event(stream: Stream, data: bytes) -> None:
    if data == b"[DONE]":
        stream.done = True
        return
    event = json.loads(data)
    if "error" in event:
        stream.error = event["error"]
        return
    stream.usage = event.get("usage") or stream.usage
    for choice in event["choices"]:
        stream.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        stream.token_ids += choice.get("token_ids") or []
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason


class Metrics:
    """One scrape. `value` sums the samples of a name over the labels that match."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str, /, **labels: str) -> float:
        """The sum of `appliance_<name>`; KeyError where there is no such sample and no labels were asked for."""
        found = [s.value for s in self.samples if s.name == f"appliance_{name}" and all(s.labels.get(k) == v for k, v in labels.items())]
        if not found and not labels and not any(s.name == f"appliance_{name}" for s in self.samples):
            raise KeyError(name)
        return sum(found)


@contextmanager
def serving(state: Path, settings: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[ApplianceServer]:
    """A ready server for the length of the block; it must leave with 0."""
    server = ApplianceServer(state, settings, environment)
    try:
        yield server.wait_ready()
    finally:
        status = server.stop()
    assert status == 0, "\n".join(server.output[-30:])
    faults = [line for line in server.output if "Traceback" in line or "Task exception was never retrieved" in line or "Unclosed" in line]
    assert not faults, "\n".join(server.output)


STATE_COLUMNS = tuple(
    f"{state}_seconds"
    for state in (
        *("write_blocked", "detokenize", "decode", "grammar", "prefill", "prefill_wait", "preempted", "engine_restart", "queued", "admitted"),
        "received",
    )
)


def check_ledger(row: dict[str, Any]) -> None:
    """The row's exclusive states sum to its duration within 1 ms."""
    total = sum(row[column] for column in STATE_COLUMNS)
    assert abs(total - row["duration_seconds"]) < 0.001, row
    assert all(row[column] >= 0 for column in STATE_COLUMNS), row
