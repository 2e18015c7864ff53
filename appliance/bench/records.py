"""What crosses between the load generator's processes, and its results. Times are CLOCK_MONOTONIC seconds; durations are seconds."""

from __future__ import annotations

import msgspec


class RequestPlan(msgspec.Struct, frozen=True):
    """One request to send."""

    index: int
    num_input_tokens: int
    num_output_tokens: int
    offset_seconds: float | None = None  # open loop: when to send it, after the start


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """What one client process does. Sent over its standard input, so that the key is in no command line."""

    url: str  # full URL of the endpoint
    headers: dict[str, str]
    body: bytes  # JSON object that every request shares, without prompt, max_tokens and the closing brace
    chat: bool
    text_prompts: bool
    plans: list[RequestPlan]
    concurrency: int  # most requests in flight; a closed loop keeps that many
    seed: int
    min_token_id: int
    max_token_id: int
    prefix_tokens: int
    timeout_seconds: float  # of one request
    limit_seconds: float  # of the whole job: past it nothing starts and what is open is given up
    keep_alive: bool = True  # False: a connection for each request, for servers that drop idle ones without a word


class Outcome(msgspec.Struct, array_like=True):
    """How one request went. Mutated by its connection until it is complete."""

    index: int
    started_at: float  # just before its first byte was written
    lag_seconds: float = 0.0  # open loop: sent this long after it was due
    first_at: float = 0.0  # the first chunk with a token; 0.0 before it
    last_at: float = 0.0  # the newest chunk with data
    gaps: list[float] = []  # between chunks with tokens
    num_chunks: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int | None = None  # by the server's usage; None where it sent none
    error: str | None = None


class WorkerReady(msgspec.Struct, tag="ready"):
    """A client process has built its prompts and waits for the word."""


class WorkerProgress(msgspec.Struct, tag="progress"):
    """Requests that a client process has finished so far."""

    num_finished: int


class WorkerDone(msgspec.Struct, tag="done"):
    """All that a client process saw."""

    outcomes: list[Outcome]
    cpu_seconds: float


FromWorker = WorkerReady | WorkerProgress | WorkerDone


class Distribution(msgspec.Struct, frozen=True):
    """Of seconds. Percentiles interpolate linearly, as numpy's do."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    num_samples: int


class LevelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One level of load. None: nothing to measure it by."""

    label: str  # "c=8" or "4 req/s"
    concurrency: int | None
    request_rate: float | None
    num_requests: int
    num_failed: int
    duration_seconds: float  # first byte sent to last byte received
    num_input_tokens: int
    num_output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    events_per_second: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    send_lag_p99_seconds: float | None  # open loop only
    usage_missing: bool  # the server sent no usage: chunks were counted instead
    client_cpu_share: float  # CPU seconds of the busiest client process, over the duration
    claimable: bool | None  # events/s at most half of the ceiling; None where that was not measured
    errors: dict[str, int]


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    base_url: str
    model: str
    started_wall: float
    options: dict[str, object]
    versions: dict[str, str]
    ceiling_events_per_second: float | None
    levels: list[LevelReport]
