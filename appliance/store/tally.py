"""Adds ledger rows to `usage_rollup` and `usage_totals`, in the transaction that stores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, Table, case
from sqlalchemy.dialects import postgresql, sqlite

from appliance.store.rows import Row
from appliance.store.tables import UsageRollupRow, UsageTotalRow

PERIODS_SECONDS = (3600, 86400)

ROLLUP: Table = UsageRollupRow.metadata.tables[UsageRollupRow.__tablename__]
TOTALS: Table = UsageTotalRow.metadata.tables[UsageTotalRow.__tablename__]

_TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens", "num_written_tokens")
_EMPTY: Row = {
    column.name: None if column.nullable else 0.0 if column.name.endswith("_seconds") else 0 for column in TOTALS.columns if not column.primary_key
}


def count_usage(requests: Iterable[Row]) -> list[Row]:
    """Ledger rows as rows of ROLLUP, by hour alone: one for each hour, instance, key and model."""
    names = tuple(column.name for column in ROLLUP.primary_key.columns)
    hour = PERIODS_SECONDS[0]
    groups: dict[tuple[Any, ...], Row] = {}
    for request in requests:
        key = (hour, float(request["received_wall"] // hour * hour), *[request[name] for name in names[2:]])
        group = groups.get(key)
        if group is None:
            group = groups[key] = dict(zip(names, key, strict=True)) | _EMPTY
        _count(group, request)
    return list(groups.values())


def fold_usage(hours: Iterable[Row], table: Table) -> list[Row]:
    """What `count_usage` counted as rows of `table`, ROLLUP or TOTALS: one for each hour and UTC day and the rest of its key, in its order."""
    names = tuple(column.name for column in table.primary_key.columns)
    groups: dict[tuple[Any, ...], Row] = {}
    for one in hours:
        for period in PERIODS_SECONDS:
            key = (period, float(one["start_wall"] // period * period), *[one[name] for name in names[2:]])
            group = groups.get(key)
            if group is None:
                group = groups[key] = dict(zip(names, key, strict=True)) | _EMPTY
            _add(group, one)
    return [groups[key] for key in sorted(groups)]


def usage_upsert(table: Table, dialect: str) -> postgresql.Insert | sqlite.Insert:
    """The statement that adds such rows to what is stored."""
    insert: postgresql.Insert | sqlite.Insert = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    changes: dict[str, ColumnElement[Any]] = {}
    for column in table.columns:
        stored, new = column, insert.excluded[column.name]
        if column.primary_key:
            continue
        if column.name.startswith("max_"):
            changes[column.name] = case((stored.is_(None), new), (new > stored, new), else_=stored)
        elif column.nullable:
            changes[column.name] = case((stored.is_(None), new), (new.is_(None), stored), else_=stored + new)
        else:
            changes[column.name] = stored + new
    return insert.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=changes)


def _count(group: Row, request: Row) -> None:
    """Add one request."""
    status = request["status"]
    group["num_requests"] += 1
    group["num_errors"] += status >= 500
    group["num_rejected"] += status in (429, 503)
    group["num_aborted"] += status == 499
    for name in _TOKENS:
        group[name] += request[name]
    group["duration_seconds"] += request["duration_seconds"]
    group["queued_seconds"] += request["queued_seconds"]
    if request["joules"] is not None:
        group["joules"] = (group["joules"] or 0.0) + request["joules"]
    ttft_good, tpot_good = request["ttft_good"], request["tpot_good"]
    if ttft_good is not None or tpot_good is not None:
        good = ttft_good is not False and tpot_good is not False
        group["num_judged"] += 1
        group["num_good"] += good
        group["num_good_tokens"] += request["num_generated_tokens"] if good else 0
        group["num_ttft_judged"] += ttft_good is not None
        group["num_ttft_good"] += ttft_good is True
        group["num_tpot_judged"] += tpot_good is not None
        group["num_tpot_good"] += tpot_good is True
    ttft = request["ttft_seconds"]
    if ttft is not None:
        group["num_ttft"] += 1
        group["ttft_seconds"] += ttft
        group["max_ttft_seconds"] = max(ttft, group["max_ttft_seconds"] or 0.0)
    group["max_duration_seconds"] = max(request["duration_seconds"], group["max_duration_seconds"] or 0.0)


def _add(group: Row, other: Row) -> None:
    """Add what another group counted, as `usage_upsert` does."""
    for name in _EMPTY:
        more, so_far = other[name], group[name]
        if so_far is None or more is None:
            group[name] = more if so_far is None else so_far
        else:
            group[name] = max(so_far, more) if name.startswith("max_") else so_far + more
