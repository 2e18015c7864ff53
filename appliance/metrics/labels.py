"""The sets that bound the metrics' label values. What is outside of its set is counted as "other": a user cannot make series."""

from __future__ import annotations

from appliance.metrics.goodput import GENERATION_ENDPOINTS

ENGINE_STATES = ("starting", "ready", "restarting", "failed", "stopped")
EVENT_KINDS = frozenset({"started", "ready", "crashed", "hung", "restarting", "stopped", "failed"})
ENGINE_GONE = frozenset({"crashed", "hung", "stopped", "failed"})  # events after which the newest step says nothing about now
ENDPOINTS = GENERATION_ENDPOINTS | {"/v1/models", "/v1/embeddings", "/tokenize", "/detokenize", "/health", "/ready", "/version", "/metrics"}
STATUSES = frozenset({200, 400, 401, 403, 404, 405, 413, 415, 422, 429, 499, 500, 503, 504})
FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "abort", "error", "deadline"})
REJECTIONS = frozenset(
    {
        *("queue_full", "unavailable", "rate_limit_exceeded"),
        *("loading", "engine_restarting", "engine_stopped", "draining", "shutting_down", "aborted"),
    }
)
SHED = frozenset({"queue_full", "unavailable"})  # of the rejections, those that another replica would have served
PHASES = ("schedule", "launch", "wait", "output")
DIRECTIONS = frozenset({"up", "down", "pinned"})
OUTCOMES = frozenset({"delivered", "failed", "dead", "superseded"})
THROTTLE_REASONS = ("sw_power_cap", "hw_slowdown", "sync_boost", "sw_thermal", "hw_thermal", "hw_power_brake")


def bounded(value: str, known: frozenset[str]) -> str:
    """`value` if it is known, else "other"."""
    return value if value in known else "other"


def status_label(status: int) -> str:
    """The status itself where it is one of ours, else its class ("4xx")."""
    return str(status) if status in STATUSES else f"{min(max(status // 100, 1), 5)}xx"
