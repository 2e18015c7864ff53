"""One run of the engine process, from both ends: the server spawns, hears and ends it; the process itself ties its life to the server's."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SOCKET_BYTES = 1 << 20  # a step of 256 tokens is 3 KB: a server that is busy for a second holds no engine up
_READ_BYTES = 1 << 16
_LINE_BYTES = 400
_PR_SET_PDEATHSIG = 1

# glibc asks the kernel for huge pages for what malloc maps: a CPU's steps read all weights from there, 1.5 % faster. It looks before our first line.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# -P keeps the working folder off sys.path: in a checkout, its folder `kernels` would pass for the package that transformers looks for.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "appliance.engine.process")


def die_with_parent() -> None:
    """Called in the engine process: the kernel kills it (SIGKILL) when the server's main thread dies, even while it is stuck in a driver call.

    Set by the child and not by the server, since code between fork and exec is unsafe in a process with threads. The end of the socket does
    the same for a process that can still read. No effect where prctl is missing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def write_stderr(data: bytes) -> None:
    """Pass the engine's stderr on to ours. Never raises: a closed stderr must not stop the server."""
    with contextlib.suppress(OSError):
        os.write(2, data)


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that runs, not yet watched by an event loop: `Child` takes it over. `socket` and `stderr` are the server's ends."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    stderr: int

    def discard(self) -> None:
        """End a process that no Child took over. Without effect on one that has ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def spawn(command: Sequence[str]) -> Spawned:
    """Start `command --fd N` in a session of its own, so that a terminal's Ctrl-C does not reach it. Raises OSError if it cannot run.

    Its stdout goes the way of its stderr: a library's print must not mix with what the server prints.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours_stderr, stderr = os.pipe()
    try:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        process = subprocess.Popen(  # noqa: S603 - the command is ours
            [*command, "--fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(theirs.fileno(),),
            env=_ENVIRONMENT | os.environ,
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        os.close(ours_stderr)
        raise
    finally:
        theirs.close()
        os.close(stderr)
    return Spawned(process, ours, ours_stderr)


class Child:
    """An engine process under watch. `socket` is the server's end; `exited` resolves to the return code (negative: signal) once it is reaped."""

    def __init__(self, source: Sequence[str] | Spawned, pass_on: Callable[[bytes], None] = write_stderr) -> None:
        """Take over a spawned process, or `spawn` this command. Raises OSError if it cannot run."""
        spawned = source if isinstance(source, Spawned) else spawn(source)
        self._loop = asyncio.get_running_loop()
        self._pass_on = pass_on
        self._lines: collections.deque[str] = collections.deque(maxlen=50)
        self._partial = b""
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._process, self.socket, self._stderr = spawned.process, spawned.socket, spawned.stderr
        self.pid = self._process.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            self.kill()
            self._process.wait()
            self.socket.close()
            os.close(self._stderr)
            raise
        self.socket.setblocking(False)
        os.set_blocking(self._stderr, False)
        self._loop.add_reader(self._stderr, self._read_stderr)
        self._loop.add_reader(self._pidfd, self._reap)

    def last_line(self) -> str:
        """The stderr line that says most about an end: the last with an error in it, else the last. Empty if there was none."""
        lines = [*self._lines, self._partial.decode("utf-8", "replace").strip()]
        lines = [line for line in lines if line]
        return next((line for line in reversed(lines) if "error" in line.lower() and not line.startswith(" ")), lines[-1] if lines else "")

    def describe_exit(self) -> str:
        """How it ended, in words."""
        if not self.exited.done():
            return "does not end"
        code = self.exited.result()
        if code == 0:
            return "exit code 0"
        how = f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"
        return f"{how}; its last words: {line}" if (line := self.last_line()) else how

    async def end(self, grace_seconds: float, kill_seconds: float = 30.0) -> bool:
        """Wait `grace_seconds` for it to leave, then SIGKILL its process group. False if even that does not end it (stuck in the kernel)."""
        await asyncio.wait([self.exited], timeout=grace_seconds)
        if not self.exited.done():
            self.kill()
            await asyncio.wait([self.exited], timeout=kill_seconds)
        if not self.exited.done():
            return False
        self._close_stderr()
        return True

    def kill(self) -> None:
        """SIGKILL the process and what it has spawned (compilers). Only before it is reaped: until then its id cannot mean another group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.kill()  # whatever it left behind
        os.close(self._pidfd)
        code = self._process.wait()
        while self._read_stderr():
            pass
        if not self.exited.done():
            self.exited.set_result(code)

    def _read_stderr(self) -> bool:
        if self._stderr < 0:
            return False
        try:
            data = os.read(self._stderr, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_stderr()
            return False
        self._pass_on(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_LINE_BYTES:]
        self._lines.extend(line[:_LINE_BYTES].decode("utf-8", "replace").rstrip() for line in lines[-50:])
        return True

    def _close_stderr(self) -> None:
        if self._stderr >= 0:
            self._loop.remove_reader(self._stderr)
            os.close(self._stderr)
            self._stderr = -1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
