"""How rows get into the tables: inserts that ignore what is stored, and usage counted in the same transaction, for the rows that were new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter

from sqlalchemy import Connection, Table, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store.rows import TABLES, Row
from appliance.store.tables import RequestRow
from appliance.store.tally import ROLLUP, TOTALS, count_usage, fold_usage, usage_upsert

_STATEMENT_ROWS = 64  # of one statement, after which the event loop of an asynchronous driver is free again
_SQLITE_SIZES = (64, 16, 4, 1)  # of SQLite's statements, in rows

_LEDGER: Table = TABLES[RequestRow.__tablename__]

_Insert = postgresql.Insert | sqlite.Insert
_Execute = Callable[[Connection, Sequence[Row]], None]


class Statements:
    """The statements of one dialect, made once."""

    def __init__(self, dialect: str) -> None:
        is_sqlite = dialect != "postgresql"
        ignoring = {name: (sqlite if is_sqlite else postgresql).insert(table).on_conflict_do_nothing() for name, table in TABLES.items()}
        execute: Callable[[_Insert, Table], _Execute] = _SqliteRows if is_sqlite else lambda insert, _: _executemany(insert)
        self._insert_ledger: Callable[[Connection, Sequence[Row]], list[Row]] = _insert_into_sqlite() if is_sqlite else _insert_into_postgresql
        self._inserts = {name: execute(insert, TABLES[name]) for name, insert in ignoring.items() if name != _LEDGER.name}
        self._upserts = [(table, execute(usage_upsert(table, dialect), table)) for table in (ROLLUP, TOTALS)]

    def insert(self, connection: Connection, rows: Sequence[tuple[str, Row]]) -> None:
        """Store `rows`, each with the name of its table, in the connection's transaction."""
        for name, insert in self._inserts.items():
            for some in _chunks([row for table, row in rows if table == name]):
                insert(connection, some)
        requests = [row for table, row in rows if table == _LEDGER.name]
        stored = [row for some in _chunks(requests) for row in self._insert_ledger(connection, some)]
        if stored:
            hours = count_usage(stored)
            for table, upsert in self._upserts:
                for some in _chunks(fold_usage(hours, table)):
                    upsert(connection, some)


def _executemany(insert: _Insert) -> _Execute:
    def execute(connection: Connection, rows: Sequence[Row]) -> None:
        connection.execute(insert, rows)

    return execute


class _SqliteRows:
    """Many rows a statement. Python's driver gives the interpreter's lock up and takes it back for every row that it hands to SQLite, which costs a
    busy event loop in another thread ten times what the row does. The driver keeps statements of a few sizes prepared."""

    def __init__(self, insert: _Insert, table: Table) -> None:
        columns = [column.name for column in table.columns]
        self._values = itemgetter(*columns)
        dialect = sqlite.dialect()
        self._statements = {size: str(insert.values([dict.fromkeys(columns, 0)] * size).compile(dialect=dialect)) for size in _SQLITE_SIZES}

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> None:
        start = 0
        while start < len(rows):
            size = next(size for size in _SQLITE_SIZES if size <= len(rows) - start)
            values = map(self._values, rows[start : start + size])
            connection.exec_driver_sql(self._statements[size], tuple(chain.from_iterable(values)))
            start += size


def _insert_into_sqlite() -> Callable[[Connection, Sequence[Row]], list[Row]]:
    """The transaction holds the only write lock, so what it does not find is new, and nothing need be returned row by row."""
    insert = _SqliteRows(sqlite.insert(_LEDGER).on_conflict_do_nothing(), _LEDGER)
    find = select(_LEDGER.c.id).where(_LEDGER.c.id.in_(bindparam("ids", expanding=True)))

    def execute(connection: Connection, rows: Sequence[Row]) -> list[Row]:
        found = set(connection.execute(find, {"ids": [row["id"] for row in rows]}).scalars())
        new = [row for row in _distinct(rows) if row["id"] not in found]
        insert(connection, new)
        return new

    return execute


_RETURNING = postgresql.insert(_LEDGER).on_conflict_do_nothing().returning(_LEDGER.c.id)


def _insert_into_postgresql(connection: Connection, rows: Sequence[Row]) -> list[Row]:
    """The database says which rows were new: another transaction of ours, whose end was not heard, may be storing them at the same time."""
    new = set(connection.execute(_RETURNING, rows).scalars())
    return [row for row in _distinct(rows) if row["id"] in new]


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each id."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    return list(first.values())


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    for start in range(0, len(rows), _STATEMENT_ROWS):
        yield rows[start : start + _STATEMENT_ROWS]
