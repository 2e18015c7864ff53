"""What a finished request adds to the families."""

from __future__ import annotations

from appliance.clock import Clock
from appliance.events import LedgerState, RequestRecord, RequestUse
from appliance.metrics.cells import Cells
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.goodput import GENERATION_ENDPOINTS, Judgement
from appliance.metrics.instruments import Instruments
from appliance.metrics.keys import KeyCounters
from appliance.metrics.labels import ENDPOINTS, FINISH_REASONS, bounded, status_label


class RequestMeter:
    """Counts finished requests into cells and the forecast. One owner, the recorder."""

    def __init__(self, instruments: Instruments, cells: Cells, forecast: QueueForecast, clock: Clock) -> None:
        self._instruments = instruments
        self._cells = cells
        self._forecast = forecast
        self._clock = clock
        self._keys = KeyCounters(instruments)

    def on_request(self, record: RequestRecord, judgement: Judgement, use: RequestUse | None) -> None:
        """A request finished, whatever its end."""
        cells = self._cells
        reason = bounded(record.finish_reason, FINISH_REASONS) if record.finish_reason else "none"
        self._instruments.cell("appliance_requests_total", bounded(record.endpoint, ENDPOINTS), status_label(record.status), reason).value += 1
        cells.prompt_tokens.value += record.num_prompt_tokens
        cells.cached_tokens.value += record.num_cached_tokens
        cells.generated_tokens.value += record.num_generated_tokens
        cells.written_tokens.value += record.num_written_tokens
        for state, seconds in record.states.items():
            cells.states[state].value += seconds
        for objective, good in (("ttft", judgement.ttft), ("tpot", judgement.tpot), ("both", judgement.both)):
            if good is not None:
                judged, kept, judged_tokens, kept_tokens = cells.objectives[objective]
                judged.value += 1
                kept.value += good
                judged_tokens.value += record.num_generated_tokens
                kept_tokens.value += good * record.num_generated_tokens
        if record.endpoint in GENERATION_ENDPOINTS:
            self._keys.on_request(record, judgement, use)
            self._on_generation(record, use)

    def _on_generation(self, record: RequestRecord, use: RequestUse | None) -> None:
        cells, wall = self._cells, self._clock.wall()
        if record.status < 400:
            cells.duration[record.endpoint].observe_with(record.duration_seconds, record.id, wall)
        if record.num_prompt_tokens:
            cells.request_prompt.observe(record.num_prompt_tokens)
        if record.num_generated_tokens:
            self._on_phases(record, wall)
            self._on_shape(record, use)
        if record.tpot_seconds is not None:
            cells.tpot[record.endpoint].observe_with(record.tpot_seconds, record.id, wall)
        if record.joules is not None:
            cells.request_joules.observe_with(record.joules, record.id, wall)
            if record.num_generated_tokens:
                cells.joules_per_token.observe_with(record.joules / record.num_generated_tokens, record.id, wall)

    def _on_phases(self, record: RequestRecord, wall: float) -> None:
        """Where its time went."""
        cells, states = self._cells, record.states
        prefill = states.get(LedgerState.PREFILL, 0.0) + states.get(LedgerState.PREFILL_WAIT, 0.0)
        decode = states.get(LedgerState.DECODE, 0.0)
        cells.queue_seconds.observe_with(states.get(LedgerState.QUEUED, 0.0), record.id, wall)
        cells.prefill_seconds.observe_with(prefill, record.id, wall)
        cells.inference_seconds.observe_with(prefill + decode, record.id, wall)
        if record.num_generated_tokens > 1:
            cells.decode_seconds.observe_with(decode, record.id, wall)

    def _on_shape(self, record: RequestRecord, use: RequestUse | None) -> None:
        """What was asked for, and what came of it."""
        cells = self._cells
        cells.request_generated.observe(record.num_generated_tokens)
        cells.request_longest.observe(record.num_generated_tokens if use is None else use.num_longest_tokens)
        cells.request_choices.observe(record.num_choices)
        cells.request_preemptions.observe(record.num_preemptions)
        if record.max_tokens is not None:
            cells.request_max.observe(record.max_tokens)
        if record.finish_reason in ("stop", "length", "tool_calls"):
            states = record.states
            in_batch = sum(states.get(state, 0.0) for state in (LedgerState.PREFILL, LedgerState.PREFILL_WAIT, LedgerState.DECODE))
            self._forecast.on_request(record.num_prompt_tokens, record.num_generated_tokens, in_batch)
