"""The door to SQL: one async engine for SQLite or PostgreSQL, its sessions, and the migrations that bring the schema up to date."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, Executable, create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

import appliance
from appliance.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

T = TypeVar("T")

# PostgreSQL's advisory locks, where several appliances share a database
_MIGRATION_LOCK = 0x1A9B_0001  # one migrates, the others wait for it
UPKEEP_LOCK = 0x1A9B_0002  # one rolls up and purges for all
_MIGRATION_WAIT_SECONDS = 60.0
_BUSY_TIMEOUT_MS = 5_000
_MAX_WAL_BYTES = 64 * 1024 * 1024
_CACHE_KIB = 16 * 1024  # of each of at most six connections
_CONNECT_TIMEOUT_SECONDS = 5.0


class MigrationFailed(Exception):
    """The schema cannot be brought up to date; the message says why and what to do."""


def database_url(settings: Settings) -> str:
    """The configured SQLAlchemy URL (with its password), else SQLite in the state folder."""
    if settings.store.url is not None:
        return settings.store.url.get_secret_value()
    return f"sqlite+aiosqlite:///{settings.state_dir / 'appliance.db'}"


def migrations_path() -> Path:
    """The folder of the Alembic environment: package data in an installed wheel, `alembic/` beside the package in a checkout."""
    packaged = Path(str(resources.files("appliance").joinpath("_alembic")))
    if (packaged / "env.py").is_file():
        return packaged
    checkout = Path(appliance.__file__).resolve().parent.parent / "alembic"
    if (checkout / "env.py").is_file():
        return checkout
    raise MigrationFailed(f"no migrations at {packaged} nor at {checkout}: the installation is incomplete, install the package again")


class Database:
    """An async engine with its conventions. Owned by the event loop that uses it; `close` when done.

    `session` is for reading, `begin` for writing: in SQLite it takes the write lock at once, so that two writers wait for each other instead of
    failing when a read turns into a write.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.dialect = self.url.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise ValueError(f"store.url: {self.url.render_as_string()} is neither sqlite+aiosqlite nor postgresql+asyncpg")
        options: dict[str, Any] = {"pool_size": 4, "max_overflow": 2, "pool_timeout": 10.0, "hide_parameters": True}  # no row's content in a log
        if self.dialect == "sqlite":
            if self.url.database and self.url.database != ":memory:":
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        else:
            options |= {"pool_pre_ping": True, "connect_args": {"timeout": _CONNECT_TIMEOUT_SECONDS, "command_timeout": 30.0}}
        self.engine: AsyncEngine = create_async_engine(self.url, **options)
        self._brief: Engine | None = None
        if self.dialect == "sqlite" and self.url.database and self.url.database != ":memory:":
            self._brief = create_engine(self.url.set(drivername="sqlite"), pool_size=1, hide_parameters=True).execution_options(appliance_write=True)
        if self.dialect == "sqlite":
            for engine in self.sync_engines:
                event.listen(engine, "connect", _prepare_sqlite)
                event.listen(engine, "begin", _begin_sqlite)
        self.migrated = False  # the schema is known to be current
        self._writing = self.engine.execution_options(appliance_write=True)

    @property
    def sync_engines(self) -> tuple[Engine, ...]:
        """SQLAlchemy's engines beneath, for its events."""
        return (self.engine.sync_engine,) if self._brief is None else (self.engine.sync_engine, self._brief)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session to read with; what it changes is rolled back."""
        async with AsyncSession(self.engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A session in one write transaction: committed at the end of the block, rolled back if it raises."""
        async with AsyncSession(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    async def write(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, done in one write transaction: committed at its end, rolled back if it raises.

        In SQLite begin, statements and commit are one call of a thread: over the event loop each of them costs a turn of both, and holds the lock
        for longer. A caller that is cancelled does not stop that thread.
        """
        return (await self._transact(work))[0]

    async def execute_briefly(self, statement: Executable, rows: Sequence[Mapping[str, Any]] = ()) -> tuple[int, float]:
        """One statement in a write transaction. Returns how many rows it changed and for how many seconds it held its locks, the commit included."""
        return await self._transact(lambda connection: connection.execute(statement, rows or None).rowcount)

    async def migrate(self, revision: str = "head") -> None:
        """Upgrade the schema to `revision`. Safe to call by several appliances at once. Raises MigrationFailed.

        Alembic's own work blocks the event loop for some 0.1 s: call it before serving.
        """
        await self._run_alembic("upgrade", revision)
        self.migrated = revision == "head"

    async def downgrade(self, revision: str) -> None:
        """Take the schema back to `revision` ("base" drops everything). Raises MigrationFailed."""
        self.migrated = False
        await self._run_alembic("downgrade", revision)

    async def revision(self) -> str | None:
        """The schema's revision; None for an empty database."""
        from alembic.runtime.migration import MigrationContext

        async with self.engine.connect() as connection:
            return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()
        if self._brief is not None:
            await asyncio.to_thread(self._brief.dispose)

    async def _transact(self, work: Callable[[Connection], T]) -> tuple[T, float]:
        """What `work` returned, and the seconds from the transaction's begin to its end."""
        if self._brief is not None:
            return await asyncio.to_thread(_in_transaction, self._brief, work)
        async with self._writing.begin() as connection:
            started = time.perf_counter()
            result = await connection.run_sync(work)
        return result, time.perf_counter() - started

    async def _run_alembic(self, direction: str, revision: str) -> None:
        from alembic import command
        from alembic.util import CommandError

        def run(connection: Connection) -> None:
            config = alembic_config(connection)
            (command.upgrade if direction == "upgrade" else command.downgrade)(config, revision)

        try:
            async with self._locked() as connection:
                await connection.run_sync(run)
                await connection.commit()
            await self.engine.dispose()  # pooled connections may hold plans for the schema that was
        except CommandError as error:
            advice = "If a newer version has migrated this database, run that version, or downgrade with it first."
            raise MigrationFailed(f"{self.url.render_as_string()}: {error}. {advice}") from error

    @asynccontextmanager
    async def alone(self, lock: int) -> AsyncIterator[bool]:
        """Whether this appliance has `lock` for the length of the block; False if another one has it. On SQLite, whose state folder one server owns,
        always True. A connection that breaks gives the lock up, so what is done under it must bear to be done twice."""
        if self.dialect == "sqlite":
            yield True
            return
        async with self.engine.connect() as connection:
            mine = bool((await connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": lock})).scalar())
            await connection.commit()
            try:
                yield mine
            finally:
                if mine:
                    await _unlock(connection, lock)

    async def analyze(self) -> None:
        """Refresh SQLite's statistics, a few hundred rows an index; PostgreSQL does so by itself."""
        if self.dialect == "sqlite":
            await self.execute_briefly(text("ANALYZE main"))

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[AsyncConnection]:
        """A connection that alone may migrate, and takes as long as it must: the SQLite write lock, or an advisory lock of PostgreSQL.

        Raises TimeoutError if another appliance holds the lock for a minute.
        """
        if self.dialect == "sqlite":
            async with self._writing.connect() as connection:
                yield connection
            return
        engine = create_async_engine(self.url, poolclass=NullPool, connect_args={"timeout": _CONNECT_TIMEOUT_SECONDS})  # without a command_timeout
        try:
            async with engine.connect() as connection:
                await _lock(connection, _MIGRATION_LOCK)
                try:
                    yield connection
                finally:
                    await connection.rollback()
                    await _unlock(connection, _MIGRATION_LOCK)
        finally:
            await engine.dispose()


async def _lock(connection: AsyncConnection, lock: int) -> None:
    deadline = time.monotonic() + _MIGRATION_WAIT_SECONDS
    while not (await connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": lock})).scalar():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another appliance has been migrating this database for {_MIGRATION_WAIT_SECONDS:.0f} s")
        await asyncio.sleep(0.2)
    await connection.commit()


async def _unlock(connection: AsyncConnection, lock: int) -> None:
    """Give the lock up, though cancelled; a connection that is dead has given it up."""
    with contextlib.suppress(SQLAlchemyError, OSError):
        await asyncio.shield(connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": lock}))
        await connection.commit()


def _in_transaction(engine: Engine, work: Callable[[Connection], T]) -> tuple[T, float]:
    with engine.begin() as connection:
        started = time.perf_counter()
        result = work(connection)
    return result, time.perf_counter() - started


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for `connection`, without an ini file."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    """WAL lets readers and the writer work side by side; with it, NORMAL loses at most the newest commits at a power cut, never the file."""
    connection.isolation_level = None  # or the driver begins transactions by its own, looser rules
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = NORMAL",
        "foreign_keys = ON",
        f"journal_size_limit = {_MAX_WAL_BYTES}",  # what a burst has made of it is given back
        f"cache_size = -{_CACHE_KIB}",
        "analysis_limit = 400",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("appliance_write") else "BEGIN")
