"""What a request adds to the families, from its reception to its end."""

from __future__ import annotations

from appliance.clock import Clock
from appliance.events import LedgerState, RequestRecord, RequestUse
from appliance.metrics.cells import Cells
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.goodput import CHAT, GENERATION_ENDPOINTS, Judgement, Slo, expired_in_queue, judge
from appliance.metrics.instruments import Instruments
from appliance.metrics.keys import KeyCounters
from appliance.metrics.labels import ENDPOINTS, FINISH_REASONS, REJECTIONS, bounded, status_label
from appliance.metrics.window import History


class RequestMeter:
    """Counts requests into cells, history and the forecast; `now` is the time at which it happened. One owner, the recorder."""

    def __init__(self, instruments: Instruments, cells: Cells, history: History, forecast: QueueForecast, slo: Slo, clock: Clock) -> None:
        self._instruments = instruments
        self._cells = cells
        self._history = history
        self._forecast = forecast
        self._slo = slo
        self._clock = clock
        self._keys = KeyCounters(instruments)

    def on_received(self, endpoint: str) -> None:
        """The headers of a request were read."""
        self._instruments.cell("appliance_requests_received_total", bounded(endpoint, ENDPOINTS)).value += 1

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int, now: float, *, reported: bool) -> None:
        """A request was admitted: demand, in tokens. `reported`: the engine's newest report is of a time when it was."""
        self._cells.admitted_prompt.value += num_prompt_tokens
        self._cells.admitted_max.value += max_tokens
        if not reported:
            self._forecast.on_admitted(num_prompt_tokens)
        self._history.on_admitted(now, num_prompt_tokens, max_tokens, self._forecast.expected_output(max_tokens))

    def on_rejected(self, code: str, shed: bool, now: float) -> None:
        """A request was refused at admission; `shed`: for want of capacity."""
        self._instruments.cell("appliance_rejections_total", bounded(code, REJECTIONS)).value += 1
        self._history.on_rejected(now)
        if shed:
            self._history.on_shed(now)

    def on_first_token(self, seconds: float, endpoint: str, request_id: str, now: float) -> None:
        """The first token of a request is on its way, `seconds` after receipt."""
        histogram = self._cells.ttft[endpoint if endpoint in GENERATION_ENDPOINTS else CHAT]
        if request_id:
            histogram.observe_with(seconds, request_id, self._clock.wall())
        else:
            histogram.observe(seconds)
        self._history.on_ttft(now, seconds, seconds <= self._slo.ttft_seconds)
        self.on_other_first_token(now)

    def on_other_first_token(self, now: float) -> None:
        """A first token that nobody waits for: of a further choice of a request."""
        self._cells.output_tokens.value += 1
        self._history.on_output(now, 1)

    def on_request(self, record: RequestRecord, use: RequestUse | None, now: float) -> None:
        """A request finished, whatever its end."""
        judgement = judge(record, self._slo)
        self._count(record, judgement, use)
        if expired_in_queue(record):
            self._history.on_shed(now)
        self._history.on_request(now, error=record.status >= 500, good=judgement.both, tpot_seconds=record.tpot_seconds, good_tpot=judgement.tpot)

    def _count(self, record: RequestRecord, judgement: Judgement, use: RequestUse | None) -> None:
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
