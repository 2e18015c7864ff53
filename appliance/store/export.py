"""Tables and named queries as flat rows, to CSV or Parquet: what `appliance db export` does. Rows are read and written in chunks."""

from __future__ import annotations

import csv
import dataclasses
import json
import types
import typing
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import BigInteger, Boolean, Double, Integer, Table, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.store import queries
from appliance.store.database import Database
from appliance.store.queries import HourSlo, HourUsage, KeyUsage, Prices
from appliance.store.tables import Base

_CHUNK_ROWS = 1000
_TIMES = ("received_wall", "at_wall", "start_wall", "created_wall")  # of the tables, the first that one has

Rows = AsyncIterator[Sequence[dict[str, Any]]]


class NotExportable(Exception):
    """The export cannot be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Column:
    """Name and type of a column: int, float, bool or str. Any may be missing (None)."""

    name: str
    type: type


@dataclass(frozen=True, slots=True)
class Range:
    """What to export: Unix seconds [since, until), and how many rows at most."""

    since_wall: float
    until_wall: float
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Something that can be exported."""

    columns: tuple[Column, ...]
    rows: Callable[[AsyncSession, Range], Rows]


def sources(prices: Prices) -> dict[str, Source]:
    """Every table and named query by name."""
    found = {name: _of_table(table) for name, table in Base.metadata.tables.items()}

    def add(name: str, result: type, query: Callable[[AsyncSession, Range], Any]) -> None:
        found[name] = Source(_columns_of(result), _chunks_of(query))

    add("usage_by_key", KeyUsage, lambda s, r: queries.usage_by_key(s, since_wall=r.since_wall, until_wall=r.until_wall, prices=prices))
    add("usage_by_hour", HourUsage, lambda s, r: queries.usage_by_hour(s, since_wall=r.since_wall, until_wall=r.until_wall))
    add("slo_by_hour", HourSlo, lambda s, r: queries.slo_by_hour(s, since_wall=r.since_wall, until_wall=r.until_wall))
    add("busiest_hours", HourUsage, lambda s, r: queries.busiest_hours(s, since_wall=r.since_wall, until_wall=r.until_wall, limit=r.limit or 10))
    found["slowest_requests"] = Source(found["requests"].columns, _slowest)
    return found


async def write_csv(database: Database, source: Source, of: Range, file: IO[str]) -> int:
    """RFC 4180 with a header line; true and false, nothing where a value is missing, JSON as text. Returns the rows."""
    writer = csv.writer(file)
    writer.writerow([column.name for column in source.columns])
    num_rows = 0
    async with database.session() as session:
        async for rows in source.rows(session, of):
            writer.writerows([_text(row[column.name]) for column in source.columns] for row in rows)
            num_rows += len(rows)
    return num_rows


async def write_parquet(database: Database, source: Source, of: Range, path: Path) -> int:
    """Parquet with zstd; JSON as text. Returns the rows. Raises NotExportable without the extra `parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise NotExportable("Parquet needs pyarrow: pip install 'inference-appliance[parquet]', or --format csv") from error
    arrow = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(), str: pyarrow.string()}
    schema = pyarrow.schema([pyarrow.field(column.name, arrow[column.type]) for column in source.columns])
    num_rows = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        async with database.session() as session:
            async for rows in source.rows(session, of):
                plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
                writer.write_table(pyarrow.Table.from_pylist(plain, schema=schema))
                num_rows += len(rows)
    return num_rows


def _of_table(table: Table) -> Source:
    types_ = {Boolean: bool, Integer: int, BigInteger: int, Double: float}
    columns = tuple(Column(c.name, next((python for sql, python in types_.items() if isinstance(c.type, sql)), str)) for c in table.columns)
    at = next(table.c[name] for name in _TIMES if name in table.c)

    async def rows(session: AsyncSession, of: Range) -> Rows:
        query = select(table).where(at >= of.since_wall, at < of.until_wall).order_by(at).limit(of.limit)
        result = await session.stream(query.execution_options(yield_per=_CHUNK_ROWS))
        async for part in result.mappings().partitions(_CHUNK_ROWS):
            yield [dict(row) for row in part]

    return Source(columns, rows)


def _chunks_of(query: Callable[[AsyncSession, Range], Any]) -> Callable[[AsyncSession, Range], Rows]:
    async def rows(session: AsyncSession, of: Range) -> Rows:
        yield [_flat(item) for item in (await query(session, of))[: of.limit]]

    return rows


async def _slowest(session: AsyncSession, of: Range) -> Rows:
    found = await queries.slowest_requests(session, since_wall=of.since_wall, until_wall=of.until_wall, limit=of.limit or 20)
    table = Base.metadata.tables["requests"]
    ids = [stored.record.id for stored in found]
    rows = (await session.execute(select(table).where(table.c.id.in_(ids)).order_by(table.c.duration_seconds.desc()))).mappings()
    yield [dict(row) for row in rows]


def _columns_of(result: type) -> tuple[Column, ...]:
    """The fields of a dataclass, those of dataclasses in it in their place."""
    columns: list[Column] = []
    for name, hint in typing.get_type_hints(result).items():
        if dataclasses.is_dataclass(hint):
            columns += _columns_of(typing.cast(type, hint))
        else:
            known = [part for part in typing.get_args(hint) if part is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
            columns.append(Column(name, known[0]))
    return tuple(columns)


def _flat(item: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        row |= _flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return row


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _text(value: Any) -> Any:
    return ("true" if value else "false") if isinstance(value, bool) else _plain(value)
