"""From records to rows: the one place that knows which column a field becomes."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from sqlalchemy import String, Table

from appliance.events import EngineEvent, LedgerState, RequestRecord, Sample
from appliance.store.tables import EngineEventRow, RequestRow, SampleRow

Record = RequestRecord | Sample | EngineEvent
Row = dict[str, Any]

TABLES: dict[str, Table] = {row.__tablename__: row.metadata.tables[row.__tablename__] for row in (RequestRow, SampleRow, EngineEventRow)}
_LENGTHS = {name: {c.name: c.type.length for c in table.columns if isinstance(c.type, String)} for name, table in TABLES.items()}
_STATE_COLUMNS = tuple((state.value, f"{state.value}_seconds") for state in LedgerState)


class Verdict(Protocol):
    """Whether a request kept the SLO, by objective; None where it does not apply."""

    @property
    def ttft(self) -> bool | None: ...
    @property
    def tpot(self) -> bool | None: ...


def row_of(record: Record, instance_id: str, fleet: str, verdict: Verdict | None = None) -> tuple[str, Row]:
    """The table's name and the row's columns; `verdict` is a request's.

    Text is cut to its column, and what no database can hold (NUL, lone surrogates) is replaced: a hostile header must not cost a row.
    """
    if isinstance(record, RequestRecord):
        name = RequestRow.__tablename__
        row = msgspec.structs.asdict(record)
        states = row.pop("states")
        for state, column in _STATE_COLUMNS:
            row[column] = states.get(state, 0.0)
        row["ttft_good"], row["tpot_good"] = (None, None) if verdict is None else (verdict.ttft, verdict.tpot)
    else:
        name = SampleRow.__tablename__ if isinstance(record, Sample) else EngineEventRow.__tablename__
        row = msgspec.structs.asdict(record)
    row["instance_id"], row["fleet"] = instance_id, fleet
    for column, length in _LENGTHS[name].items():
        if row[column] is not None:
            row[column] = _storable(row[column], length)
    return name, row


def completed(name: str, row: Row) -> Row:
    """A row that an older version spooled, with the columns that it did not know; those that no table has any more are left out."""
    columns = TABLES[name].columns
    return {column.name: row.get(column.name) for column in columns}


def _storable(value: str, length: int | None) -> str:
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode()
    return value.replace("\0", "?")[:length]
