"""What an engine step adds to the families: runs once a step, hundreds of times a second, on the event loop. Additions only."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.events import BlockEnds, StepCosts, StepStats
from appliance.metrics.cells import Cells
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.window import History


class StepMeter:
    """Counts steps into cells, history and forecast. `costs` are those of the engine that runs them."""

    __slots__ = ("_cells", "_forecast", "_history", "costs")

    def __init__(self, cells: Cells, history: History, forecast: QueueForecast) -> None:
        self.costs = StepCosts()
        self._cells = cells
        self._history = history
        self._forecast = forecast

    def on_step(self, stats: StepStats, now: float) -> None:
        """A report of the engine came at `now`: a step was done, or sequences ended without one."""
        cells = self._cells
        cells.prefix_queries.value += stats.prefix_query_tokens
        cells.prefix_hits.value += stats.prefix_hit_tokens
        cells.preemptions.value += stats.num_preemptions
        cells.aborts.value += stats.num_aborted
        cells.surplus.value += stats.num_surplus_tokens
        cells.kv_allocated.value += stats.num_allocated_blocks
        cells.kv_reused.value += stats.num_reused_blocks
        cells.kv_evicted.value += stats.num_evicted_blocks
        if stats.block_ends is not None:
            self._on_block_ends(stats.block_ends)
        self._forecast.on_report()
        if stats.num_prefill_tokens or stats.prefix_query_tokens:
            self._forecast.on_step(stats)
        work = self._on_work(stats) if stats.num_sequences else (0.0, 0.0, 0.0)
        utilisation = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        self._history.on_step(now, stats.num_running, stats.num_waiting, stats.oldest_waiting_age_seconds, utilisation, work)

    def on_gaps(self, gaps: Sequence[tuple[float, int]], now: float) -> None:
        """Inter-token latencies of one step, grouped: (seconds, how many sequences)."""
        observe = self._cells.itl.observe
        num_tokens = 0
        for seconds, count in gaps:
            observe(seconds, count)
            num_tokens += count
        self._cells.output_tokens.value += num_tokens
        self._history.on_output(now, num_tokens)

    def _on_work(self, stats: StepStats) -> tuple[float, float, float]:
        """A step was done; its busy seconds, FLOPs and moved bytes."""
        cells, costs = self._cells, self.costs
        schedule, launch, wait, output = stats.schedule_seconds, stats.launch_seconds, stats.wait_seconds, stats.output_seconds
        phases = cells.phases
        phases[0].value += schedule
        phases[1].value += launch
        phases[2].value += wait
        phases[3].value += output
        num_decode, num_prefill = stats.num_decode_tokens, stats.num_prefill_tokens
        cells.step_seconds.observe(schedule + launch + wait + output)
        cells.batch_sequences.observe(stats.num_sequences)
        cells.batch_decode.observe(num_decode)
        cells.batch_prefill.observe(num_prefill)
        cells.step_tokens.observe(num_decode + num_prefill)
        cells.steps.value += 1
        cells.graph_hits.value += stats.graph_hit
        cells.engine_decode.value += num_decode
        if num_prefill:
            cells.engine_prefill.value += num_prefill
            for _, _, length, _ in stats.chunks:
                cells.chunk_tokens.observe(length)
        work = stats.busy_seconds, costs.flops(stats), costs.moved_bytes(stats)
        cells.busy_seconds.value += work[0]
        cells.model_flops.value += work[1]
        cells.model_bytes.value += work[2]
        return work

    def _on_block_ends(self, ends: BlockEnds) -> None:
        cells = self._cells
        cells.kv_lifetime.observe_bits(ends.lifetimes, 0.001, ends.lifetime_seconds)
        cells.kv_idle.observe_bits(ends.idles, 0.001, ends.idle_seconds)
        cells.kv_reuses.observe_bits(ends.reuses, 1.0, ends.num_reuses)
