"""Frozen records that cross folders. Times named `_at` are CLOCK_MONOTONIC seconds; `_wall` are Unix seconds; durations are seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec


class LedgerState(enum.StrEnum):
    """What a request is doing. It is in exactly one of these at any instant, so the parts sum to its wall time.

    Declared in order of priority: with several choices, the request is in the first of its choices' states that is listed here.
    """

    WRITE_BLOCKED = "write_blocked"  # the client does not take what is ready for it
    DETOKENIZE = "detokenize"  # turning ids into text
    DECODE = "decode"  # in the running batch, past its prompt
    GRAMMAR = "grammar"  # waiting for a grammar to compile or a mask
    PREFILL = "prefill"  # its own prompt tokens are in the current step
    PREFILL_WAIT = "prefill_wait"  # admitted to the batch, waiting while others' tokens fill the step
    PREEMPTED = "preempted"  # lost its blocks, waits to be computed again
    ENGINE_RESTART = "engine_restart"  # the engine is down or being replayed
    QUEUED = "queued"  # in the engine's waiting queue
    ADMITTED = "admitted"  # validated, templated, tokenized; not yet in the queue
    RECEIVED = "received"  # headers read, body being read and validated


class BlockEnds(msgspec.Struct, frozen=True, array_like=True):
    """KV blocks whose content ended since the last report: given up for another, or freed where nobody can find it.

    Counts are pairs (bit length of the value, number of blocks): bit length b holds values from 2^(b-1) to 2^b - 1, and 0 holds 0. Times are whole
    milliseconds. `idle` is of evicted blocks alone.
    """

    lifetimes: tuple[tuple[int, int], ...]  # allocation to the end of the content
    lifetime_seconds: float  # their sum
    idles: tuple[tuple[int, int], ...]  # last use to eviction
    idle_seconds: float
    reuses: tuple[tuple[int, int], ...]  # how often another sequence found the content
    num_reuses: int


class StepCosts(msgspec.Struct, frozen=True):
    """What the model's arithmetic takes, and what the device could do at best. 0 where it is not known.

    The operations are those that the mathematics needs: causal attention over the positions that exist, no padding, a product counted as two. The
    bytes are the least that must move: every weight once a step, K and V of each decode's context once, new K and V once; a prefill chunk reads
    its context once.
    """

    flops_per_token: float = 0.0  # 2 x the weights that every token is multiplied with
    flops_per_sample: float = 0.0  # 2 x the output head
    flops_per_pair: float = 0.0  # attention of one query to one position, all layers: 4 x layers x heads x head_dim
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    peak_flops: float = 0.0  # dense, at the model's dtype, a second
    peak_bytes_per_second: float = 0.0

    def flops(self, stats: StepStats) -> float:
        """Operations of a step: linear layers of its tokens, the head of those that sample, attention of decodes and chunks."""
        return self.flops_of(stats.num_decode_tokens + stats.num_prefill_tokens, stats.num_sampled_tokens, stats.num_pairs)

    def flops_of(self, num_tokens: int, num_sampled_tokens: int, num_pairs: int) -> float:
        """Those of any number of steps, from their sums."""
        return num_tokens * self.flops_per_token + num_sampled_tokens * self.flops_per_sample + num_pairs * self.flops_per_pair

    def moved_bytes(self, stats: StepStats) -> float:
        """Bytes that a step moves at least; 0 for one without tokens."""
        num_tokens = stats.num_decode_tokens + stats.num_prefill_tokens
        return self.moved_bytes_of(num_tokens > 0, num_tokens, stats.num_read_tokens) if num_tokens else 0.0

    def moved_bytes_of(self, num_steps: int, num_tokens: int, num_read_tokens: int) -> float:
        """Those of so many steps with tokens, from their sums."""
        return num_steps * self.weight_bytes + (num_read_tokens + num_tokens) * self.kv_bytes_per_token


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """One engine step, measured in the engine process. Sent with every step; gauges are values at the end of the step."""

    step: int
    started_at: float
    schedule_seconds: float
    launch_seconds: float  # host time to prepare and launch; on CPU the forward itself
    wait_seconds: float  # host time blocked on the device
    output_seconds: float  # stop checks and building the frame
    num_decode_tokens: int
    num_prefill_tokens: int
    num_sequences: int  # rows of this step's batch
    num_running: int
    num_waiting: int
    oldest_waiting_age_seconds: float  # 0.0 when nothing waits
    num_blocks: int
    num_used_blocks: int  # referenced by at least one sequence
    num_cached_blocks: int  # free, but findable by prefix hash
    num_used_tokens: int  # tokens held in referenced blocks (for waste: 1 - used_tokens / (used_blocks * block_size))
    prefix_query_tokens: int  # prompt tokens looked up in the prefix cache since the last step
    prefix_hit_tokens: int  # of those, found
    num_preemptions: int  # since the last step
    num_aborted: int  # since the last step
    num_surplus_tokens: int  # sampled, then discarded (past a stop), since the last step
    graph_hit: bool
    free_bytes: int = 0  # device memory free, 0 on CPU
    busy_seconds: float = 0.0  # time that this step took beyond the end of the one before it
    num_context_tokens: int = 0  # positions that the step's decodes attend to, over all of them
    num_sampled_tokens: int = 0  # rows that got a token: decodes and final chunks
    num_backlog_tokens: int = 0  # still to be prefilled: of waiting sequences, and the rest of those in prefill
    num_findable_blocks: int = 0  # with a prefix hash, referenced or free
    num_allocated_blocks: int = 0  # handed out since the last step
    num_reused_blocks: int = 0  # found by a prefix lookup since the last step
    num_evicted_blocks: int = 0  # cached blocks handed out anew since the last step
    chunks: tuple[tuple[int, int, int, bool], ...] = ()  # of this step: (sequence_id, start, length, final)
    block_ends: BlockEnds | None = None

    @property
    def num_prefill_pairs(self) -> int:
        """Pairs of a query and a position it attends to, over the step's chunks."""
        return sum([length * start + length * (length + 1) // 2 for _, start, length, _ in self.chunks]) if self.chunks else 0

    @property
    def num_pairs(self) -> int:
        """The same over the whole step."""
        return self.num_context_tokens + self.num_prefill_pairs

    @property
    def num_read_tokens(self) -> int:
        """Positions whose K and V the step reads: the context of each decode, and what precedes each chunk."""
        return self.num_context_tokens + sum([start for _, start, _, _ in self.chunks]) if self.chunks else self.num_context_tokens


class EngineEvent(msgspec.Struct, frozen=True):
    """Something that happened to the engine process: `started`, `ready`, `crashed`, `hung`, `restarting`, `stopped`, `failed`."""

    kind: str
    at_wall: float
    detail: str
    pid: int = 0
    num_in_flight: int = 0


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger of one finished request, whatever its end. One row of `requests`; also what the metrics recorder sees."""

    id: str  # UUIDv7 minted by the server
    client_request_id: str | None  # X-Request-Id, at most 64 characters
    endpoint: str  # "/v1/chat/completions"
    model: str
    key_id: str  # name of the API key, "" where keys are off
    stream: bool
    received_wall: float
    duration_seconds: float  # received to the last byte written
    status: int  # HTTP status; 499 for a client that left
    finish_reason: str | None  # of the first choice: stop, length, tool_calls, abort, error
    error_code: str | None
    num_choices: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int  # sampled by the engine for this request and delivered to the server
    num_written_tokens: int  # of those, written to the client
    ttft_seconds: float | None
    tpot_seconds: float | None  # (last - first) / (n - 1) of the first choice; None under two tokens
    max_itl_seconds: float | None
    num_preemptions: int
    num_engine_restarts: int
    states: Mapping[str, float]  # LedgerState value -> seconds; sums to duration_seconds
    seed: int | None = None
    max_tokens: int | None = None
    joules: float | None = None


class RequestUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished request took beyond its record."""

    engine_seconds: float  # its share of the steps that it was in, by modelled cost
    num_longest_tokens: int  # generated, of its longest choice


class WindowStats(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen in the last `seconds`. None: no data, which is not zero."""

    seconds: float
    num_requests: int  # finished
    num_errors: int  # of those, status >= 500
    num_rejected: int  # 429 and 503 at admission, whatever the reason
    num_shed: int  # turned away for want of capacity: 503 of a ready node (a full queue), and deadlines that passed in the queue
    prompt_tokens_per_second: float  # measured at admission
    max_output_tokens_per_second: float  # asked for, at admission (max_tokens)
    output_tokens_per_second: float  # generated
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    tpot_p50_seconds: float | None
    tpot_p95_seconds: float | None
    ttft_attainment: float | None  # share of first tokens within the SLO
    tpot_attainment: float | None
    goodput: float | None  # share of finished requests within both
    mean_running: float | None
    mean_waiting: float | None
    mean_kv_utilisation: float | None
    max_kv_utilisation: float | None
    max_waiting_age_seconds: float | None
    expected_output_tokens_per_second: float = 0.0  # at admission: max_tokens, at most the mean of recent requests
    flops_per_second: float = 0.0  # of the model's arithmetic
    moved_bytes_per_second: float = 0.0
    busy_ratio: float = 0.0  # share of the time in which a step was under way


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The machine at one instant with its recent past; the policy's whole input."""

    at: float  # CLOCK_MONOTONIC
    at_wall: float
    engine_ready: bool
    data_age_seconds: float | None  # age of the engine's newest report; None before the first
    num_running: int
    num_waiting: int
    oldest_waiting_age_seconds: float
    kv_utilisation: float | None
    ttft_slo_seconds: float
    tpot_slo_seconds: float
    fast: WindowStats
    slow: WindowStats


class ScaleDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the desired number of replicas, explained. Also the payload of the webhook."""

    id: str  # UUIDv7
    sequence: int  # grows by one with every decision of this instance; a receiver ignores older ones
    at_wall: float
    expires_wall: float
    instance_id: str
    fleet: str
    direction: str  # "up", "down" or "pinned" (wants more than max_replicas)
    current_replicas: int
    desired_replicas: int
    reason: str  # in words, with the numbers
    inputs: dict[str, float | None]
    alternatives: tuple[str, ...] = ()  # what was considered and why not
    mode: str = "advise"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The machine every few seconds, one row of `samples`: gauges at `at_wall`, counts and sums since the sample before. None: not known."""

    at_wall: float
    period_seconds: float  # since the sample before
    engine_state: str  # starting, ready, restarting, failed, stopped
    num_requests: int  # finished
    num_errors: int  # of those, status >= 500
    num_rejected: int
    num_good_requests: int  # finished within both SLOs
    num_prompt_tokens: int  # at admission
    num_cached_tokens: int  # found in the prefix cache
    num_generated_tokens: int  # as they came from the engine
    num_surplus_tokens: int
    num_preemptions: int
    num_aborted: int
    num_steps: int
    step_seconds: float  # time in steps
    ttft_p50_seconds: float | None  # of the fast window, as are the next four
    ttft_p95_seconds: float | None
    tpot_p50_seconds: float | None
    tpot_p95_seconds: float | None
    goodput: float | None
    num_running: int
    num_waiting: int
    oldest_waiting_age_seconds: float
    kv_utilisation: float | None
    kv_cached_share: float | None
    kv_waste: float | None
    cpu_utilisation: float | None  # of the host, 0-1
    memory_used_bytes: int | None  # of the host
    server_cpu_seconds: float | None
    server_resident_bytes: int | None
    engine_cpu_seconds: float | None
    engine_resident_bytes: int | None
    gpu_utilisation: float | None  # mean over the GPUs, 0-1; memory, power and joules are sums, temperature is the hottest
    gpu_memory_used_bytes: int | None
    gpu_power_watts: float | None
    gpu_temperature_celsius: float | None
    gpu_joules: float | None  # since the sample before


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """The SQL writer at one instant; counts are since start."""

    num_queued_rows: int  # in memory, not yet in the database
    num_spooled_rows: int  # on disk, waiting for the database
    num_written_rows: int
    num_spooled_total: int  # rows that ever went to the spool
    num_dropped_rows: int  # lost: neither database nor disk would take them
    num_refused_rows: int  # the database holds them invalid
    num_failed_flushes: int
    flush_seconds: float  # time in flushes
    num_flushes: int
    available: bool  # the newest flush reached the database
