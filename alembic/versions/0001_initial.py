"""The ledger, samples, scale decisions with their outbox, and engine events.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "engine_events",
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("at_wall", sa.Double(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("num_in_flight", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("instance_id", "at_wall", "kind", name=op.f("pk_engine_events")),
    )
    op.create_index(op.f("ix_engine_events_at_wall"), "engine_events", ["at_wall"])

    op.create_table(
        "requests",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("client_request_id", sa.String(length=64), nullable=True),
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=256), nullable=False),
        sa.Column("key_id", sa.String(length=128), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("received_wall", sa.Double(), nullable=False),
        sa.Column("duration_seconds", sa.Double(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("finish_reason", sa.String(length=32), nullable=True),
        sa.Column("error_code", sa.String(length=64), nullable=True),
        sa.Column("num_choices", sa.Integer(), nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_written_tokens", sa.BigInteger(), nullable=False),
        sa.Column("ttft_seconds", sa.Double(), nullable=True),
        sa.Column("tpot_seconds", sa.Double(), nullable=True),
        sa.Column("max_itl_seconds", sa.Double(), nullable=True),
        sa.Column("num_preemptions", sa.Integer(), nullable=False),
        sa.Column("num_engine_restarts", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("max_tokens", sa.BigInteger(), nullable=True),
        sa.Column("joules", sa.Double(), nullable=True),
        sa.Column("write_blocked_seconds", sa.Double(), nullable=False),
        sa.Column("detokenize_seconds", sa.Double(), nullable=False),
        sa.Column("decode_seconds", sa.Double(), nullable=False),
        sa.Column("grammar_seconds", sa.Double(), nullable=False),
        sa.Column("prefill_seconds", sa.Double(), nullable=False),
        sa.Column("prefill_wait_seconds", sa.Double(), nullable=False),
        sa.Column("preempted_seconds", sa.Double(), nullable=False),
        sa.Column("engine_restart_seconds", sa.Double(), nullable=False),
        sa.Column("queued_seconds", sa.Double(), nullable=False),
        sa.Column("admitted_seconds", sa.Double(), nullable=False),
        sa.Column("received_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_client_request_id"), "requests", ["client_request_id"])
    op.create_index(op.f("ix_requests_key_id_received_wall"), "requests", ["key_id", "received_wall"])
    op.create_index(op.f("ix_requests_received_wall"), "requests", ["received_wall"])

    op.create_table(
        "samples",
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("at_wall", sa.Double(), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("period_seconds", sa.Double(), nullable=False),
        sa.Column("engine_state", sa.String(length=16), nullable=False),
        sa.Column("num_requests", sa.BigInteger(), nullable=False),
        sa.Column("num_errors", sa.BigInteger(), nullable=False),
        sa.Column("num_rejected", sa.BigInteger(), nullable=False),
        sa.Column("num_good_requests", sa.BigInteger(), nullable=False),
        sa.Column("num_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_surplus_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_preemptions", sa.BigInteger(), nullable=False),
        sa.Column("num_aborted", sa.BigInteger(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("step_seconds", sa.Double(), nullable=False),
        sa.Column("ttft_p50_seconds", sa.Double(), nullable=True),
        sa.Column("ttft_p95_seconds", sa.Double(), nullable=True),
        sa.Column("tpot_p50_seconds", sa.Double(), nullable=True),
        sa.Column("tpot_p95_seconds", sa.Double(), nullable=True),
        sa.Column("goodput", sa.Double(), nullable=True),
        sa.Column("num_running", sa.BigInteger(), nullable=False),
        sa.Column("num_waiting", sa.BigInteger(), nullable=False),
        sa.Column("oldest_waiting_age_seconds", sa.Double(), nullable=False),
        sa.Column("kv_utilisation", sa.Double(), nullable=True),
        sa.Column("kv_cached_share", sa.Double(), nullable=True),
        sa.Column("kv_waste", sa.Double(), nullable=True),
        sa.Column("cpu_utilisation", sa.Double(), nullable=True),
        sa.Column("memory_used_bytes", sa.BigInteger(), nullable=True),
        sa.Column("server_cpu_seconds", sa.Double(), nullable=True),
        sa.Column("server_resident_bytes", sa.BigInteger(), nullable=True),
        sa.Column("engine_cpu_seconds", sa.Double(), nullable=True),
        sa.Column("engine_resident_bytes", sa.BigInteger(), nullable=True),
        sa.Column("gpu_utilisation", sa.Double(), nullable=True),
        sa.Column("gpu_memory_used_bytes", sa.BigInteger(), nullable=True),
        sa.Column("gpu_power_watts", sa.Double(), nullable=True),
        sa.Column("gpu_temperature_celsius", sa.Double(), nullable=True),
        sa.Column("gpu_joules", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("instance_id", "at_wall", name=op.f("pk_samples")),
    )
    op.create_index(op.f("ix_samples_at_wall"), "samples", ["at_wall"])

    op.create_table(
        "scale_decisions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("at_wall", sa.Double(), nullable=False),
        sa.Column("expires_wall", sa.Double(), nullable=False),
        sa.Column("direction", sa.String(length=16), nullable=False),
        sa.Column("current_replicas", sa.Integer(), nullable=False),
        sa.Column("desired_replicas", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("alternatives", sa.JSON(), nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("approved_wall", sa.Double(), nullable=True),
        sa.Column("approved_by", sa.String(length=128), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scale_decisions")),
        sa.UniqueConstraint("instance_id", "sequence", name=op.f("uq_scale_decisions_instance_id_sequence")),
    )
    op.create_index(op.f("ix_scale_decisions_at_wall"), "scale_decisions", ["at_wall"])

    op.create_table(
        "outbox",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("decision_id", sa.String(length=36), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_wall", sa.Double(), nullable=False),
        sa.Column("expires_wall", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_wall", sa.Double(), nullable=False),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["decision_id"], ["scale_decisions.id"], name=op.f("fk_outbox_decision_id_scale_decisions"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(op.f("ix_outbox_created_wall"), "outbox", ["created_wall"])
    op.create_index(op.f("ix_outbox_decision_id"), "outbox", ["decision_id"])
    op.create_index(op.f("ix_outbox_endpoint_sequence"), "outbox", ["endpoint", "sequence"])
    op.create_index(op.f("ix_outbox_state_next_attempt_wall"), "outbox", ["state", "next_attempt_wall"])

    op.create_table(
        "deliveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("outbox_id", sa.String(length=64), nullable=False),
        sa.Column("instance_id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at_wall", sa.Double(), nullable=False),
        sa.Column("duration_seconds", sa.Double(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["outbox_id"], ["outbox.id"], name=op.f("fk_deliveries_outbox_id_outbox"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index(op.f("ix_deliveries_at_wall"), "deliveries", ["at_wall"])
    op.create_index(op.f("ix_deliveries_outbox_id"), "deliveries", ["outbox_id"])


def downgrade() -> None:

    op.drop_table("deliveries")
    op.drop_table("outbox")
    op.drop_table("scale_decisions")
    op.drop_table("samples")
    op.drop_table("requests")
    op.drop_table("engine_events")
