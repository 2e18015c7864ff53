"""The page and its files: what they may load, how long they are kept, and that nothing is missing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from aiohttp import ClientSession
from console_server import ConsoleServer

from appliance.console import assets
from appliance.console.assets import CHART_FILES, integrity_of, load_assets

STATIC = Path(assets.__file__).parent / "static"
ROOT = Path(__file__).resolve().parents[2]


async def test_the_page_may_load_nothing_from_elsewhere_and_run_nothing_inline(server: ConsoleServer) -> None:
    """Its policy has no unsafe source, and the page itself holds no inline script, style or handler, and no address of another host."""
    async with ClientSession() as session, session.get(server.url + "/") as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        policy, page = response.headers["Content-Security-Policy"], await response.text()
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Referrer-Policy"] == "no-referrer"
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:|https?://", page)
    assert "{{" not in page


async def test_every_file_of_the_page_is_there_and_kept_forever(server: ConsoleServer) -> None:
    """Scripts, styles and what modules import answer at their versioned address, compressed where asked for, with the right type."""
    async with ClientSession(auto_decompress=False) as session:
        page = await (await session.get(server.url + "/")).text()
        base = re.search(r'data-base="([^"]+)"', page)
        assert base is not None
        linked = set(re.findall(r'(?:src|href)="(/console/static/[^"]+)"', page))
        modules = {f"{base[1]}/{name}" for file in STATIC.glob("*.js") for name in re.findall(r'from "\./([\w.]+)"', file.read_text())}
        assert len(linked) >= 4
        assert len(modules) >= 8
        for path in linked | modules | {f"{base[1]}/uplot.js"}:
            async with session.get(server.url + path, headers={"Accept-Encoding": "gzip"}) as response:
                body = await response.read()
                assert response.status == 200, path
                assert "immutable" in response.headers["Cache-Control"]
                assert response.headers["Vary"] == "Accept-Encoding"
                expected = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[path.rpartition(".")[2]]
                assert response.content_type == expected
                encoding = response.headers.get("Content-Encoding")
            async with session.get(server.url + path, headers={"Accept-Encoding": "identity"}) as response:
                assert await response.read() == (gzip.decompress(body) if encoding == "gzip" else body)


async def test_files_of_another_version_are_not_served(server: ConsoleServer) -> None:
    """After an update a page that is still open must not get a mixture; nothing outside the folder is ever served."""
    version = load_assets().version
    async with ClientSession() as session:
        for path in (
            "/console/static/0000000000000000/main.js",
            f"/console/static/{version}/nothing.js",
            f"/console/static/{version}/../routes.py",
            f"/console/static/{version}/%2e%2e/routes.py",
            f"/console/static/{version}/",
        ):
            async with session.get(server.url + path) as response:
                assert response.status == 404, path


def test_the_version_changes_with_any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are kept forever by browsers, so their address has to tell every change."""
    before = load_assets()
    monkeypatch.setattr(assets, "_chart_files", lambda: {"uplot.js": b"another"})
    assert load_assets().version != before.version


def test_the_chart_library_is_the_one_that_was_reviewed() -> None:
    """The installed package holds exactly uPlot 1.6.31's bytes, at the version that the project pins."""
    found = load_assets()
    assert found.has_charts
    for name, (_, digest) in CHART_FILES.items():
        assert integrity_of(found.files[name].body) == digest
    assert b"v1.6.31" in found.files["uplot.js"].body[:80]
    pinned = [line for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if line.startswith("youplot")]
    assert pinned == [f"youplot=={metadata.version('youplot')}"]


def test_other_bytes_under_its_name_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was tampered with, or is missing, costs the charts and nothing else."""
    monkeypatch.setitem(CHART_FILES, "uplot.js", (CHART_FILES["uplot.js"][0], "sha384-" + "A" * 64))
    found = load_assets()
    assert not found.has_charts
    assert "uplot.js" not in found.files
    assert "main.js" in found.files
    monkeypatch.setattr(assets, "CHART_PACKAGE", "no-such-package")
    assert not load_assets().has_charts


async def test_the_login_page_stands_alone(locked_server: ConsoleServer) -> None:
    """It loads nothing at all: its style is inline and allowed by its digest alone, so no file has to be open to strangers."""
    async with ClientSession() as session, session.get(locked_server.url + "/console/login") as response:
        assert response.status == 200
        page, policy = await response.text(), response.headers["Content-Security-Policy"]
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "script-src" not in policy
    assert "default-src 'none'" in policy
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
