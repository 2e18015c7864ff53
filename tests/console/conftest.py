"""Makes the harness importable; a seeded database, and a browser where one is installed."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from console_browser import Browser, find_chromium, running_browser
from console_server import ConsoleServer, console_server, seed, work

from appliance.store.database import Database


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """An hour of samples, 130 requests, three decisions and two engine events, up to now."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'appliance.db'}")
    await seed(database, time.time())
    yield database
    await database.close()


@pytest.fixture
async def server(tmp_path: Path, database: Database) -> AsyncIterator[ConsoleServer]:
    """A server without keys over the seeded database, at work."""
    async with console_server(tmp_path, database=database) as server:
        work(server.recorder)
        yield server


@pytest.fixture
async def locked_server(tmp_path: Path, database: Database) -> AsyncIterator[ConsoleServer]:
    """The same behind two keys."""
    async with console_server(tmp_path, database=database, keys={"alice": "sk-alice", "bob": "sk-bob"}) as server:
        work(server.recorder)
        yield server


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    """A headless Chromium of the test's own; the test is skipped where none is installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    async with running_browser(program, tmp_path) as browser:
        yield browser
