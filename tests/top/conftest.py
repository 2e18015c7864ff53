"""The recorder's fixtures, and a server that says what a test wants."""

from __future__ import annotations

import http.server
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("metrics_conftest", Path(__file__).parents[1] / "metrics" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_metrics = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_metrics)
clock, slo, recorder, engine = _metrics.clock, _metrics.slo, _metrics.recorder, _metrics.engine
make_record, make_stats, fake_nvml = _metrics.make_record, _metrics.make_stats, _metrics.fake_nvml


class Site:
    """Replies by path: (status, headers, body). Keeps the requests' headers."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.port = 0
        self._server: http.server.ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def say(self, path: str, body: str | bytes, status: int = 200, **headers: str) -> None:
        """From now on `path` answers so."""
        self.replies[path] = (status, headers, body if isinstance(body, bytes) else body.encode())

    def start(self) -> None:
        """Listen, on the port of before if there was one."""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, dict(self.headers)))
                status, headers, body = site.replies.get(self.path.partition("?")[0], (404, {}, b"{}"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Silence."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Away, until `start`."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None


@pytest.fixture
def site() -> Iterator[Site]:
    """Up."""
    site = Site()
    site.start()
    yield site
    site.stop()
