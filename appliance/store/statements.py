"""How rows get into the tables: inserts that ignore what is stored, and usage counted in the same transaction, for the rows that were new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Insert, Table, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store.rows import TABLES, Row
from appliance.store.tables import RequestRow
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage, usage_upsert

_STATEMENT_ROWS = 64  # of one statement, after which the event loop of an asynchronous driver is free again

_LEDGER: Table = TABLES[RequestRow.__tablename__]


class Statements:
    """The statements of one dialect, made once."""

    def __init__(self, dialect: str) -> None:
        insert = (postgresql if dialect == "postgresql" else sqlite).insert
        self._inserts: dict[str, Insert] = {name: insert(table).on_conflict_do_nothing() for name, table in TABLES.items() if table is not _LEDGER}
        self._upserts = [(table, usage_upsert(table, dialect)) for table in (ROLLUP, TOTALS)]
        ledger = insert(_LEDGER).on_conflict_do_nothing()
        self._insert_ledger: Callable[[Connection, Sequence[Row]], list[Row]]
        self._insert_ledger = _ReturningInsert(ledger) if dialect == "postgresql" else _SqliteInsert(ledger)

    def insert(self, connection: Connection, rows: Sequence[tuple[str, Row]]) -> None:
        """Store `rows`, each with the name of its table, in the connection's transaction."""
        for name, insert in self._inserts.items():
            for some in _chunks([row for table, row in rows if table == name]):
                connection.execute(insert, some)
        requests = [row for table, row in rows if table == _LEDGER.name]
        stored = [row for some in _chunks(requests) for row in self._insert_ledger(connection, some)]
        if stored:
            hours = count_usage(stored)
            for table, upsert in self._upserts:
                for some in _chunks(fold_usage(hours, table)):
                    connection.execute(upsert, some)


class _ReturningInsert:
    """The database says which rows were new: another transaction of ours, whose end was not heard, may be storing them at the same time."""

    def __init__(self, insert: Any) -> None:
        self._insert = insert.returning(_LEDGER.c.id)

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> list[Row]:
        new = set(connection.execute(self._insert, rows).scalars())
        return [row for row in _distinct(rows) if row["id"] in new]


class _SqliteInsert:
    """The transaction holds the only write lock, so what it does not find is new. Rows go to the driver as they are, a third of the time
    that RETURNING takes."""

    def __init__(self, insert: Insert) -> None:
        compiled: Any = insert.compile(dialect=sqlite.dialect())
        self._insert: str = compiled.string
        self._values = itemgetter(*compiled.positiontup)
        self._find = select(_LEDGER.c.id).where(_LEDGER.c.id.in_(bindparam("ids", expanding=True)))

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> list[Row]:
        found = set(connection.execute(self._find, {"ids": [row["id"] for row in rows]}).scalars())
        new = [row for row in _distinct(rows) if row["id"] not in found]
        if new:
            connection.exec_driver_sql(self._insert, [self._values(row) for row in new])
        return new


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each id."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    return list(first.values())


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    for start in range(0, len(rows), _STATEMENT_ROWS):
        yield rows[start : start + _STATEMENT_ROWS]
