"""What an operator does to a database by hand: is it current and sound, how large, and giving back what the purge freed."""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import text

from appliance.store.database import Database, migrations_path
from appliance.store.tables import Base


def newest_revision() -> str:
    """The schema's revision that this version brings databases to."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None
    return head


async def problems(database: Database) -> list[str]:
    """What is wrong with the stored data, at most twenty things. Reads a whole SQLite file; PostgreSQL only tells whether it takes writes."""
    found: list[str] = []
    async with database.engine.connect() as connection:
        if database.dialect == "postgresql":
            if (await connection.execute(text("SHOW transaction_read_only"))).scalar() == "on":
                found.append("takes no writes (read-only, or a standby)")
            return found
        rows = (await connection.exec_driver_sql("PRAGMA quick_check(20)")).scalars().all()
        found += [f"damaged: {row}" for row in rows if row != "ok"]
        dangling = (await connection.exec_driver_sql("PRAGMA foreign_key_check")).mappings().all()
        found += [f"a row of {row['table']} refers to one of {row['parent']} that is not there" for row in dangling[:20]]
    return found


async def size_bytes(database: Database) -> int:
    """What the database takes on disk, indexes included, a SQLite write-ahead log not."""
    async with database.engine.connect() as connection:
        if database.dialect == "postgresql":
            return int((await connection.execute(text("SELECT pg_database_size(current_database())"))).scalar_one())
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
        return int(pages) * int((await connection.exec_driver_sql("PRAGMA page_size")).scalar_one())


async def vacuum(database: Database) -> None:
    """Give the space of deleted rows back. SQLite rewrites its file (as much free disk again, and a server that writes meanwhile spools); PostgreSQL
    makes the space usable again and serves on."""
    async with database.engine.connect() as connection:
        if database.dialect == "postgresql":
            automatic = await connection.execution_options(isolation_level="AUTOCOMMIT")
            for table in Base.metadata.sorted_tables:
                await automatic.exec_driver_sql(f"VACUUM (ANALYZE) {table.name}")
            return
        driver: Any = (await connection.get_raw_connection()).driver_connection  # beneath SQLAlchemy, which would begin a transaction
        try:
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                await (await driver.execute(statement)).close()
        except sqlite3.Error as error:
            raise OSError(str(error)) from error
