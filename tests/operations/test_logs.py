"""What reaches the log, and what never does."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from aiohttp.http_exceptions import LineTooLong

from appliance.logs import configure_logs
from appliance.settings import LogSettings


@pytest.fixture(autouse=True)
def _restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("aiohttp.server").filters.clear()


def refuse() -> None:
    """As aiohttp logs a header over its limit."""
    try:
        raise LineTooLong(b"Authorization: Bearer sk-secret", 8190)
    except LineTooLong as error:
        logging.getLogger("aiohttp.server").error("Error handling request from %s", "10.0.0.7", exc_info=error)


def test_a_refused_header_is_a_line_without_its_text() -> None:
    """A request that the parser refuses is news, not an error, and the header (it may hold a key) stays out of the log."""
    stream = io.StringIO()
    configure_logs(LogSettings(format="json"), stream)
    refuse()
    line = json.loads(stream.getvalue())
    assert line["level"] == "info"
    assert line["message"] == "refused what is no proper HTTP request from 10.0.0.7: LineTooLong"
    assert "secret" not in stream.getvalue()
    assert "exception" not in line


def test_a_refused_header_is_silent_above_info() -> None:
    """Whoever wants warnings only is not told of strangers' nonsense."""
    stream = io.StringIO()
    configure_logs(LogSettings(format="json", level="warning"), stream)
    refuse()
    assert stream.getvalue() == ""


def test_other_faults_keep_their_traceback() -> None:
    """A fault of ours in a handler is an error with its traceback."""
    stream = io.StringIO()
    configure_logs(LogSettings(format="json", level="warning"), stream)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        logging.getLogger("aiohttp.server").error("Unhandled exception", exc_info=error)
    line = json.loads(stream.getvalue())
    assert line["level"] == "error"
    assert "ZeroDivisionError" in line["exception"]
