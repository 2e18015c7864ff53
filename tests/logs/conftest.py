"""The API's in-memory server, and the lines that a request leaves."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.logs import configure_logs
from appliance.settings import LogSettings

_spec = importlib.util.spec_from_file_location("api_conftest", Path(__file__).parents[1] / "api" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_api)
start_server, server = _api.start_server, _api.server


class Lines:
    """What was logged, one dict a line."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream

    def all(self) -> list[dict[str, Any]]:
        """Every line, parsed."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        """The lines of requests."""
        return [line for line in self.all() if line["logger"] == "appliance.requests"]


@pytest.fixture
def log_lines() -> Iterator[Callable[..., Lines]]:
    """Configures the logs as JSON into memory: `log_lines(level="info")`. Restored afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure(**settings: Any) -> Lines:
        stream = io.StringIO()
        configure_logs(LogSettings.model_validate({"format": "json", **settings}), stream)
        return Lines(stream)

    yield configure
    root.handlers[:], root.level = handlers, level
    logging.getLogger("aiohttp.server").filters.clear()
