"""What engine steps add to the families: hundreds a second, counted in rows on the event loop. Additions only."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add, attrgetter

from appliance.events import BlockEnds, StepCosts, StepStats
from appliance.metrics.cells import Cells
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.window import History

_counts_of = attrgetter(
    *("prefix_query_tokens", "prefix_hit_tokens", "num_preemptions", "num_aborted", "num_surplus_tokens"),
    *("num_allocated_blocks", "num_reused_blocks", "num_evicted_blocks"),
)
_work_of = attrgetter(
    *("schedule_seconds", "launch_seconds", "wait_seconds", "output_seconds", "busy_seconds"),
    *("num_decode_tokens", "num_prefill_tokens", "num_sequences", "num_sampled_tokens", "num_pairs", "num_read_tokens", "graph_hit"),
)


# When a report came, what it says of the step, and its inter-token latencies, grouped: (seconds, how many sequences).
StepReport = tuple[float, StepStats, Sequence[tuple[float, int]]]


class StepMeter:
    """Counts steps into cells, history and forecast. `costs` are those of the engine that runs them."""

    __slots__ = ("_cells", "_counters", "_forecast", "_history", "costs")

    def __init__(self, cells: Cells, history: History, forecast: QueueForecast) -> None:
        self.costs = StepCosts()
        self._cells = cells
        self._history = history
        self._forecast = forecast
        self._counters = (
            *(cells.prefix_queries, cells.prefix_hits, cells.preemptions, cells.aborts, cells.surplus),
            *(cells.kv_allocated, cells.kv_reused, cells.kv_evicted),
        )  # in the order of `_counts_of`

    def on_steps(self, reports: Sequence[StepReport]) -> None:
        """Reports of the engine, all in one slice of the history: a step was done, or sequences ended without one. A number that is none raises
        before anything is counted."""
        counts = [sum(column) for column in zip(*[_counts_of(stats) for _, stats, _ in reports], strict=True)]
        work = [list(column) for column in zip(*[_work_of(stats) for _, stats, _ in reports if stats.num_sequences], strict=True)]
        sums = [sum(column) for column in work]
        gaps = [gap for _, _, gaps in reports for gap in gaps]
        num_tokens = sum([count for _, count in gaps])
        for cell, count in zip(self._counters, counts, strict=True):
            cell.value += count
        history, forecast = self._history, self._forecast
        for now, stats, _ in reports:
            utilisation = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
            history.on_step(now, stats.num_running, stats.num_waiting, stats.oldest_waiting_age_seconds, utilisation)
            if stats.block_ends is not None:
                self._on_block_ends(stats.block_ends)
            if stats.num_prefill_tokens or stats.prefix_query_tokens:
                forecast.on_step(stats)
                self._cells.chunk_tokens.observe_all([length for _, _, length, _ in stats.chunks])
        forecast.on_report()
        if work:
            self._on_work(work, sums, reports[-1][0])
        self._cells.itl.observe_counts(gaps)
        self._cells.output_tokens.value += num_tokens
        history.on_output(reports[-1][0], num_tokens)

    def _on_work(self, work: Sequence[list[float]], sums: Sequence[float], now: float) -> None:
        """Steps were done; `work`: the columns of `_work_of`, `sums`: theirs."""
        cells, costs = self._cells, self.costs
        *phases, _, decode, prefill, sequences, _, _, _, _ = work
        *phase_seconds, busy_seconds, num_decode, num_prefill, _, num_sampled, num_pairs, num_read, num_hits = sums
        for cell, seconds in zip(cells.phases, phase_seconds, strict=True):
            cell.value += seconds
        cells.step_seconds.observe_all([sum(times) for times in zip(*phases, strict=True)])
        tokens = list(map(add, decode, prefill))
        cells.batch_sequences.observe_all(sequences)
        cells.batch_decode.observe_all(decode)
        cells.batch_prefill.observe_all(prefill)
        cells.step_tokens.observe_all(tokens)
        cells.steps.value += len(tokens)
        cells.graph_hits.value += num_hits
        cells.engine_decode.value += num_decode
        cells.engine_prefill.value += num_prefill
        num_tokens = int(num_decode + num_prefill)
        flops = costs.flops_of(num_tokens, int(num_sampled), int(num_pairs))
        moved_bytes = costs.moved_bytes_of(sum(map(bool, tokens)), num_tokens, int(num_read))
        cells.busy_seconds.value += busy_seconds
        cells.model_flops.value += flops
        cells.model_bytes.value += moved_bytes
        self._history.on_work(now, busy_seconds, flops, moved_bytes)

    def _on_block_ends(self, ends: BlockEnds) -> None:
        cells = self._cells
        cells.kv_lifetime.observe_bits(ends.lifetimes, 0.001, ends.lifetime_seconds)
        cells.kv_idle.observe_bits(ends.idles, 0.001, ends.idle_seconds)
        cells.kv_reuses.observe_bits(ends.reuses, 1.0, ends.num_reuses)
