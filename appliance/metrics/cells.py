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
        self.step_tokens = histogram("appliance_engine_step_tokens")
        self.chunk_tokens = histogram("appliance_engine_chunk_tokens")
        self.busy_seconds = cell("appliance_engine_busy_seconds_total")
        self.engine_prefill = cell("appliance_engine_prefill_tokens_total")
        self.engine_decode = cell("appliance_engine_decode_tokens_total")
        self.model_flops = cell("appliance_engine_model_flops_total")
        self.model_bytes = cell("appliance_engine_model_bytes_total")
        self.kv_allocated = cell("appliance_kv_allocated_blocks_total")
        self.kv_reused = cell("appliance_kv_reused_blocks_total")
        self.kv_evicted = cell("appliance_kv_evicted_blocks_total")
        self.kv_lifetime = histogram("appliance_kv_block_lifetime_seconds")
        self.kv_idle = histogram("appliance_kv_block_idle_seconds")
        self.kv_reuses = histogram("appliance_kv_block_reuses")
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
        self.inference_seconds = histogram("appliance_request_inference_seconds")
        self.request_choices = histogram("appliance_request_choices")
        self.request_preemptions = histogram("appliance_request_preemptions")
        self.request_longest = histogram("appliance_request_longest_choice_tokens")
        self.request_max = histogram("appliance_request_max_tokens")
        self.request_joules = histogram("appliance_request_joules")
        self.joules_per_token = histogram("appliance_request_joules_per_token")
        self.energy = {use: cell("appliance_energy_joules_total", use) for use in ("serving", "idle")}
        self.loop_lag = histogram("appliance_event_loop_lag_seconds")
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
            objective: tuple(cell(f"appliance_slo_{what}_total", objective) for what in ("requests", "good_requests", "tokens", "good_tokens"))
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
