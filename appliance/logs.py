"""Logs on standard error: one line an event, for people on a terminal and as JSON elsewhere. One line a request.

No text of a user reaches them, unless log.prompts asks for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import queue
import sys
import threading
import time
from typing import Any, TextIO

import msgspec

from appliance.events import RequestRecord
from appliance.settings import LogSettings
from appliance.tracing import TraceContext

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_requests = logging.getLogger("appliance.requests")
_MAX_TEXT = 20_000  # characters of one prompt or output in a line
_MAX_HELD_LINES = 10_000  # that wait for whoever reads the log
_CLOSE_SECONDS = 2.0
ENGINE_LOG_PREFIX = "engine: "  # of the engine process' own log (engine.process)
_encode = msgspec.json.Encoder(enc_hook=str).encode  # a third of what json.dumps takes
_QUIET = {
    "aiosqlite": logging.INFO,
    "apscheduler": logging.WARNING,
    "aiohttp.access": logging.WARNING,
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, and what the call put into `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | _extra(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return _encode(line).decode()
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):  # keys that are no text, lone surrogates, huge numbers
            return json.dumps(line, default=str)


class ConsoleFormatter(logging.Formatter):
    """Time, level where it is not info, message, then `extra` as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        extra = "".join(f"  {key}={value}" for key, value in _extra(record).items())
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _NoHeaders(logging.Filter):
    """aiohttp logs a request that its parser refuses as an error, with the header at fault, which may hold a key. Here: one line, without it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or type(error).__module__ != "aiohttp.http_exceptions":
            return True
        record.msg, record.args = "refused what is no proper HTTP request from %s: %s", (*(record.args or ("?",)), type(error).__name__)
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return logging.getLogger().isEnabledFor(logging.INFO)


class BackgroundHandler(logging.Handler):
    """Formats and writes on a thread of its own: a log that nobody reads (a full pipe, a stopped terminal) must not stop the server.

    It holds 10,000 records; beyond them the newest are dropped, and how many is the next line once there is room. `close` waits two seconds at most.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.num_dropped = 0  # not told of yet
        self._stream = stream
        self._queue: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep `record` for the thread. Never waits, until `close`; then it writes by itself."""
        if not self._thread.is_alive():
            self._put(record)
        elif self._queue.qsize() >= _MAX_HELD_LINES:
            self.num_dropped += 1
        else:
            self._queue.put(record)

    def close(self) -> None:
        """Write what is held, as far as somebody reads it."""
        self._queue.put(None)
        self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            self._put(record)
            dropped, self.num_dropped = self.num_dropped, 0
            if dropped:
                text = f"{dropped} lines of the log were dropped: nobody read them"
                self._put(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (), None))

    def _put(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record) + "\n")
        except Exception:  # as logging does with a line that cannot be formatted or written: said on standard error, if that can be
            with contextlib.suppress(Exception):
                self.handleError(record)

    def _write(self, text: str) -> None:
        """Past the stream's buffer, whose lock would keep a blocked thread from letting the interpreter end."""
        try:
            descriptor = self._stream.fileno()
        except (AttributeError, io.UnsupportedOperation):  # not a file
            self._stream.write(text)
            return
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(descriptor, data) :]


class EngineLines:
    """What the engine's process prints, as lines of our log. Its own log is information, anything else (a library's words, a traceback) a warning."""

    def __init__(self) -> None:
        self._rest = b""
        self._logger = logging.getLogger("appliance.engine.process")

    def __call__(self, data: bytes) -> None:
        """Take what was read; an unfinished line waits for its end, up to 64 KiB."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 1 << 16:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                own = text.startswith(ENGINE_LOG_PREFIX)
                self._logger.log(logging.INFO if own else logging.WARNING, "%s", text.removeprefix(ENGINE_LOG_PREFIX))


def configure_logs(settings: LogSettings, stream: TextIO | None = None, *, background: bool = False) -> logging.Handler:
    """Send all loggers of this process to `stream` (standard error), from a thread where `background`: then close the handler at the end.

    Replaces what was configured before.
    """
    stream = stream or sys.stderr
    as_json = settings.format == "json" or (settings.format == "auto" and not stream.isatty())
    handler = BackgroundHandler(stream) if background else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    logging.getLogger("aiohttp.server").filters[:] = [_NoHeaders()]
    return handler


class Texts:
    """What a request said and what it got back, for its line; kept only where log.prompts asks for it."""

    __slots__ = ("_outputs", "prompts")

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self._outputs: dict[int, list[str]] = {}  # by choice

    def add(self, choice: int, text: str) -> None:
        """A choice gained `text`."""
        self._outputs.setdefault(choice, []).append(text)

    @property
    def outputs(self) -> list[str]:
        """The text of every choice so far."""
        return ["".join(parts) for _, parts in sorted(self._outputs.items())]


def log_request(record: RequestRecord, trace: TraceContext | None = None, texts: Texts | None = None) -> None:
    """The one line of a finished generation request. What is not known is left out."""
    if not _requests.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "request_id": record.id,
        "client_request_id": record.client_request_id,
        "trace_id": None if trace is None else trace.trace_id,
        "span_id": None if trace is None else trace.span_id,
        "key_id": record.key_id or None,
        "model": record.model,
        "endpoint": record.endpoint,
        "stream": record.stream,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "error_code": record.error_code,
        "num_choices": record.num_choices if record.num_choices != 1 else None,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "num_generated_tokens": record.num_generated_tokens,
        "num_written_tokens": record.num_written_tokens,
        "ttft_seconds": _rounded(record.ttft_seconds),
        "tpot_seconds": _rounded(record.tpot_seconds),
        "duration_seconds": _rounded(record.duration_seconds),
        "num_preemptions": record.num_preemptions or None,
        "num_engine_restarts": record.num_engine_restarts or None,
        "joules": _rounded(record.joules),
    }
    if texts is not None:
        fields |= {"prompts": [_cut(text) for text in texts.prompts], "outputs": [_cut(text) for text in texts.outputs]}
    end = record.error_code or record.finish_reason or "done"
    extra = {name: value for name, value in fields.items() if value is not None}
    _requests.info("%s %d %s", record.endpoint, record.status, end, extra=extra)


def log_other_request(request_id: str, method: str, path: str, status: int, duration_seconds: float, *, key_id: str, expected: bool) -> None:
    """The line of a request that generates nothing, or was turned away at the door; at debug where it is `expected` (scrapes, probes)."""
    level = logging.DEBUG if expected else logging.INFO
    if not _requests.isEnabledFor(level):
        return
    fields = {"request_id": request_id, "key_id": key_id or None, "status": status, "duration_seconds": _rounded(duration_seconds)}
    extra = {name: value for name, value in fields.items() if value is not None}
    _requests.log(level, "%s %s %d", method, path, status, extra=extra)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text)} characters)"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
