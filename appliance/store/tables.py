"""The SQL tables. Portable between SQLite and PostgreSQL; alembic/ holds their history and a test holds the two together.

Times named `_wall` are Unix seconds. Every row says which instance of which fleet wrote it, so that several may share a PostgreSQL.
Ids and natural keys are made by the writer, never by the database: a row that is written twice is stored once.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

# BIGINT that still auto-increments in SQLite, where only INTEGER PRIMARY KEY does
_Serial = BigInteger().with_variant(Integer(), "sqlite")

_FAILED = text("status >= 400")

OUTBOX_STATES = ("pending", "delivered", "dead", "superseded")


class Base(DeclarativeBase):
    """Root of the tables. Constraints have names by convention, or Alembic could not drop them again."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {float: Double, int: BigInteger, dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 (read by SQLAlchemy, not shared state)


class RequestRow(Base):
    """The ledger: one finished request, whatever its end. Columns are RequestRecord's fields, its states one column each."""

    __tablename__ = "requests"
    __table_args__ = (
        Index(None, "received_wall", "duration_seconds"),
        Index(None, "client_request_id"),
        Index(None, "key_id", "received_wall"),
        Index(None, "duration_seconds", "received_wall"),  # the slowest of a time range, from this index or the first alone
        Index("ix_requests_failed_received_wall", "received_wall", sqlite_where=_FAILED, postgresql_where=_FAILED),
        Index("ix_requests_failed_key_id_received_wall", "key_id", "received_wall", sqlite_where=_FAILED, postgresql_where=_FAILED),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)  # UUIDv7
    instance_id: Mapped[str] = mapped_column(String(64))
    fleet: Mapped[str] = mapped_column(String(64))
    client_request_id: Mapped[str | None] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(256))
    key_id: Mapped[str] = mapped_column(String(128))
    stream: Mapped[bool]
    received_wall: Mapped[float]
    duration_seconds: Mapped[float]
    status: Mapped[int] = mapped_column(Integer)
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    error_code: Mapped[str | None] = mapped_column(String(64))
    num_choices: Mapped[int] = mapped_column(Integer)
    num_prompt_tokens: Mapped[int]
    num_cached_tokens: Mapped[int]
    num_generated_tokens: Mapped[int]
    num_written_tokens: Mapped[int]
    ttft_seconds: Mapped[float | None]
    tpot_seconds: Mapped[float | None]
    max_itl_seconds: Mapped[float | None]
    num_preemptions: Mapped[int] = mapped_column(Integer)
    num_engine_restarts: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int | None]
    max_tokens: Mapped[int | None]
    joules: Mapped[float | None]
    write_blocked_seconds: Mapped[float]
    detokenize_seconds: Mapped[float]
    decode_seconds: Mapped[float]
    grammar_seconds: Mapped[float]
    prefill_seconds: Mapped[float]
    prefill_wait_seconds: Mapped[float]
    preempted_seconds: Mapped[float]
    engine_restart_seconds: Mapped[float]
    queued_seconds: Mapped[float]
    admitted_seconds: Mapped[float]
    received_seconds: Mapped[float]
    ttft_good: Mapped[bool | None]  # within the objective when it finished; None where that does not apply
    tpot_good: Mapped[bool | None]


class _Usage:
    """What requests add up to, in both tables below."""

    num_requests: Mapped[int]
    num_errors: Mapped[int]  # status >= 500
    num_rejected: Mapped[int]  # 429 and 503
    num_aborted: Mapped[int]  # 499
    num_prompt_tokens: Mapped[int]
    num_cached_tokens: Mapped[int]
    num_generated_tokens: Mapped[int]
    num_written_tokens: Mapped[int]
    duration_seconds: Mapped[float]
    queued_seconds: Mapped[float]
    joules: Mapped[float | None]
    num_judged: Mapped[int]
    num_good: Mapped[int]
    num_ttft_judged: Mapped[int]
    num_ttft_good: Mapped[int]
    num_tpot_judged: Mapped[int]
    num_tpot_good: Mapped[int]
    num_good_tokens: Mapped[int]
    num_ttft: Mapped[int]  # requests that had a first token
    ttft_seconds: Mapped[float]  # sum over those
    max_ttft_seconds: Mapped[float | None]
    max_duration_seconds: Mapped[float | None]


class UsageRollupRow(_Usage, Base):
    """Requests by hour and by UTC day of their reception, instance, key and model. Outlives the ledger.

    The writer adds to it in the transaction that stores the ledger row, so that the two agree at any instant, and a row stored once counts once.
    """

    __tablename__ = "usage_rollup"
    # Clustered by its primary key: a time range lies together.
    __table_args__ = (Index(None, "key_id", "period_seconds", "start_wall"), {"sqlite_with_rowid": False})

    period_seconds: Mapped[int] = mapped_column(Integer, primary_key=True)  # 3600 or 86400
    start_wall: Mapped[float] = mapped_column(primary_key=True)  # a whole multiple of the period
    instance_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    fleet: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    model: Mapped[str] = mapped_column(String(256), primary_key=True)


class UsageTotalRow(_Usage, Base):
    """The same over all keys and models together: a month by hour is 720 rows of an instance, however many keys there are."""

    __tablename__ = "usage_totals"
    __table_args__ = ({"sqlite_with_rowid": False},)

    period_seconds: Mapped[int] = mapped_column(Integer, primary_key=True)
    start_wall: Mapped[float] = mapped_column(primary_key=True)
    instance_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    fleet: Mapped[str] = mapped_column(String(64), primary_key=True)


class SampleRow(Base):
    """The machine every few seconds: gauges at the instant, counts since the sample before. Columns are Sample's fields."""

    __tablename__ = "samples"
    __table_args__ = (Index(None, "at_wall"),)

    instance_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    at_wall: Mapped[float] = mapped_column(primary_key=True)
    fleet: Mapped[str] = mapped_column(String(64))
    period_seconds: Mapped[float]
    engine_state: Mapped[str] = mapped_column(String(16))
    num_requests: Mapped[int]
    num_errors: Mapped[int]
    num_rejected: Mapped[int]
    num_good_requests: Mapped[int]
    num_prompt_tokens: Mapped[int]
    num_cached_tokens: Mapped[int]
    num_generated_tokens: Mapped[int]
    num_surplus_tokens: Mapped[int]
    num_preemptions: Mapped[int]
    num_aborted: Mapped[int]
    num_steps: Mapped[int]
    step_seconds: Mapped[float]
    ttft_p50_seconds: Mapped[float | None]
    ttft_p95_seconds: Mapped[float | None]
    tpot_p50_seconds: Mapped[float | None]
    tpot_p95_seconds: Mapped[float | None]
    goodput: Mapped[float | None]
    num_running: Mapped[int]
    num_waiting: Mapped[int]
    oldest_waiting_age_seconds: Mapped[float]
    kv_utilisation: Mapped[float | None]
    kv_cached_share: Mapped[float | None]
    kv_waste: Mapped[float | None]
    cpu_utilisation: Mapped[float | None]
    memory_used_bytes: Mapped[int | None]
    server_cpu_seconds: Mapped[float | None]
    server_resident_bytes: Mapped[int | None]
    engine_cpu_seconds: Mapped[float | None]
    engine_resident_bytes: Mapped[int | None]
    gpu_utilisation: Mapped[float | None]
    gpu_memory_used_bytes: Mapped[int | None]
    gpu_power_watts: Mapped[float | None]
    gpu_temperature_celsius: Mapped[float | None]
    gpu_joules: Mapped[float | None]


class SampleRollupRow(Base):
    """Samples of one instance over a minute or an hour: counts and sums are sums, gauges are means over the samples, `max_` columns the greatest."""

    __tablename__ = "samples_rollup"
    __table_args__ = ({"sqlite_with_rowid": False},)

    resolution_seconds: Mapped[int] = mapped_column(Integer, primary_key=True)  # 60 or 3600
    start_wall: Mapped[float] = mapped_column(primary_key=True)
    instance_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    fleet: Mapped[str] = mapped_column(String(64))
    num_samples: Mapped[int]
    ready_share: Mapped[float]  # of the samples, those with the engine ready
    period_seconds: Mapped[float]
    num_requests: Mapped[int]
    num_errors: Mapped[int]
    num_rejected: Mapped[int]
    num_good_requests: Mapped[int]
    num_prompt_tokens: Mapped[int]
    num_cached_tokens: Mapped[int]
    num_generated_tokens: Mapped[int]
    num_surplus_tokens: Mapped[int]
    num_preemptions: Mapped[int]
    num_aborted: Mapped[int]
    num_steps: Mapped[int]
    step_seconds: Mapped[float]
    ttft_p50_seconds: Mapped[float | None]
    ttft_p95_seconds: Mapped[float | None]
    tpot_p50_seconds: Mapped[float | None]
    tpot_p95_seconds: Mapped[float | None]
    goodput: Mapped[float | None]
    num_running: Mapped[float]
    num_waiting: Mapped[float]
    oldest_waiting_age_seconds: Mapped[float]
    kv_utilisation: Mapped[float | None]
    kv_cached_share: Mapped[float | None]
    kv_waste: Mapped[float | None]
    cpu_utilisation: Mapped[float | None]
    memory_used_bytes: Mapped[float | None]
    server_cpu_seconds: Mapped[float | None]
    server_resident_bytes: Mapped[float | None]
    engine_cpu_seconds: Mapped[float | None]
    engine_resident_bytes: Mapped[float | None]
    gpu_utilisation: Mapped[float | None]
    gpu_memory_used_bytes: Mapped[float | None]
    gpu_power_watts: Mapped[float | None]
    gpu_temperature_celsius: Mapped[float | None]
    gpu_joules: Mapped[float | None]
    max_ttft_p95_seconds: Mapped[float | None]
    max_tpot_p95_seconds: Mapped[float | None]
    max_num_running: Mapped[int]
    max_num_waiting: Mapped[int]
    max_oldest_waiting_age_seconds: Mapped[float]
    max_kv_utilisation: Mapped[float | None]
    max_memory_used_bytes: Mapped[int | None]
    max_gpu_memory_used_bytes: Mapped[int | None]
    max_gpu_power_watts: Mapped[float | None]
    max_gpu_temperature_celsius: Mapped[float | None]


class ScaleDecisionRow(Base):
    """One change of the desired number of replicas with its inputs, alternatives and reason; what came of it is filled in later."""

    __tablename__ = "scale_decisions"
    __table_args__ = (UniqueConstraint("instance_id", "sequence"), Index(None, "at_wall"))

    id: Mapped[str] = mapped_column(String(36), primary_key=True)  # UUIDv7
    sequence: Mapped[int]
    instance_id: Mapped[str] = mapped_column(String(64))
    fleet: Mapped[str] = mapped_column(String(64))
    at_wall: Mapped[float]
    expires_wall: Mapped[float]
    direction: Mapped[str] = mapped_column(String(16))
    current_replicas: Mapped[int] = mapped_column(Integer)
    desired_replicas: Mapped[int] = mapped_column(Integer)
    reason: Mapped[str] = mapped_column(Text)
    inputs: Mapped[dict[str, Any]]
    alternatives: Mapped[list[str]]
    mode: Mapped[str] = mapped_column(String(16))
    approved_wall: Mapped[float | None]
    approved_by: Mapped[str | None] = mapped_column(String(128))
    outcome: Mapped[str | None] = mapped_column(Text)


class OutboxRow(Base):
    """A signal on its way to one endpoint. Written in the transaction of its decision; only the courier changes it afterwards."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "state", "next_attempt_wall"), Index(None, "endpoint", "sequence"), Index(None, "created_wall"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)  # the webhook-id, the same for every attempt
    decision_id: Mapped[str] = mapped_column(String(36), ForeignKey("scale_decisions.id", ondelete="CASCADE"), index=True)
    instance_id: Mapped[str] = mapped_column(String(64))
    fleet: Mapped[str] = mapped_column(String(64))
    endpoint: Mapped[str] = mapped_column(Text)
    sequence: Mapped[int]
    body: Mapped[str] = mapped_column(Text)  # what is signed and sent, byte for byte (JSON, UTF-8)
    created_wall: Mapped[float]
    expires_wall: Mapped[float]
    state: Mapped[str] = mapped_column(String(16), default="pending")  # one of OUTBOX_STATES
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_wall: Mapped[float]
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    # for the order of inserts in one session; never loaded by itself
    decision: Mapped[ScaleDecisionRow] = relationship(lazy="raise")


class DeliveryRow(Base):
    """One attempt to deliver one outbox row."""

    __tablename__ = "deliveries"
    __table_args__ = (Index(None, "at_wall"),)

    id: Mapped[int] = mapped_column(_Serial, primary_key=True, autoincrement=True)
    outbox_id: Mapped[str] = mapped_column(String(64), ForeignKey("outbox.id", ondelete="CASCADE"), index=True)
    instance_id: Mapped[str] = mapped_column(String(64))
    fleet: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int] = mapped_column(Integer)  # from 1
    at_wall: Mapped[float]
    duration_seconds: Mapped[float]
    status: Mapped[int | None] = mapped_column(Integer)  # HTTP status; None where no answer came
    error: Mapped[str | None] = mapped_column(Text)
    signal: Mapped[OutboxRow] = relationship(lazy="raise")


class EngineEventRow(Base):
    """Something that happened to the engine process."""

    __tablename__ = "engine_events"
    __table_args__ = (Index(None, "at_wall"),)

    instance_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    at_wall: Mapped[float] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    fleet: Mapped[str] = mapped_column(String(64))
    detail: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    num_in_flight: Mapped[int] = mapped_column(Integer)
