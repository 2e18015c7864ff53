"""Makes the harness importable, and that of the end-to-end tests; a seeded database, and a browser where one is installed."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from console_browser import Browser, connected, find_chromium, running_chromium
from console_server import ConsoleServer, console_server, seed, work

from appliance.store.database import Database


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A file with an hour of samples, 130 requests, three decisions and two engine events, and the time up to which it holds them."""
    path, now = tmp_path_factory.mktemp("seeded") / "appliance.db", time.time()

    async def fill() -> None:
        database = Database(f"sqlite+aiosqlite:///{path}")
        await seed(database, now)
        await database.close()

    asyncio.run(fill())
    return path, now


@pytest.fixture
async def database(seeded: tuple[Path, float], tmp_path: Path) -> AsyncIterator[Database]:
    """A copy of the seeded database, moved up to now."""
    path = tmp_path / "appliance.db"
    shutil.copy(seeded[0], path)
    database = Database(f"sqlite+aiosqlite:///{path}")
    late = {"late": time.time() - seeded[1]}
    async with database.begin() as connection:
        for table, column in (("samples", "at_wall"), ("requests", "received_wall"), ("engine_events", "at_wall"), ("scale_decisions", "at_wall")):
            await connection.execute(text(f"UPDATE {table} SET {column} = {column} + :late"), late)  # noqa: S608 - our own names
        await connection.execute(text("UPDATE scale_decisions SET expires_wall = expires_wall + :late"), late)
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


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a headless Chromium; the test is skipped where none is installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with running_chromium(program, tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """The browser, without pages of other tests."""
    async with connected(chromium) as browser:
        yield browser
