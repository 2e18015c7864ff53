"""A private PostgreSQL in a temporary folder, over a Unix socket, where its binaries are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine


@dataclass
class Cluster:
    """A PostgreSQL server of our own. `stop` and `start` play an outage."""

    bin: Path
    data: Path
    sockets: Path
    user: dict[str, object]

    def url(self, database: str, role: str = "appliance") -> str:
        return f"postgresql+asyncpg://{role}@/{database}?host={self.sockets}"

    def start(self) -> None:
        options = f"-k {self.sockets} -c listen_addresses='' -c fsync=off -c shared_buffers=8MB -c max_connections=40"
        self.run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", str(self.sockets / "log"), "-o", options, "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the cluster's user."""
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


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A running PostgreSQL for the length of the block; the test is skipped where there is none to start."""
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
        cluster.run("initdb", "-D", str(cluster.data), "-U", "appliance", "-A", "trust", "-N", "-E", "UTF8", "--no-locale")
        cluster.start()
    except subprocess.SubprocessError as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def create_database(cluster: Cluster) -> str:
    """URL of a new, empty database."""
    name = f"t{uuid4().hex}"
    engine = create_async_engine(cluster.url("postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return cluster.url(name)
