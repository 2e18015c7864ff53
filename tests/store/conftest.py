"""Databases to test on: SQLite always, PostgreSQL where its binaries are installed (a private cluster in a temporary folder, over a Unix socket)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from appliance.events import LedgerState, RequestRecord, Sample
from appliance.store.database import Database


@dataclass
class Cluster:
    """A PostgreSQL server of our own. `stop` and `start` play an outage."""

    bin: Path
    data: Path
    sockets: Path
    user: dict[str, object]

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://appliance@/{database}?host={self.sockets}"

    def start(self) -> None:
        options = f"-k {self.sockets} -c listen_addresses='' -c fsync=off -c shared_buffers=8MB -c max_connections=40"
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", str(self.sockets / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.bin / program, *arguments],
            check=True,
            cwd=self.sockets,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=90,
            **self.user,
        )


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    candidates = [Path(found).resolve().parent if found else None, *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return next(
        (path for path in candidates if path and (path / "initdb").exists() and (path / "pg_ctl").exists() and (path / "postgres").exists()), None
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL; the test is skipped where there is none to start."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's initdb, pg_ctl and postgres are not installed")
    root = os.geteuid() == 0
    user: dict[str, object] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if root else {}  # PostgreSQL refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if root:
        shutil.chown(folder, "nobody", "nogroup")
    cluster = Cluster(binaries, folder / "data", folder, user)
    try:
        cluster._run("initdb", "-D", str(cluster.data), "-U", "appliance", "-A", "trust", "-N", "-E", "UTF8", "--no-locale")
        cluster.start()
    except subprocess.SubprocessError as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start here: {error}")
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def _create(cluster: Cluster) -> str:
    name = f"t{uuid4().hex}"
    engine = create_async_engine(cluster.url("postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return cluster.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database that is new and empty."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    return await _create(request.getfixturevalue("cluster"))


@pytest.fixture
async def empty_database(database_url: str) -> AsyncIterator[Database]:
    """A database without tables."""
    database = Database(database_url)
    yield database
    await database.close()


@pytest.fixture
async def database(empty_database: Database) -> Database:
    """A database with the current schema."""
    await empty_database.migrate()
    return empty_database


@pytest.fixture
def make_record() -> Callable[..., RequestRecord]:
    """Makes the ledger record number `index`, with any field replaced."""

    def make(index: int = 0, **changes: object) -> RequestRecord:
        fields: dict[str, object] = {
            "id": f"01900000-0000-7000-8000-{index:012d}",
            "client_request_id": None,
            "endpoint": "/v1/chat/completions",
            "model": "smollm2",
            "key_id": f"key{index % 3}",
            "stream": True,
            "received_wall": 1_700_000_000.0 + index,
            "duration_seconds": 1.1,
            "status": 200,
            "finish_reason": "stop",
            "error_code": None,
            "num_choices": 1,
            "num_prompt_tokens": 100,
            "num_cached_tokens": 16,
            "num_generated_tokens": 50,
            "num_written_tokens": 50,
            "ttft_seconds": 0.1,
            "tpot_seconds": 0.02,
            "max_itl_seconds": 0.03,
            "num_preemptions": 0,
            "num_engine_restarts": 0,
            "states": {state.value: 0.1 for state in LedgerState},
            "seed": -(1 << 63),
        }
        return msgspec.convert(fields | changes, RequestRecord)

    return make


@pytest.fixture
def make_sample() -> Callable[[float], Sample]:
    """Makes a sample of the given wall time, with numbers in every field that takes one."""

    def make(at_wall: float) -> Sample:
        fields = {
            field.name: ("ready" if field.name == "engine_state" else 3 if "int" in str(field.type) else 0.25)
            for field in msgspec.structs.fields(Sample)
        }
        return msgspec.convert(fields | {"at_wall": at_wall}, Sample)

    return make
