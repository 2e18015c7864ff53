"""Alembic's environment: migrates over the connection that `Database.migrate` (or a test) hands over in the configuration's attributes."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from appliance.store.tables import Base

connection = context.config.attributes.get("connection")
if not isinstance(connection, Connection):
    raise SystemExit("migrations run over a connection of the appliance: use Database.migrate, not the alembic command")
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    compare_type=True,
    render_as_batch=connection.dialect.name == "sqlite",  # SQLite alters a table by copying it
    transactional_ddl=True,  # also true of SQLite, since its transactions are begun explicitly
)
with context.begin_transaction():
    context.run_migrations()
