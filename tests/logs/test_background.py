"""The server's log, written on a thread of its own: whole and in order where somebody reads it, no hindrance where nobody does."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

from appliance.logs import BackgroundHandler, EngineLines, configure_logs
from appliance.settings import LogSettings


@pytest.fixture(autouse=True)
def _restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("aiohttp.server").filters.clear()


def configure(stream: io.TextIOBase) -> BackgroundHandler:
    """JSON lines into `stream`."""
    handler = configure_logs(LogSettings(format="json"), stream, background=True)  # type: ignore[arg-type]
    assert isinstance(handler, BackgroundHandler)
    return handler


def test_lines_are_whole_and_in_order() -> None:
    """A thousand lines, all there once the handler is closed; what comes after that is written at once."""
    stream = io.StringIO()
    handler = configure(stream)
    for index in range(1000):
        logging.getLogger("x").info("line %d", index, extra={"index": index, "odd": {"a": {1}}})
    handler.close()
    logging.getLogger("x").info("late")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [*(f"line {index}" for index in range(1000)), "late"]
    assert lines[7]["index"] == 7
    handler.close()


@pytest.mark.parametrize("value", ["\ud800", float("inf"), 1 << 80, {1: 2, (3, 4): 5}, object(), b"x"])
def test_no_value_breaks_a_line(value: object) -> None:
    """Whatever was put into `extra`, there is one line of JSON; what has no JSON form is its text."""
    stream = io.StringIO()
    handler = configure(stream)
    logging.getLogger("x").info("odd", extra={"value": value})
    logging.getLogger("x").info("next")
    handler.close()
    lines = stream.getvalue().splitlines()
    assert json.loads(lines[-1])["message"] == "next"
    assert json.loads(lines[0])["message"] == "odd"


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """A full pipe: 20,000 lines are logged without waiting, what was too much is dropped and, once somebody reads, told."""
    reading, writing = os.pipe()
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.extend(iter(lambda: os.read(reading, 1 << 16), b"")))
    with os.fdopen(writing, "w") as stream:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * 4096)
        os.set_blocking(writing, True)
        handler = configure(stream)
        logger = logging.getLogger("x")
        began = time.monotonic()
        for index in range(20_000):
            logger.info("%s %d", "a" * 100, index)
        assert time.monotonic() - began < 10
        assert handler.num_dropped > 5_000
        reader.start()
        while handler.num_dropped:
            time.sleep(0.001)
        logger.info("the end")
        while handler._queue.qsize():
            time.sleep(0.001)
        handler.close()
        logging.getLogger().handlers[:] = []
    reader.join()
    os.close(reading)
    lines = [json.loads(line) for line in b"".join(seen).splitlines() if line]
    told = [line for line in lines if "were dropped" in line["message"]]
    kept = [int(line["message"].split()[1]) for line in lines if line["message"].startswith("aaa")]
    assert sum(int(line["message"].split()[0]) for line in told) + len(kept) == 20_000
    assert kept == sorted(kept)
    assert lines[-1]["message"] == "the end"
    assert all(line["level"] == "warning" for line in told)


def test_a_log_that_stays_full_does_not_keep_the_server_from_leaving() -> None:
    """Closing gives up after two seconds."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "w") as stream:
        handler = configure(stream)
        for _ in range(2_000):
            logging.getLogger("x").info("a" * 100)
        os.set_blocking(reading, False)
        began = time.monotonic()
        handler.close()
        assert 1.5 < time.monotonic() - began < 6
        logging.getLogger().handlers[:] = []
        while handler._thread.is_alive():  # somebody reads after all: it goes on, and ends
            with contextlib.suppress(BlockingIOError):
                os.read(reading, 1 << 20)
            handler._thread.join(0.01)


def test_what_the_engine_prints_becomes_lines_of_the_log() -> None:
    """Its log as information, anything else as a warning; lines that arrive in pieces are put together, and bytes that are no text harm nothing."""
    stream = io.StringIO()
    handler = configure(stream)
    lines = EngineLines()
    for piece in (b"engine: compi", b"led\nTraceback (most", b" recent call last):\n\n\xff!\nunfinis"):
        lines(piece)
    handler.close()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["message"]) for line in found] == [
        ("info", "compiled"),
        ("warning", "Traceback (most recent call last):"),
        ("warning", "\ufffd!"),
    ]
    lines(b"hed" + b"x" * (1 << 17))
    assert lines._rest == b""
