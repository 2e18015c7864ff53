"""The recorder's cells, looked up once, and the label values that must exist before their first use."""

from __future__ import annotations

from appliance.events import LedgerState
from appliance.metrics.goodput import GENERATION_ENDPOINTS
from appliance.metrics.instruments import Instruments
from appliance.metrics.labels import DIRECTIONS, EVENT_KINDS, OUTCOMES, PHASES, REJECTIONS


class Cells:
    """One attribute a cell: a dict lookup by name at each of some 5,000 observations a second would cost more than the observation."""

    def __init__(self, instruments: Instruments) -> None:
        cell, histogram = instruments.cell, instruments.histogram
        self.phases = [cell("appliance_engine_phase_seconds_total", phase) for phase in PHASES]
        self.step_seconds = histogram("appliance_engine_step_seconds")
        self.batch_sequences = histogram("appliance_engine_batch_sequences")
        self.batch_decode = histogram("appliance_engine_batch_decode_tokens")
        self.batch_prefill = histogram("appliance_engine_batch_prefill_tokens")
        self.steps = cell("appliance_engine_steps_total")
        self.graph_hits = cell("appliance_engine_graph_hits_total")
        self.restarts = cell("appliance_engine_restarts_total")
        self.prefix_queries = cell("appliance_prefix_query_tokens_total")
        self.prefix_hits = cell("appliance_prefix_hit_tokens_total")
        self.preemptions = cell("appliance_preemptions_total")
        self.aborts = cell("appliance_aborts_total")
        self.surplus = cell("appliance_surplus_tokens_total")
        self.ttft = {endpoint: histogram("appliance_time_to_first_token_seconds", endpoint) for endpoint in sorted(GENERATION_ENDPOINTS)}
        self.itl = histogram("appliance_inter_token_latency_seconds")
        self.tpot = {endpoint: histogram("appliance_time_per_output_token_seconds", endpoint) for endpoint in sorted(GENERATION_ENDPOINTS)}
        self.duration = {endpoint: histogram("appliance_request_duration_seconds", endpoint) for endpoint in sorted(GENERATION_ENDPOINTS)}
        self.queue_seconds = histogram("appliance_request_queue_seconds")
        self.prefill_seconds = histogram("appliance_request_prefill_seconds")
        self.decode_seconds = histogram("appliance_request_decode_seconds")
        self.request_prompt = histogram("appliance_request_prompt_tokens")
        self.request_generated = histogram("appliance_request_generated_tokens")
        self.output_tokens = cell("appliance_output_tokens_total")
        self.prompt_tokens = cell("appliance_prompt_tokens_total")
        self.cached_tokens = cell("appliance_cached_tokens_total")
        self.generated_tokens = cell("appliance_generated_tokens_total")
        self.written_tokens = cell("appliance_written_tokens_total")
        self.admitted_prompt = cell("appliance_admitted_prompt_tokens_total")
        self.admitted_max = cell("appliance_admitted_max_tokens_total")
        self.states = {state.value: cell("appliance_request_state_seconds_total", state.value) for state in LedgerState}
        self.objectives = {
            objective: (cell("appliance_slo_requests_total", objective), cell("appliance_slo_good_requests_total", objective))
            for objective in ("ttft", "tpot", "both")
        }
        for code in REJECTIONS:  # so that rate() sees the first one
            cell("appliance_rejections_total", code)
        for kind in EVENT_KINDS:
            cell("appliance_engine_events_total", kind)
        for direction in DIRECTIONS:
            cell("appliance_scaling_decisions_total", direction)
        for outcome in OUTCOMES:
            cell("appliance_webhook_deliveries_total", outcome)
