"""What the policy asks for, why, and whether anyone heard it. The decisions are annotations on every Prometheus board; here with their reasons."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import BAD_ABOVE_ZERO, lines, number, sql_table
from boards.promql import attainment, highest, increase, rate, total

_DECISIONS = (
    "SELECT to_timestamp(at_wall) AS at, instance_id AS instance, direction, current_replicas AS from, desired_replicas AS to, reason, mode, "
    "coalesce(approved_by, '') AS approved_by, coalesce(outcome, '') AS outcome "
    "FROM scale_decisions WHERE $__unixEpochFilter(at_wall) ORDER BY at_wall DESC LIMIT 200"
)
_DELIVERIES = (
    "SELECT to_timestamp(d.at_wall) AS at, o.instance_id AS instance, o.endpoint, o.sequence, d.attempt, d.status, "
    "coalesce(d.error, '') AS error, o.state AS signal FROM deliveries d JOIN outbox o ON o.id = d.outbox_id "
    "WHERE $__unixEpochFilter(d.at_wall) ORDER BY d.at_wall DESC LIMIT 200"
)

_WANTED = [
    lines(
        "Replicas wanted",
        [(highest("scaling_desired_replicas", "instance"), "{{instance}}")],
        "none",
        "What the policy of each instance asks for; marks are its decisions.",
        width=16,
    ),
    lines("Decisions", [(increase("scaling_decisions_total", "direction"), "{{direction}}")], "none", "Changes of the number."),
    number("Pinned at max", highest("scaling_pinned"), "none", "1 while more than max_replicas is wanted.", steps=BAD_ABOVE_ZERO, width=6),
    number(
        "Age of the policy loop",
        highest("scaling_run_age_seconds"),
        "s",
        "Time since its newest run.",
        steps=((None, "green"), (60.0, "red")),
        width=6,
    ),
    number("Runs of the policy", rate("scaling_runs_total"), "ops", "Looks a second.", width=6),
    number("Signals waiting", total("webhook_pending"), "none", "Not yet delivered.", width=6),
]

_INPUTS = [
    lines("SLO attainment", [(attainment(o), o) for o in ("ttft", "tpot")], "percentunit", "What the policy wants to hold.", low=None),
    lines(
        "Wait for the first token, live",
        [(highest("oldest_waiting_age_seconds"), "oldest waiting"), (highest("predicted_ttft_seconds"), "predicted, of one that arrives now")],
        "s",
        "The fastest sign of too little capacity.",
    ),
    lines("Refused for want of capacity", [(rate("rejections_total", "code"), "{{code}}")], "reqps", "At admission."),
    lines(
        "Demand",
        [(total("demand_prompt_tokens_per_second"), "prompt"), (total("demand_output_tokens_per_second"), "output, expected")],
        "cps",
        "Tokens a second at admission, over the policy's fast window.",
    ),
    lines("KV use", [(highest("kv_utilisation_ratio"), "used")], "percentunit", "Above the policy's limit it asks for more."),
    lines("Signals", [(increase("webhook_deliveries_total", "outcome"), "{{outcome}}")], "none", "Attempts and ends of deliveries."),
]

_WHY = [
    sql_table("Decisions with their reasons", _DECISIONS, "Newest first, from SQL."),
    sql_table("Deliveries", _DELIVERIES, "Attempts to deliver a signal, newest first, from SQL."),
]

BOARD = Board(
    "appliance-scaling",
    "Appliance: scaling",
    "Replicas wanted, the decisions and their inputs, and the delivery of the signals. The last row needs the PostgreSQL data source.",
    [("Wanted", _WANTED), ("Inputs", _INPUTS), ("Reasons (SQL)", _WHY)],
    source="both",
    hours=6,
)
