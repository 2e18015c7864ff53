"""How rows get into the tables: inserts that ignore what is stored, and usage counted in the same transaction, for the rows that were new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter

from sqlalchemy import Connection, Insert, Table, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store.rows import TABLES, Row
from appliance.store.tables import RequestRow
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage, usage_upsert

_STATEMENT_ROWS = 64  # of one statement, after which the event loop of an asynchronous driver is free again

_SIZES = (64, 16, 4, 1)  # of SQLite's statements, in rows

_LEDGER: Table = TABLES[RequestRow.__tablename__]


class Statements:
    """The statements of one dialect, made once."""

    def __init__(self, dialect: str) -> None:
        insert = (postgresql if dialect == "postgresql" else sqlite).insert
        self._inserts: dict[str, Insert] = {name: insert(table).on_conflict_do_nothing() for name, table in TABLES.items() if table is not _LEDGER}
        self._upserts = [(table, usage_upsert(table, dialect)) for table in (ROLLUP, TOTALS)]
        self._insert_ledger: Callable[[Connection, Sequence[Row]], list[Row]]
        self._insert_ledger = _ReturningInsert() if dialect == "postgresql" else _SqliteInsert()

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

    def __init__(self) -> None:
        self._insert = postgresql.insert(_LEDGER).on_conflict_do_nothing().returning(_LEDGER.c.id)

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> list[Row]:
        new = set(connection.execute(self._insert, rows).scalars())
        return [row for row in _distinct(rows) if row["id"] in new]


class _SqliteInsert:
    """The transaction holds the only write lock, so what it does not find is new, and nothing need be returned.

    Python's driver gives the interpreter's lock up and takes it back for every row that it hands to SQLite, which costs a busy event loop in another
    thread ten times what the row does: so many rows are one statement, of a few sizes that the driver keeps prepared.
    """

    def __init__(self) -> None:
        columns = [column.name for column in _LEDGER.columns]
        self._values = itemgetter(*columns)
        self._find = select(_LEDGER.c.id).where(_LEDGER.c.id.in_(bindparam("ids", expanding=True)))
        self._inserts = {size: self._compiled(columns, size) for size in _SIZES}

    @staticmethod
    def _compiled(columns: Sequence[str], size: int) -> str:
        rows = [dict.fromkeys(columns, "")] * size
        compiled = sqlite.insert(_LEDGER).values(rows).on_conflict_do_nothing().compile(dialect=sqlite.dialect())
        return str(compiled)

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> list[Row]:
        found = set(connection.execute(self._find, {"ids": [row["id"] for row in rows]}).scalars())
        new = [row for row in _distinct(rows) if row["id"] not in found]
        start = 0
        while start < len(new):
            size = next(size for size in _SIZES if size <= len(new) - start)
            values = [self._values(row) for row in new[start : start + size]]
            connection.exec_driver_sql(self._inserts[size], tuple(chain.from_iterable(values)))
            start += size
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
