"""The recorder: everything measured arrives here, once, and leaves as Prometheus families, live windows and samples. Runs on the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from prometheus_client.exposition import choose_encoder

from appliance.clock import Clock
from appliance.events import EngineEvent, RequestRecord, RequestUse, Snapshot, StepStats, StoreStats
from appliance.metrics.catalogue import CATALOGUE, Metric
from appliance.metrics.cells import Cells
from appliance.metrics.compat import NAMESPACES, more_edges
from appliance.metrics.compat_export import CompatExport
from appliance.metrics.energy import EnergyAccount
from appliance.metrics.exposition import END
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.goodput import CHAT, Slo
from appliance.metrics.hardware import HardwareReading
from appliance.metrics.instruments import Instruments
from appliance.metrics.labels import (
    DIRECTIONS,
    ENGINE_GONE,
    EVENT_KINDS,
    OUTCOMES,
    SHED,
    bounded,
)
from appliance.metrics.live import EngineView, costs_of, set_engine, set_hardware, set_kv, set_store, set_work
from appliance.metrics.requests import RequestMeter
from appliance.metrics.steps import StepMeter, StepReport
from appliance.metrics.window import History
from appliance.settings import MetricsSettings

_log = logging.getLogger(__name__)
_MOST_PENDING = 1024
_SETTLE_SECONDS = 0.5


class Recorder:
    """Implements EngineObserver and the API's observer; keeps its families to itself.

    What happens is put aside with its time, and counted many at once: when somebody reads, twice a second when the loop's lag is told, and before
    it becomes much. The counters' memory is cold between two steps: one that is counted alone costs ten times one that is counted among others.
    Tell `on_loop_lag` a few times a second, or the age of the engine's newest report is only as exact as the scrapes are frequent.
    Nothing here raises on what a user sent: unknown label values become "other".
    """

    def __init__(
        self,
        *,
        clock: Clock,
        slo: Slo,
        settings: MetricsSettings | None = None,
        block_size: int = 16,
        catalogue: Iterable[Metric] = CATALOGUE,
        version: str = "",
        model: str = "",
        instance_id: str = "",
        fleet: str = "",
    ) -> None:
        self.slo = slo
        self.clock = clock
        self._settings = settings or MetricsSettings()
        namespaces = [NAMESPACES[name] for name in dict.fromkeys(self._settings.compat)]
        self._instruments = Instruments(catalogue, slo, more_edges(namespaces))
        self._new_steps: list[StepReport] = []  # what is to be counted, in order
        self._pending: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # of requests
        self._settled_at = clock.monotonic()
        self._num_reports = 0  # of the engine
        self._stats: StepStats | None = None  # of the newest step that was counted
        self._started = clock.monotonic()
        self._history = History(max(self._settings.slow_window_seconds, self._settings.fast_window_seconds), self._started)
        self._block_size = block_size
        self._engine: EngineView | None = None
        self._store: Callable[[], StoreStats] | None = None
        self._hardware: Callable[[], HardwareReading | None] | None = None
        self._heartbeat: object | None = None
        self._num_starts = 0
        self._reported_at: float | None = None
        self._waiting_since: float | None = None  # receipt of the oldest waiting sequence, as far as known
        self._policy_run_at: float | None = None
        self._cells = Cells(self._instruments)
        self._forecast = QueueForecast()
        self._energy = EnergyAccount()
        self._busy_read = 0.0  # of the busy time, what the energy account has seen
        self._steps = StepMeter(self._cells, self._history, self._forecast)
        self._requests = RequestMeter(self._instruments, self._cells, self._history, self._forecast, slo, clock)
        self._set_constants(version, model, instance_id, fleet)
        self._instruments.before_render.append(self._refresh)
        self._exports = [CompatExport(namespace, self._instruments, model) for namespace in namespaces]

    # What the composition root hands over

    def bind_engine(self, engine: EngineView) -> None:
        """Read state, pid, heartbeat and facts from `engine` when scraped."""
        self.settle()
        self._engine = engine
        self._steps.costs = costs_of(engine)

    def bind_store(self, stats: Callable[[], StoreStats], queue_limit_rows: int = 0) -> None:
        """Read the SQL writer's counters when scraped."""
        self._store = stats
        self._instruments.cell("appliance_store_queue_limit_rows").value = queue_limit_rows

    def bind_hardware(self, latest: Callable[[], HardwareReading | None]) -> None:
        """Read the newest hardware reading when scraped."""
        self._hardware = latest

    # EngineObserver

    def on_step(self, stats: StepStats, gaps: Sequence[tuple[float, int]] = ()) -> None:
        """A step was done, with these inter-token latencies, grouped: (seconds, how many sequences). The hot path: a test holds its price."""
        self._num_reports += 1
        self._new_steps.append((self.clock.monotonic(), stats, gaps))
        if len(self._new_steps) >= _MOST_PENDING:
            self.settle()

    def on_engine_event(self, event: EngineEvent) -> None:
        """The engine process started, became ready, crashed, ..."""
        self.settle()
        self._instruments.cell("appliance_engine_events_total", bounded(event.kind, EVENT_KINDS)).value += 1
        if event.kind == "started":
            self._cells.restarts.value += self._num_starts > 0
            self._num_starts += 1
        self._steps.costs = costs_of(self._engine)
        if event.kind == "ready":  # idle until its first step, which may be hours away: it sends heartbeats only, and zeros are data
            self._history.on_step(self.clock.monotonic(), 0, 0, 0.0, 0.0)
        if event.kind in ENGINE_GONE:
            now = self.clock.monotonic()
            self._history.release(now)
            if self._waiting_since is None and event.num_in_flight:
                self._waiting_since = now
            self._stats = None

    # The API's observer

    def on_received(self, endpoint: str) -> None:
        """The headers of a request were read."""
        self._later(self._requests.on_received, endpoint)

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """A request was admitted: demand, in tokens."""
        self._later(self._count_admitted, num_prompt_tokens, max_tokens, self.clock.monotonic(), self._num_reports)

    def on_rejected(self, code: str) -> None:
        """A request was refused at admission; `code` is the error's."""
        shed = code in SHED and self.engine_state == "ready"  # a restart fills the queue too, and is no want of replicas
        self._later(self._requests.on_rejected, code, shed, self.clock.monotonic())

    def on_first_token(self, seconds: float, endpoint: str = CHAT, request_id: str = "") -> None:
        """The first token of a request is on its way, `seconds` after receipt."""
        self._later(self._requests.on_first_token, seconds, endpoint, request_id, self.clock.monotonic())

    def on_other_first_token(self) -> None:
        """The first token of a further choice of a request: like the first of all it follows no gap, and is counted as it comes."""
        self._later(self._requests.on_other_first_token, self.clock.monotonic())

    def on_request(self, record: RequestRecord, use: RequestUse | None = None) -> None:
        """A request finished, whatever its end. Call it once for each, refused ones included."""
        self._later(self._requests.on_request, record, use, self.clock.monotonic())

    # The machine

    def on_hardware(self, reading: HardwareReading) -> None:
        """A reading was taken: its joules go to serving or idle, and what the engine does from now on has a new price."""
        self.settle()
        engine = self._engine
        busy, self._busy_read = self._cells.busy_seconds.value - self._busy_read, self._cells.busy_seconds.value
        if engine is None or engine.ready is None or not reading.gpus or getattr(engine.ready, "device", "") == "cpu":
            return  # not the engine's device, or not known yet to be
        interval = self._energy.add(reading.at, reading.gpus[0], busy, working=engine.num_in_flight > 0)
        if interval is not None:
            self._cells.energy["serving"].value += interval.serving_joules
            self._cells.energy["idle"].value += interval.idle_joules
        engine.set_serving_watts(self._energy.price_watts)

    def on_loop_lag(self, seconds: float) -> None:
        """The event loop ran a callback so late. It comes every now and then: the time to count what was put aside."""
        self._cells.loop_lag.observe(seconds)
        self._hear()
        if self.clock.monotonic() - self._settled_at >= _SETTLE_SECONDS:
            self.settle()

    # The policy loop and the courier

    def on_policy(self, desired_replicas: int, direction: str | None = None, *, pinned: bool) -> None:
        """The policy loop ran; `direction` where it decided on a change. `pinned`: it wants more than it may."""
        self._policy_run_at = self.clock.monotonic()
        self._instruments.cell("appliance_scaling_runs_total").value += 1
        self._instruments.cell("appliance_scaling_desired_replicas").value = desired_replicas
        self._instruments.cell("appliance_scaling_pinned").value = pinned
        if direction is not None:
            self._instruments.cell("appliance_scaling_decisions_total", bounded(direction, DIRECTIONS)).value += 1

    def on_delivery(self, outcome: str, num_pending: int) -> None:
        """An attempt to deliver a signal ended: delivered, failed (to be tried again), dead or superseded; so many still wait."""
        self._instruments.cell("appliance_webhook_deliveries_total", bounded(outcome, OUTCOMES)).value += 1
        self._instruments.cell("appliance_webhook_pending").value = num_pending

    # Readers

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The families as the scraper's Accept header asks for (text or OpenMetrics), and their content type."""
        _, content_type = choose_encoder(accept)
        openmetrics = content_type.startswith("application/openmetrics-text")
        out: list[str] = []
        self._instruments.render(out, openmetrics=openmetrics)
        for export in self._exports:
            export.render(out, openmetrics=openmetrics)
        if openmetrics:
            out.append(END)
        return "".join(out).encode(), content_type

    @property
    def stats(self) -> StepStats | None:
        """Of the engine's newest step; None before the first and while the engine is gone."""
        return self._new_steps[-1][1] if self._new_steps else self._stats

    @property
    def instruments(self) -> Instruments:
        """Cells and histograms, to read."""
        self.settle()
        return self._instruments

    def settle(self) -> None:
        """Count what was put aside: steps, then requests in their order. What fails is logged and the rest counted."""
        self._settled_at = self.clock.monotonic()
        steps, self._new_steps = self._new_steps, []
        pending, self._pending = self._pending, []
        if steps:
            at, stats, _ = steps[-1]
            self._stats, self._reported_at = stats, max(at, self._reported_at or at)
            self._waiting_since = at - stats.oldest_waiting_age_seconds if stats.num_waiting else None
            self._count_steps(steps)
        for count, arguments in pending:
            try:
                count(*arguments)
            except Exception:
                _log.exception("a report was not counted")

    def snapshot(self) -> Snapshot:
        """The machine now with its recent past: the policy's whole input."""
        self.settle()
        self._hear()
        now = self.clock.monotonic()
        num_running, num_waiting, age = self.queue(now)
        stats = self.stats
        fast, slow = self._settings.fast_window_seconds, self._settings.slow_window_seconds
        return Snapshot(
            at=now,
            at_wall=self.clock.wall(),
            engine_ready=self.engine_state == "ready",
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

    @property
    def engine_state(self) -> str:
        """The state of the engine's client; "stopped" where there is none."""
        return self._engine.state if self._engine is not None else "stopped"

    def queue(self, now: float) -> tuple[int, int, float]:
        """Sequences running and waiting, and the age of the oldest waiting one, at `now`. While the engine is down, all in flight wait."""
        self.settle()
        if self._engine is not None and self._engine.state in ("starting", "restarting"):
            num_running, num_waiting = 0, self._engine.num_in_flight
            if not num_waiting:
                self._waiting_since = None
            elif self._waiting_since is None:
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
        slots = stats.num_used_blocks * self._kv_block_size()
        waste = max(0.0, 1 - stats.num_used_tokens / slots) if slots else 0.0
        return stats.num_used_blocks / stats.num_blocks, stats.num_cached_blocks / stats.num_blocks, waste

    def predicted_ttft_seconds(self, now: float) -> float:
        """What a request that arrived at `now` would wait for its first token; see QueueForecast."""
        self.settle()
        window = self._history.stats(self._settings.fast_window_seconds, now)
        max_num_seqs = getattr(self._engine.ready, "max_num_seqs", None) if self._engine is not None else None
        return self._forecast.ttft_seconds(self.stats, self.queue(now)[2], max_num_seqs, window)

    # Inside

    def _count_steps(self, reports: Sequence[StepReport]) -> None:
        """Count reports by slices of the history; those of a slice that cannot be counted, one by one."""
        for _, slice_ in groupby(reports, lambda report: self._history.slice_of(report[0])):
            rows = list(slice_)
            try:
                self._steps.on_steps(rows)
            except Exception:
                if len(rows) == 1:
                    _log.exception("a report was not counted")
                else:
                    for row in rows:
                        self._count_steps([row])

    def _count_admitted(self, num_prompt_tokens: int, max_tokens: int, now: float, num_reports: int) -> None:
        self._requests.on_admitted(num_prompt_tokens, max_tokens, now, reported=num_reports < self._num_reports)

    def _later(self, count: Callable[..., None], *arguments: Any) -> None:
        self._pending.append((count, arguments))
        if len(self._pending) >= _MOST_PENDING:
            self.settle()

    def _hear(self) -> None:
        """A heartbeat object that was not there before is a report."""
        if self._engine is not None and (heartbeat := self._engine.heartbeat) is not self._heartbeat:
            self._heartbeat = heartbeat
            if heartbeat is not None:
                self._reported_at = self.clock.monotonic()

    def _kv_block_size(self) -> int:
        block_size = getattr(self._engine.ready, "block_size", self._block_size) if self._engine is not None else self._block_size
        return int(block_size)

    def _set_constants(self, version: str, model: str, instance_id: str, fleet: str) -> None:
        cell = self._instruments.cell
        cell("appliance_slo_ttft_seconds").value = self.slo.ttft_seconds
        cell("appliance_slo_tpot_seconds").value = self.slo.tpot_seconds
        cell("appliance_slo_target_ratio").value = self.slo.target
        cell("appliance_build_info", version, model, instance_id, fleet).value = 1

    def _refresh(self) -> None:
        """Set the gauges that are only known now."""
        self.settle()
        self._hear()
        now = self.clock.monotonic()
        cell = self._instruments.cell
        running, waiting, age = self.queue(now)
        cell("appliance_requests_running").value = running
        cell("appliance_requests_waiting").value = waiting
        cell("appliance_oldest_waiting_age_seconds").value = age
        cell("appliance_uptime_seconds").value = now - self._started
        if self._reported_at is not None:
            cell("appliance_engine_report_age_seconds").value = now - self._reported_at
        if self._policy_run_at is not None:
            cell("appliance_scaling_run_age_seconds").value = now - self._policy_run_at
        set_kv(self._instruments, self.stats, self.kv(), self._kv_block_size() * self._steps.costs.kv_bytes_per_token)
        window = self._history.stats(self._settings.fast_window_seconds, now)
        set_work(self._instruments, self._steps.costs, window)
        cell("appliance_predicted_ttft_seconds").value = self.predicted_ttft_seconds(now)
        cell("appliance_prefill_tokens_per_second").value = self._forecast.prefill_tokens_per_second or 0
        cell("appliance_energy_idle_watts").value = self._energy.idle_watts or 0
        cell("appliance_energy_serving_watts").value = self._energy.price_watts or 0
        set_engine(self._instruments, self._engine)
        if self._store is not None:
            set_store(self._instruments, self._store())
        if self._hardware is not None and (reading := self._hardware()) is not None:
            set_hardware(self._instruments, reading)
