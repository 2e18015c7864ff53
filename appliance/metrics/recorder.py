"""The recorder: everything measured arrives here, once, and leaves as Prometheus families, live windows and samples. Runs on the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from appliance.clock import Clock
from appliance.events import EngineEvent, LedgerState, RequestRecord, Snapshot, StepStats, StoreStats
from appliance.metrics.catalogue import CATALOGUE, Metric
from appliance.metrics.goodput import GENERATION_ENDPOINTS, Slo, judge
from appliance.metrics.instruments import Instruments
from appliance.metrics.window import History
from appliance.settings import MetricsSettings

ENGINE_STATES = ("starting", "ready", "restarting", "failed", "stopped")
_EVENT_KINDS = frozenset({"started", "ready", "crashed", "hung", "restarting", "stopped", "failed"})
_ENGINE_GONE = frozenset({"crashed", "hung", "stopped", "failed"})
_ENDPOINTS = GENERATION_ENDPOINTS | {"/v1/models", "/v1/embeddings", "/tokenize", "/detokenize", "/health", "/ready", "/version", "/metrics"}
_STATUSES = frozenset({200, 400, 401, 403, 404, 405, 413, 415, 422, 429, 499, 500, 503, 504})
_FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "abort", "error", "deadline"})
_REJECTIONS = frozenset(
    {"queue_full", "unavailable", "loading", "draining", "rate_limit_exceeded", "context_length_exceeded", "deadline_exceeded", "engine_failed"}
)
_PHASES = ("schedule", "launch", "wait", "output")
_DIRECTIONS = frozenset({"up", "down", "pinned"})
_OUTCOMES = frozenset({"delivered", "failed", "dead", "superseded"})


class EngineView(Protocol):
    """What the recorder reads of the engine's client."""

    @property
    def state(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def ready(self) -> object | None: ...
    @property
    def heartbeat(self) -> object | None: ...


class Recorder:
    """Implements EngineObserver and the API's observer; keeps its families in a registry of its own.

    Call `tick` about once a second: it notices new heartbeats. Nothing here raises on what a user sent: unknown label values become "other".
    """

    def __init__(
        self,
        *,
        clock: Clock,
        slo: Slo,
        settings: MetricsSettings | None = None,
        block_size: int = 16,
        registry: CollectorRegistry | None = None,
        catalogue: Iterable[Metric] = CATALOGUE,
        version: str = "",
        model: str = "",
        instance_id: str = "",
        fleet: str = "",
    ) -> None:
        self.slo = slo
        self.clock = clock
        self.registry = registry or CollectorRegistry(auto_describe=False)
        self.instruments = Instruments(catalogue, slo)
        self.stats: StepStats | None = None  # of the newest step
        self._settings = settings or MetricsSettings()
        self._started = clock.monotonic()
        self._history = History(max(self._settings.slow_window_seconds, self._settings.fast_window_seconds), self._started)
        self._block_size = block_size
        self._engine: EngineView | None = None
        self._store: Callable[[], StoreStats] | None = None
        self._heartbeat: object | None = None
        self._reported_at: float | None = None
        self._waiting_since: float | None = None  # receipt of the oldest waiting sequence, as far as known
        self._policy_run_at: float | None = None
        self._bind_cells()
        self._set_constants(version, model, instance_id, fleet)
        self.instruments.before_collect.append(self._refresh)
        self.registry.register(self.instruments)

    # What the composition root hands over

    def bind_engine(self, engine: EngineView) -> None:
        """Read state, pid, heartbeat and facts from `engine` when scraped."""
        self._engine = engine

    def bind_store(self, stats: Callable[[], StoreStats]) -> None:
        """Read the SQL writer's counters when scraped."""
        self._store = stats

    # EngineObserver

    def on_step(self, stats: StepStats) -> None:
        """A step was done. The hot path: additions only (tests/metrics/test_recorder_cost.py holds its price)."""
        now = self.clock.monotonic()
        self.stats = stats
        self._reported_at = now
        self._waiting_since = now - stats.oldest_waiting_age_seconds if stats.num_waiting else None
        schedule, launch, wait, output = stats.schedule_seconds, stats.launch_seconds, stats.wait_seconds, stats.output_seconds
        cells = self._phases
        cells[0].value += schedule
        cells[1].value += launch
        cells[2].value += wait
        cells[3].value += output
        self._step_seconds.observe(schedule + launch + wait + output)
        self._batch_sequences.observe(stats.num_sequences)
        self._batch_decode.observe(stats.num_decode_tokens)
        self._batch_prefill.observe(stats.num_prefill_tokens)
        self._steps.value += 1
        self._graph_hits.value += stats.graph_hit
        self._prefix_queries.value += stats.prefix_query_tokens
        self._prefix_hits.value += stats.prefix_hit_tokens
        self._preemptions.value += stats.num_preemptions
        self._aborts.value += stats.num_aborted
        self._surplus.value += stats.num_surplus_tokens
        utilisation = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        self._history.on_step(now, stats.num_running, stats.num_waiting, stats.oldest_waiting_age_seconds, utilisation)

    def on_gaps(self, gaps: Sequence[tuple[float, int]]) -> None:
        """Inter-token latencies of one step, grouped: (seconds, how many sequences)."""
        observe = self._itl.observe
        num_tokens = 0
        for seconds, count in gaps:
            observe(seconds, count)
            num_tokens += count
        self._output_tokens.value += num_tokens
        self._history.on_output(self.clock.monotonic(), num_tokens)

    def on_engine_event(self, event: EngineEvent) -> None:
        """The engine process started, became ready, crashed, ..."""
        self.instruments.cell("appliance_engine_events_total", _bounded(event.kind, _EVENT_KINDS)).value += 1
        if event.kind == "restarting":
            self._restarts.value += 1
        if event.kind in _ENGINE_GONE:
            now = self.clock.monotonic()
            self._history.release(now)
            if self._waiting_since is None and event.num_in_flight:
                self._waiting_since = now
            self.stats = None

    def on_heartbeat(self) -> None:
        """The engine reported that it lives."""
        self._reported_at = self.clock.monotonic()

    # The API's observer

    def on_received(self, endpoint: str) -> None:
        """The headers of a request were read."""
        self.instruments.cell("appliance_requests_received_total", _bounded(endpoint, _ENDPOINTS)).value += 1

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """A request was admitted: demand, in tokens."""
        self._admitted_prompt.value += num_prompt_tokens
        self._admitted_max.value += max_tokens
        self._history.on_admitted(self.clock.monotonic(), num_prompt_tokens, max_tokens)

    def on_rejected(self, code: str) -> None:
        """A request was refused at admission; `code` is the error's."""
        self.instruments.cell("appliance_rejections_total", _bounded(code, _REJECTIONS)).value += 1
        self._history.on_rejected(self.clock.monotonic())

    def on_first_token(self, seconds: float) -> None:
        """The first token of a request is on its way, `seconds` after receipt."""
        now = self.clock.monotonic()
        self._ttft.observe(seconds)
        self._output_tokens.value += 1
        self._history.on_output(now, 1)
        self._history.on_ttft(now, seconds, seconds <= self.slo.ttft_seconds)

    def on_request(self, record: RequestRecord) -> None:
        """A request finished, whatever its end. Call it once for each, refused ones included."""
        status = str(record.status) if record.status in _STATUSES else f"{record.status // 100}xx"
        reason = _bounded(record.finish_reason, _FINISH_REASONS) if record.finish_reason else "none"
        self.instruments.cell("appliance_requests_total", _bounded(record.endpoint, _ENDPOINTS), status, reason).value += 1
        self._prompt_tokens.value += record.num_prompt_tokens
        self._cached_tokens.value += record.num_cached_tokens
        self._generated_tokens.value += record.num_generated_tokens
        self._written_tokens.value += record.num_written_tokens
        for state, seconds in record.states.items():
            self._states[state].value += seconds
        if record.endpoint in GENERATION_ENDPOINTS:
            self._observe_generation(record)
        judgement = judge(record, self.slo)
        for objective, good in (("ttft", judgement.ttft), ("tpot", judgement.tpot), ("both", judgement.both)):
            if good is not None:
                judged, kept = self._objectives[objective]
                judged.value += 1
                kept.value += good
        self._history.on_request(
            self.clock.monotonic(), error=record.status >= 500, good=judgement.both, tpot_seconds=record.tpot_seconds, good_tpot=judgement.tpot
        )

    # The policy loop and the courier

    def on_policy(self, desired_replicas: int, direction: str | None = None) -> None:
        """The policy loop ran; `direction` where it decided on a change ("pinned": it wants more than it may)."""
        self._policy_run_at = self.clock.monotonic()
        self.instruments.cell("appliance_scaling_runs_total").value += 1
        self.instruments.cell("appliance_scaling_desired_replicas").value = desired_replicas
        if direction is not None:
            self.instruments.cell("appliance_scaling_decisions_total", _bounded(direction, _DIRECTIONS)).value += 1
            self.instruments.cell("appliance_scaling_pinned").value = direction == "pinned"

    def on_delivery(self, outcome: str, num_pending: int) -> None:
        """An attempt to deliver a signal ended: delivered, failed (to be tried again), dead or superseded; so many still wait."""
        self.instruments.cell("appliance_webhook_deliveries_total", _bounded(outcome, _OUTCOMES)).value += 1
        self.instruments.cell("appliance_webhook_pending").value = num_pending

    # Readers

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The families as the scraper's Accept header asks for (text or OpenMetrics), and their content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def tick(self) -> None:
        """Once a second: a heartbeat object that was not there before is a report."""
        if self._engine is not None and (heartbeat := self._engine.heartbeat) is not self._heartbeat:
            self._heartbeat = heartbeat
            if heartbeat is not None:
                self._reported_at = self.clock.monotonic()

    def snapshot(self) -> Snapshot:
        """The machine now with its recent past: the policy's whole input."""
        self.tick()
        now = self.clock.monotonic()
        num_running, num_waiting, age = self.queue(now)
        stats = self.stats
        fast, slow = self._settings.fast_window_seconds, self._settings.slow_window_seconds
        return Snapshot(
            at=now,
            at_wall=self.clock.wall(),
            engine_ready=self._engine is not None and self._engine.state == "ready",
            data_age_seconds=None if self._reported_at is None else now - self._reported_at,
            num_running=num_running,
            num_waiting=num_waiting,
            oldest_waiting_age_seconds=age,
            kv_utilisation=stats.num_used_blocks / stats.num_blocks if stats and stats.num_blocks else None,
            ttft_slo_seconds=self.slo.ttft_seconds,
            tpot_slo_seconds=self.slo.tpot_seconds,
            fast=self._history.stats(fast, now),
            slow=self._history.stats(slow, now),
        )

    def queue(self, now: float) -> tuple[int, int, float]:
        """Sequences running and waiting, and the age of the oldest waiting one, at `now`. While the engine is down, all in flight wait."""
        down = self._engine is not None and self._engine.state in ("starting", "restarting")
        if down and self._engine is not None:
            num_running, num_waiting = 0, self._engine.num_in_flight
            if num_waiting and self._waiting_since is None:
                self._waiting_since = now
        elif self.stats is not None:
            num_running, num_waiting = self.stats.num_running, self.stats.num_waiting
        else:
            num_running, num_waiting = 0, 0
        age = max(0.0, now - self._waiting_since) if num_waiting and self._waiting_since is not None else 0.0
        return num_running, num_waiting, age

    def kv(self) -> tuple[float, float, float] | None:
        """KV utilisation, cached share and waste, each 0-1, after the newest step; None before the first and while the engine is down."""
        stats = self.stats
        if stats is None or not stats.num_blocks:
            return None
        block_size = getattr(self._engine.ready, "block_size", self._block_size) if self._engine is not None else self._block_size
        slots = stats.num_used_blocks * block_size
        waste = max(0.0, 1 - stats.num_used_tokens / slots) if slots else 0.0
        return stats.num_used_blocks / stats.num_blocks, stats.num_cached_blocks / stats.num_blocks, waste

    # Inside

    def _observe_generation(self, record: RequestRecord) -> None:
        wall = self.clock.wall()
        states = record.states
        if record.status < 400:
            self._duration.observe_with(record.duration_seconds, record.id, wall)
        if record.num_prompt_tokens:
            self._request_prompt.observe(record.num_prompt_tokens)
        if record.num_generated_tokens:
            self._request_generated.observe(record.num_generated_tokens)
            self._queue_seconds.observe_with(states.get("queued", 0.0), record.id, wall)
            self._prefill_seconds.observe_with(states.get("prefill", 0.0) + states.get("prefill_wait", 0.0), record.id, wall)
        if record.num_generated_tokens > 1:
            self._decode_seconds.observe_with(states.get("decode", 0.0), record.id, wall)
        if record.tpot_seconds is not None:
            self._tpot.observe_with(record.tpot_seconds, record.id, wall)

    def _bind_cells(self) -> None:
        """Look every hot cell up once."""
        cell, histogram = self.instruments.cell, self.instruments.histogram
        self._phases = [cell("appliance_engine_phase_seconds_total", phase) for phase in _PHASES]
        self._step_seconds = histogram("appliance_engine_step_seconds")
        self._batch_sequences = histogram("appliance_engine_batch_sequences")
        self._batch_decode = histogram("appliance_engine_batch_decode_tokens")
        self._batch_prefill = histogram("appliance_engine_batch_prefill_tokens")
        self._steps = cell("appliance_engine_steps_total")
        self._graph_hits = cell("appliance_engine_graph_hits_total")
        self._restarts = cell("appliance_engine_restarts_total")
        self._prefix_queries = cell("appliance_prefix_query_tokens_total")
        self._prefix_hits = cell("appliance_prefix_hit_tokens_total")
        self._preemptions = cell("appliance_preemptions_total")
        self._aborts = cell("appliance_aborts_total")
        self._surplus = cell("appliance_surplus_tokens_total")
        self._ttft = histogram("appliance_time_to_first_token_seconds")
        self._itl = histogram("appliance_inter_token_latency_seconds")
        self._tpot = histogram("appliance_time_per_output_token_seconds")
        self._duration = histogram("appliance_request_duration_seconds")
        self._queue_seconds = histogram("appliance_request_queue_seconds")
        self._prefill_seconds = histogram("appliance_request_prefill_seconds")
        self._decode_seconds = histogram("appliance_request_decode_seconds")
        self._request_prompt = histogram("appliance_request_prompt_tokens")
        self._request_generated = histogram("appliance_request_generated_tokens")
        self._output_tokens = cell("appliance_output_tokens_total")
        self._prompt_tokens = cell("appliance_prompt_tokens_total")
        self._cached_tokens = cell("appliance_cached_tokens_total")
        self._generated_tokens = cell("appliance_generated_tokens_total")
        self._written_tokens = cell("appliance_written_tokens_total")
        self._admitted_prompt = cell("appliance_admitted_prompt_tokens_total")
        self._admitted_max = cell("appliance_admitted_max_tokens_total")
        self._states = {state.value: cell("appliance_request_state_seconds_total", state.value) for state in LedgerState}
        self._objectives = {
            objective: (cell("appliance_slo_requests_total", objective), cell("appliance_slo_good_requests_total", objective))
            for objective in ("ttft", "tpot", "both")
        }
        for code in _REJECTIONS:  # so that rate() sees the first one
            cell("appliance_rejections_total", code)
        for kind in _EVENT_KINDS:
            cell("appliance_engine_events_total", kind)
        for direction in _DIRECTIONS:
            cell("appliance_scaling_decisions_total", direction)
        for outcome in _OUTCOMES:
            cell("appliance_webhook_deliveries_total", outcome)

    def _set_constants(self, version: str, model: str, instance_id: str, fleet: str) -> None:
        cell = self.instruments.cell
        cell("appliance_slo_ttft_seconds").value = self.slo.ttft_seconds
        cell("appliance_slo_tpot_seconds").value = self.slo.tpot_seconds
        cell("appliance_slo_target_ratio").value = self.slo.target
        cell("appliance_build_info", version, model, instance_id, fleet).value = 1

    def _refresh(self) -> None:
        """Set the gauges that are only known now."""
        self.tick()
        now = self.clock.monotonic()
        cell = self.instruments.cell
        running, waiting, age = self.queue(now)
        cell("appliance_requests_running").value = running
        cell("appliance_requests_waiting").value = waiting
        cell("appliance_oldest_waiting_age_seconds").value = age
        cell("appliance_uptime_seconds").value = now - self._started
        if self._reported_at is not None:
            cell("appliance_engine_report_age_seconds").value = now - self._reported_at
        if self._policy_run_at is not None:
            cell("appliance_scaling_run_age_seconds").value = now - self._policy_run_at
        utilisation, cached, waste = self.kv() or (0.0, 0.0, 0.0)
        cell("appliance_kv_utilisation_ratio").value = utilisation
        cell("appliance_kv_cached_ratio").value = cached
        cell("appliance_kv_waste_ratio").value = waste
        stats = self.stats
        cell("appliance_kv_blocks").value = stats.num_blocks if stats else 0
        cell("appliance_kv_used_blocks").value = stats.num_used_blocks if stats else 0
        cell("appliance_engine_free_bytes").value = stats.free_bytes if stats else 0
        state = "stopped"
        if (engine := self._engine) is not None:
            state = engine.state
            cell("appliance_requests_in_flight").value = engine.num_in_flight
            if (ready := engine.ready) is not None:
                self.instruments.forget("appliance_engine_info")
                facts = (str(getattr(ready, fact, "")) for fact in ("device", "dtype", "quantization"))
                cell("appliance_engine_info", *facts).value = 1
        for known in ENGINE_STATES:
            cell("appliance_engine_state", known).value = known == state
        if self._store is not None:
            self._refresh_store(self._store())

    def _refresh_store(self, stats: StoreStats) -> None:
        cell = self.instruments.cell
        cell("appliance_store_available").value = stats.available
        cell("appliance_store_queued_rows").value = stats.num_queued_rows
        cell("appliance_store_spool_backlog_rows").value = stats.num_spooled_rows
        cell("appliance_store_written_rows_total").value = stats.num_written_rows
        cell("appliance_store_spooled_rows_total").value = stats.num_spooled_total
        cell("appliance_store_dropped_rows_total").value = stats.num_dropped_rows
        cell("appliance_store_refused_rows_total").value = stats.num_refused_rows
        cell("appliance_store_flushes_total").value = stats.num_flushes
        cell("appliance_store_failed_flushes_total").value = stats.num_failed_flushes
        cell("appliance_store_flush_seconds_total").value = stats.flush_seconds


def _bounded(value: str, known: frozenset[str]) -> str:
    return value if value in known else "other"
