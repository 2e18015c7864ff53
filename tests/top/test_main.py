"""The command itself: for scripts, for pipes, and on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main

TEXT = """appliance_uptime_seconds {uptime}
appliance_requests_total{{status="200"}} {count}
appliance_output_tokens_total {count}
appliance_build_info{{model="tiny-model",instance_id="n",version="1"}} 1
appliance_engine_state{{state="ready"}} 1
"""


def serve(site: Any, count: int = 5) -> None:
    """An exposition of an appliance."""
    site.say("/metrics", TEXT.format(uptime=100 + count, count=count))


def test_once_prints_one_report(site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two looks, one text, exit status 0."""
    serve(site)
    assert main(["top", site.url, "--once", "--interval", "0.2"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("tiny-model  ready")
    assert output.count("Traffic") == 1
    assert [path for path, _ in site.asked].count("/metrics") == 2


def test_once_json_is_one_object(site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts get figures, not a drawing."""
    serve(site)
    assert main(["top", site.url, "--once", "--json", "--interval", "0.2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["model"] == "tiny-model"
    assert figures["requests_per_second"] == 0
    assert {path for path, _ in site.asked} == {"/metrics"}


def test_once_without_a_server_is_status_1(site: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """And says why, on standard error."""
    site.stop()
    assert main(["top", site.url, "--once", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Connection refused" in captured.err


@pytest.mark.parametrize("arguments", [["ftp://x"], ["--key-file", "/nonexistent/key"]])
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A URL or key file that is none."""
    assert main(["top", *arguments, "--once"]) == 2
    assert "appliance top:" in capsys.readouterr().err


def test_lines_go_on_while_the_server_is_away(site: Any) -> None:
    """With --json into a pipe: an object a look, an error where there was no answer, figures again afterwards; the reader's end ends it."""
    serve(site)
    command = [sys.executable, "-P", "-m", "appliance.cli", "top", site.url, "--json", "--interval", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = iter(process.stdout.readline, "")
        assert json.loads(next(lines))["model"] == "tiny-model"
        site.stop()
        assert any("error" in json.loads(line) for line, _ in zip(lines, range(20), strict=False))
        site.start()
        assert any("model" in json.loads(line) for line, _ in zip(lines, range(20), strict=False))
        process.stdout.close()
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


class Terminal:
    """A program on a pseudo-terminal of a size that can be changed."""

    def __init__(self, command: list[str], rows: int, columns: int) -> None:
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            # Not os.environ as it is: readline puts COLUMNS and LINES into the process' own, behind its back, and they go before the terminal's size.
            kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            os.execve(command[0], command, kept | {"TERM": "xterm-256color", "LANG": "C.UTF-8"})  # noqa: S606

    def resize(self, rows: int, columns: int) -> None:
        """As a window manager does; the kernel sends SIGWINCH."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, pattern: str, seconds: float = 15.0) -> re.Match[str]:
        """The first match in what is shown from now on."""
        self.shown = ""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, f"not shown: {pattern}\n{self.shown[-2000:]}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 65536).decode("utf-8", "replace")
        return match

    def interrupt(self) -> int:
        """Ctrl-C; the exit status, with everything shown."""
        os.write(self._fd, b"\x03")
        deadline = time.monotonic() + 10
        while True:
            try:
                if select.select([self._fd], [], [], 0.1)[0]:
                    self.shown += os.read(self._fd, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                break
            assert time.monotonic() < deadline, "does not leave"
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """Where a test failed half-way."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._fd)


def frame_with(text: str, *, without: str) -> str:
    """A pattern: a whole frame, from one cursor-home to the next, that holds `text` and not `without`."""
    rest = rf"(?:(?!{without}|\x1b\[H)[\s\S])*"
    return rf"\x1b\[H{rest}{text}{rest}\x1b\[H"


def test_it_lives_on_a_terminal(site: Any) -> None:
    """On the other screen; follows resizes; says when the server is away, and goes on afterwards; Ctrl-C leaves with 0 and restores the terminal."""
    serve(site)
    site.say("/console/api/requests", json.dumps({"requests": [{"record": {"id": "row-1", "status": 200}}]}))
    terminal = Terminal([str(Path(sys.executable).with_name("appliance")), "top", site.url, "--interval", "0.3"], rows=40, columns=120)
    try:
        terminal.wait_for(r"\x1b\[\?1049h")
        terminal.wait_for("Last requests")
        terminal.resize(12, 40)
        terminal.wait_for(frame_with("Traffic", without="Last requests"))
        terminal.resize(40, 120)
        terminal.wait_for("Last requests")
        site.stop()
        terminal.wait_for("no answer: Connection refused")
        site.start()
        terminal.wait_for(frame_with("Traffic", without="no answer"))
        terminal.wait_for("row-1")
    except BaseException:
        terminal.kill()
        raise
    assert terminal.interrupt() == 0
    assert "\x1b[?1049l" in terminal.shown
    assert "Traceback" not in terminal.shown
