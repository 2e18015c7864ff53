"""The schema's history: what the migrations build is what the tables declare, forth and back, on SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from appliance.store.database import Database, MigrationFailed, migrations_path
from appliance.store.tables import Base


def _differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata))


def _tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


async def test_upgrade_builds_what_the_tables_declare(empty_database: Database) -> None:
    """After an upgrade Alembic finds nothing left to generate; a second upgrade changes nothing."""
    assert await empty_database.revision() is None
    await empty_database.migrate()
    head = await empty_database.revision()
    await empty_database.migrate()
    assert await empty_database.revision() == head is not None
    async with empty_database.engine.connect() as connection:
        assert await connection.run_sync(_differences) == []


async def test_downgrade_and_upgrade_round_trip(empty_database: Database) -> None:
    """Down to nothing and up again gives the same schema."""
    await empty_database.migrate()
    await empty_database.downgrade("base")
    async with empty_database.engine.connect() as connection:
        assert await connection.run_sync(_tables) <= {"alembic_version"}
    await empty_database.migrate()
    async with empty_database.engine.connect() as connection:
        assert await connection.run_sync(_tables) == {*Base.metadata.tables, "alembic_version"}
        assert await connection.run_sync(_differences) == []


async def test_a_newer_schema_is_refused_in_words(empty_database: Database) -> None:
    """A database that a newer version has migrated is left alone, and the message says what to do."""
    await empty_database.migrate()
    async with empty_database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MigrationFailed, match="newer version"):
        await empty_database.migrate()


async def test_sqlite_waits_instead_of_failing(tmp_path: Path) -> None:
    """SQLite runs in WAL with a busy timeout, and enforces foreign keys."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'folder' / 'a.db'}")
    async with database.engine.connect() as connection:
        values = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        ]
    await database.close()
    assert values == ["wal", 1, 5000, 1]


def test_the_migrations_folder_is_no_package() -> None:
    """An __init__.py in alembic/ would hide the library of that name."""
    assert (migrations_path() / "env.py").is_file()
    assert not (migrations_path() / "__init__.py").exists()


def test_other_databases_are_refused() -> None:
    """A URL of a database that nothing here was tested on is refused, without its password in the message."""
    with pytest.raises(ValueError, match="neither") as caught:
        Database("mysql+aiomysql://user:secret@host/db")
    assert "secret" not in str(caught.value)
