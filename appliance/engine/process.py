"""The engine process: `python -m appliance.engine.process --fd N`. Reads Start, loads, says Ready, then steps until its socket ends."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from appliance.engine.child import die_with_parent
from appliance.engine.wire import Abort, Failure, Finish, FrameReader, FromEngine, Heartbeat, Start, Submit, ToEngine, encode
from appliance.errors import ModelError

if TYPE_CHECKING:
    from appliance.engine.engine import Engine

HEARTBEAT_SECONDS = 1.0
_IDLE_POLL_SECONDS = 1.0
_CAPTURE_AFTER_SECONDS = 0.2  # idle for so long: the next request is not likely to arrive within the capture of a graph
_READ_BYTES = 1 << 20


class Channel:
    """The engine's end of the socketpair. `send` may be called by any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._reader = FrameReader(ToEngine)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._ready: list[object] = []

    def send(self, message: FromEngine) -> None:
        frame = encode(message)
        with self._lock:
            self._socket.sendall(frame)

    def receive(self, timeout_seconds: float) -> list[object]:
        """Messages that are there, waiting up to `timeout_seconds` for the first. Raises EOFError when the server is gone."""
        if not self._poll.poll(timeout_seconds * 1000):
            return []
        data = self._socket.recv(_READ_BYTES)
        if not data:
            raise EOFError
        return self._reader.feed(data)


class Phase:
    """What the process is doing, told to the server at every change of kind and once a second from a thread of its own.

    The thread proves that the interpreter runs; the phase's start and deadline let the server see that a step does not end.
    """

    def __init__(self, channel: Channel, start: Start) -> None:
        self._channel = channel
        self._deadlines = {"load": start.load_timeout_seconds, "compile": start.load_timeout_seconds, "capture": start.load_timeout_seconds}
        self._step_deadline = start.step_timeout_seconds
        self._name = "load"
        self._started_at = time.monotonic()
        self._progress = 0.0
        self._detail = ""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._tell()
        self._thread.start()

    def enter(self, name: str, detail: str = "") -> None:
        """Begin a phase. A new step restarts the clock of the phase `step` without a frame of its own."""
        changed = name != self._name
        self._name, self._started_at, self._detail = name, time.monotonic(), detail
        if changed:
            self._progress = 0.0
            self._tell()

    def progress(self, share: float) -> None:
        """How far the load is, 0-1; told with the next heartbeat."""
        self._progress = share

    def _tell(self) -> None:
        deadline = self._deadlines.get(self._name, self._step_deadline if self._name == "step" else 1e9)
        self._channel.send(Heartbeat(self._name, self._started_at, deadline, self._progress, self._detail))

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(HEARTBEAT_SECONDS)
                self._tell()


def serve(channel: Channel, engine: Engine, phase: Phase) -> None:
    """Step while there is work; while there is none, capture graphs one by one, then wait for messages. Ends with EOFError."""
    while True:
        messages = channel.receive(0.0 if engine.has_work else _CAPTURE_AFTER_SECONDS)
        if not messages and not engine.has_work and not engine.runner.capture_next_graph(lambda: phase.enter("capture")):
            phase.enter("idle")
            messages = channel.receive(_IDLE_POLL_SECONDS)
        for message in messages:
            _handle(channel, engine, message)
        if engine.has_work:
            phase.enter("step")
            if (output := engine.step()) is not None:
                channel.send(output)


def _handle(channel: Channel, engine: Engine, message: object) -> None:
    match message:
        case Submit():
            if (rejected := engine.submit(message)) is not None:
                channel.send(rejected)
        case Abort():
            engine.abort(message)
        case Finish():
            engine.finish(message)
        case _:
            raise ValueError(f"unexpected message {type(message).__name__}")


def run(channel: Channel) -> int:
    """Serve one server until it is gone. Returns the exit status."""
    threading.Thread(target=_preload, name="preload").start()
    start, rest = _first_message(channel)
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(start.cache_dir, "triton"))
    os.environ.setdefault("APPLIANCE_CACHE_DIR", start.cache_dir)
    phase = Phase(channel, start)
    from appliance.engine.loading import build_engine  # imports torch, after the first heartbeat

    try:
        engine, ready = build_engine(start, phase, channel.send)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone: nobody is left to be told
        return 0
    except Exception as error:
        if not isinstance(error, ModelError):  # which has said all there is to say
            traceback.print_exc()
        channel.send(Failure(_in_words(error), permanent=_is_permanent(error)))
        return 1
    channel.send(ready)
    gc.freeze()  # hundreds of thousands of objects of torch, which no later collection needs to walk through
    gc.enable()
    for message in rest:
        _handle(channel, engine, message)
    serve(channel, engine, phase)
    return 0


def _preload() -> None:
    """Import what every start needs while the server still reads its settings: most of a second. What fails here fails again where it is told."""
    with contextlib.suppress(Exception):
        import appliance.engine.loading  # noqa: F401


def _first_message(channel: Channel) -> tuple[Start, list[object]]:
    while True:
        messages = channel.receive(_IDLE_POLL_SECONDS)
        if messages:
            start, *rest = messages
            if not isinstance(start, Start):
                raise ValueError(f"the first frame must be Start, not {type(start).__name__}")
            return start, rest


def _is_permanent(error: Exception) -> bool:
    return isinstance(error, ModelError | ValueError | FileNotFoundError)


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Entry point. SIGINT and SIGTERM are ignored: a drain is the server's to lead, and its end closes the socket."""
    parser = argparse.ArgumentParser(prog="appliance.engine.process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the inherited socket")
    options = parser.parse_args(argv)
    logging.basicConfig(format="engine: %(message)s")  # to stderr, which the server passes on
    logging.getLogger("appliance").setLevel(logging.INFO)
    gc.disable()  # until it serves: imports make many objects and hardly any garbage
    # An OpenMP worker spins between steps, by default for milliseconds of a core that the server needs; this is some 10 us, enough within a step.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # read when the library is loaded
    die_with_parent()  # a process stuck in a driver call would not see its socket end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=options.fd))
    try:
        return run(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
