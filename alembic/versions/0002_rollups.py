"""Rollups of samples and of usage, the SLO's verdict on each request, and indexes for failures and the slowest.

What the ledger holds is added up into `usage_rollup` here, once; from then on the writer keeps it. Its requests count as not judged.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_USAGE_COUNTS = ("num_requests", "num_errors", "num_rejected", "num_aborted", "num_prompt_tokens", "num_cached_tokens", "num_generated_tokens")
_JUDGED_COUNTS = ("num_judged", "num_good", "num_ttft_judged", "num_ttft_good", "num_tpot_judged", "num_tpot_good", "num_good_tokens")
_SAMPLE_COUNTS = (
    "num_requests",
    "num_errors",
    "num_rejected",
    "num_good_requests",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_generated_tokens",
    "num_surplus_tokens",
    "num_preemptions",
    "num_aborted",
    "num_steps",
)
_SAMPLE_MEANS = (
    "kv_utilisation",
    "kv_cached_share",
    "kv_waste",
    "cpu_utilisation",
    "memory_used_bytes",
    "server_cpu_seconds",
    "server_resident_bytes",
    "engine_cpu_seconds",
    "engine_resident_bytes",
    "gpu_utilisation",
    "gpu_memory_used_bytes",
    "gpu_power_watts",
    "gpu_temperature_celsius",
    "gpu_joules",
)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False)


def _real(name: str, *, nullable: bool = True) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=nullable)


def upgrade() -> None:
    op.add_column("requests", sa.Column("ttft_good", sa.Boolean(), nullable=True))
    op.add_column("requests", sa.Column("tpot_good", sa.Boolean(), nullable=True))
    op.create_index(op.f("ix_requests_duration_seconds_received_wall"), "requests", ["duration_seconds", "received_wall"])
    failed = sa.text("status >= 400")
    op.create_index("ix_requests_failed_received_wall", "requests", ["received_wall"], sqlite_where=failed, postgresql_where=failed)
    op.create_index("ix_requests_failed_key_id_received_wall", "requests", ["key_id", "received_wall"], sqlite_where=failed, postgresql_where=failed)
    op.create_index(op.f("ix_requests_received_wall_duration_seconds"), "requests", ["received_wall", "duration_seconds"])
    op.drop_index(op.f("ix_requests_received_wall"), "requests")

    for table, key in (("usage_rollup", ("key_id", "model")), ("usage_totals", ())):
        op.create_table(
            table,
            sa.Column("period_seconds", sa.Integer(), nullable=False),
            _real("start_wall", nullable=False),
            sa.Column("instance_id", sa.String(length=64), nullable=False),
            sa.Column("fleet", sa.String(length=64), nullable=False),
            *(sa.Column(name, sa.String(length=length), nullable=False) for name, length in (("key_id", 128), ("model", 256)) if name in key),
            *(_count(name) for name in _USAGE_COUNTS),
            _count("num_written_tokens"),
            _real("duration_seconds", nullable=False),
            _real("queued_seconds", nullable=False),
            _real("joules"),
            *(_count(name) for name in _JUDGED_COUNTS),
            _count("num_ttft"),
            _real("ttft_seconds", nullable=False),
            _real("max_ttft_seconds"),
            _real("max_duration_seconds"),
            sa.PrimaryKeyConstraint("period_seconds", "start_wall", "instance_id", "fleet", *key, name=op.f(f"pk_{table}")),
            sqlite_with_rowid=False,
        )
    op.create_index(op.f("ix_usage_rollup_key_id_period_seconds_start_wall"), "usage_rollup", ["key_id", "period_seconds", "start_wall"])

    op.create_table(
        "samples_rollup",
        sa.Column("resolution_seconds", sa.Integer(), nullable=False),
        _real("start_wall", nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        _count("num_samples"),
        _real("ready_share", nullable=False),
        _real("period_seconds", nullable=False),
        *(_count(name) for name in _SAMPLE_COUNTS),
        _real("step_seconds", nullable=False),
        *(_real(name) for name in ("ttft_p50_seconds", "ttft_p95_seconds", "tpot_p50_seconds", "tpot_p95_seconds", "goodput")),
        *(_real(name, nullable=False) for name in ("num_running", "num_waiting", "oldest_waiting_age_seconds")),
        *(_real(name) for name in _SAMPLE_MEANS),
        _real("max_ttft_p95_seconds"),
        _real("max_tpot_p95_seconds"),
        _count("max_num_running"),
        _count("max_num_waiting"),
        _real("max_oldest_waiting_age_seconds", nullable=False),
        _real("max_kv_utilisation"),
        sa.Column("max_memory_used_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_gpu_memory_used_bytes", sa.BigInteger(), nullable=True),
        _real("max_gpu_power_watts"),
        _real("max_gpu_temperature_celsius"),
        sa.PrimaryKeyConstraint("resolution_seconds", "start_wall", "instance_id", name=op.f("pk_samples_rollup")),
        sqlite_with_rowid=False,
    )
    for period_seconds in (3600, 86400):
        _add_up(period_seconds)


def downgrade() -> None:
    op.drop_table("samples_rollup")
    op.drop_table("usage_totals")
    op.drop_table("usage_rollup")
    op.create_index(op.f("ix_requests_received_wall"), "requests", ["received_wall"])
    op.drop_index(op.f("ix_requests_received_wall_duration_seconds"), "requests")
    op.drop_index("ix_requests_failed_key_id_received_wall", "requests")
    op.drop_index("ix_requests_failed_received_wall", "requests")
    op.drop_index("ix_requests_duration_seconds_received_wall", "requests")
    op.drop_column("requests", "tpot_good")
    op.drop_column("requests", "ttft_good")


def _add_up(period_seconds: int) -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"  # which may lack floor(), while PostgreSQL's CAST rounds
    start = f"CAST(received_wall / {period_seconds} AS INTEGER)" if sqlite else f"floor(received_wall / {period_seconds})"
    sums = {
        "num_requests": "count(*)",
        "num_errors": "sum(CASE WHEN status >= 500 THEN 1 ELSE 0 END)",
        "num_rejected": "sum(CASE WHEN status IN (429, 503) THEN 1 ELSE 0 END)",
        "num_aborted": "sum(CASE WHEN status = 499 THEN 1 ELSE 0 END)",
        **{name: f"sum({name})" for name in ("num_prompt_tokens", "num_cached_tokens", "num_generated_tokens", "num_written_tokens")},
        "duration_seconds": "sum(duration_seconds)",
        "queued_seconds": "sum(queued_seconds)",
        "joules": "sum(joules)",
        **dict.fromkeys(_JUDGED_COUNTS, "0"),
        "num_ttft": "count(ttft_seconds)",
        "ttft_seconds": "coalesce(sum(ttft_seconds), 0)",
        "max_ttft_seconds": "max(ttft_seconds)",
        "max_duration_seconds": "max(duration_seconds)",
    }
    by = f"{start} * {period_seconds}"
    for table, key in (("usage_rollup", "instance_id, fleet, key_id, model"), ("usage_totals", "instance_id, fleet")):
        statement = f"INSERT INTO {table} (period_seconds, start_wall, {key}, {', '.join(sums)}) "
        statement += f"SELECT {period_seconds}, {by}, {key}, {', '.join(sums.values())} FROM requests GROUP BY {by}, {key}"  # noqa: S608 (our names)
        op.execute(statement)
