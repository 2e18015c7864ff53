"""`appliance db`: the schema of the SQL database."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from appliance.commands._settings import load_settings
from appliance.settings import Settings


def run(arguments: argparse.Namespace) -> int:
    """`upgrade` migrates to the newest schema; `check` tells whether that is needed (exit status 1)."""
    settings = load_settings(arguments).settings
    return asyncio.run(_upgrade(settings) if arguments.action == "upgrade" else _check(settings))


async def _upgrade(settings: Settings) -> int:
    from sqlalchemy.exc import SQLAlchemyError

    from appliance.store.database import Database, MigrationFailed, database_url

    database = Database(database_url(settings))
    try:
        before = await database.revision()
        await database.migrate()
        after = await database.revision()
    except (MigrationFailed, SQLAlchemyError, OSError) as error:
        print(f"appliance: {database.url.render_as_string()}: {error}", file=sys.stderr)
        return 1
    finally:
        await database.close()
    change = "is at" if before == after else f"{before or 'empty'} ->"
    print(f"{database.url.render_as_string()}: {change} {after}")
    return 0


async def _check(settings: Settings) -> int:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy.exc import SQLAlchemyError

    from appliance.store.database import Database, database_url, migrations_path

    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    newest = ScriptDirectory.from_config(config).get_current_head()
    database = Database(database_url(settings))
    name = database.url.render_as_string()
    try:
        if database.dialect == "sqlite" and database.url.database and not _exists(database.url.database):
            print(f"{name}: not there yet; `appliance db upgrade` or `appliance serve` makes it")
            return 1
        found = await database.revision()
    except (SQLAlchemyError, OSError) as error:
        print(f"appliance: {name}: {error}", file=sys.stderr)
        return 1
    finally:
        await database.close()
    if found == newest:
        print(f"{name}: current ({found})")
        return 0
    print(f"{name}: at {found or 'no revision'}, the newest is {newest}; `appliance db upgrade` brings it there")
    return 1


def _exists(path: str) -> bool:
    """Whether a SQLite file is there; connecting would make it."""
    return Path(path).is_file()
