"""Every metric, declared once: exporter, documentation, dashboards and tests derive from this list.

Names are as PromQL sees them (`_total` included). Units are Prometheus base units; shares are `_ratio`, 0-1. Labels are bounded: each value comes
from a set that the recorder holds, never from a user.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from appliance.metrics import buckets
from appliance.metrics.exposition import Kind
from appliance.metrics.goodput import Slo

Objective = Literal["ttft", "tpot"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. `objective` names the SLO whose threshold becomes a bucket edge."""

    name: str
    kind: Kind
    unit: str  # "" for plain counts
    group: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    objective: Objective | None = None

    def edges(self, slo: Slo, more: Iterable[float] = ()) -> tuple[float, ...]:
        """The bucket edges, the SLO threshold and `more` among them, without +Inf."""
        threshold = () if self.objective is None else (slo.ttft_seconds if self.objective == "ttft" else slo.tpot_seconds,)
        return tuple(sorted({*self.buckets, *threshold, *more}))


def _histogram(name: str, unit: str, group: str, edges: tuple[float, ...], text: str, *labels: str, objective: Objective | None = None) -> Metric:
    return Metric(f"appliance_{name}", "histogram", unit, group, text, labels, edges, objective)


def _counter(name: str, unit: str, group: str, text: str, *labels: str) -> Metric:
    return Metric(f"appliance_{name}_total", "counter", unit, group, text, labels)


def _gauge(name: str, unit: str, group: str, text: str, *labels: str) -> Metric:
    return Metric(f"appliance_{name}", "gauge", unit, group, text, labels)


CATALOGUE: tuple[Metric, ...] = (
    # What a user feels
    _histogram(
        "time_to_first_token_seconds",
        "seconds",
        "latency",
        buckets.FIRST_TOKEN,
        "Receipt of a request to its first token, observed as it is sent.",
        "endpoint",
        objective="ttft",
    ),
    _histogram(
        "inter_token_latency_seconds",
        "seconds",
        "latency",
        buckets.TOKEN,
        "Each gap between two tokens of a sequence, as the server receives them.",
        objective="tpot",
    ),
    _histogram(
        "time_per_output_token_seconds",
        "seconds",
        "latency",
        buckets.TOKEN,
        "Mean gap of a finished request: (last - first) / (n - 1).",
        "endpoint",
        objective="tpot",
    ),
    _histogram(
        "request_duration_seconds", "seconds", "latency", buckets.REQUEST, "Receipt to the last byte of answered generation requests.", "endpoint"
    ),
    _histogram("request_queue_seconds", "seconds", "latency", buckets.PHASE, "Time of a finished request in the waiting queue."),
    _histogram(
        "request_prefill_seconds", "seconds", "latency", buckets.PHASE, "Time of a finished request in prefill, waiting for others' chunks included."
    ),
    _histogram("request_decode_seconds", "seconds", "latency", buckets.PHASE, "Time of a finished request in decode."),
    _histogram("request_inference_seconds", "seconds", "latency", buckets.PHASE, "Time of a finished request in the batch: prefill and decode."),
    _counter("request_state_seconds", "seconds", "latency", "Wall time of finished requests by what they were doing (the ledger).", "state"),
    # Requests
    _counter("requests_received", "", "requests", "Requests whose headers were read.", "endpoint"),
    _counter("requests", "", "requests", "Finished requests, whatever their end.", "endpoint", "status", "finish_reason"),
    _counter("rejections", "", "requests", "Requests refused at admission.", "code"),
    _gauge("requests_running", "", "requests", "Sequences in the running batch."),
    _gauge("requests_waiting", "", "requests", "Sequences in the waiting queue; while the engine is down, all that are in flight."),
    _gauge("requests_in_flight", "", "requests", "Sequences handed to the engine and not yet finished."),
    _gauge("oldest_waiting_age_seconds", "seconds", "requests", "Age of the oldest waiting sequence, now; 0 when none waits."),
    _gauge(
        "predicted_ttft_seconds",
        "seconds",
        "requests",
        "Predicted time to first token of a request that arrives now: what is ahead of it over the measured prefill rate, or the wait for a place in "
        "a full batch if that is longer, and a prefill of its own; 0 before anything was measured.",
    ),
    _gauge("backlog_tokens", "tokens", "requests", "Tokens still to be prefilled: of waiting sequences, and the rest of those in prefill."),
    _histogram("request_choices", "", "requests", buckets.COUNT, "Choices (n, times prompts) of finished generation requests."),
    _histogram("request_preemptions", "", "requests", buckets.COUNT, "Preemptions of finished generation requests."),
    # Tokens
    _histogram("request_prompt_tokens", "tokens", "tokens", buckets.TOKENS, "Prompt tokens of finished generation requests."),
    _histogram("request_generated_tokens", "tokens", "tokens", buckets.TOKENS, "Generated tokens of finished generation requests."),
    _histogram("request_longest_choice_tokens", "tokens", "tokens", buckets.TOKENS, "Generated tokens of a finished request's longest choice."),
    _histogram(
        "request_max_tokens", "tokens", "tokens", buckets.TOKENS, "Output tokens that a choice of a finished request was allowed (max_tokens)."
    ),
    _counter("prompt_tokens", "tokens", "tokens", "Prompt tokens of finished requests."),
    _counter("cached_tokens", "tokens", "tokens", "Prompt tokens of finished requests that came from the prefix cache."),
    _counter("generated_tokens", "tokens", "tokens", "Tokens generated for finished requests; equals the sum in SQL."),
    _counter("written_tokens", "tokens", "tokens", "Of the generated tokens, those written to clients."),
    _counter("output_tokens", "tokens", "tokens", "Tokens received from the engine, counted as they arrive."),
    _counter("surplus_tokens", "tokens", "tokens", "Tokens sampled past a stop and discarded."),
    _counter("admitted_prompt_tokens", "tokens", "tokens", "Demand: prompt tokens at admission."),
    _counter("admitted_max_tokens", "tokens", "tokens", "Demand: output tokens asked for (max_tokens) at admission."),
    _gauge("demand_prompt_tokens_per_second", "", "tokens", "Demand: prompt tokens at admission, per second of the fast window."),
    _gauge(
        "demand_output_tokens_per_second",
        "",
        "tokens",
        "Demand: output tokens expected at admission (max_tokens, at most the mean of recent requests), per second of the fast window.",
    ),
    _gauge("prefill_tokens_per_second", "", "tokens", "Measured prefill rate: tokens over the time of steps that prefill; 0 before the first."),
    # SLO
    _gauge("slo_ttft_seconds", "seconds", "slo", "Time to first token that counts as good."),
    _gauge("slo_tpot_seconds", "seconds", "slo", "Time per output token that counts as good."),
    _gauge("slo_target_ratio", "ratio", "slo", "Share of requests that must be good."),
    _counter("slo_requests", "", "slo", "Finished requests that the objective judges.", "objective"),
    _counter("slo_good_requests", "", "slo", "Of those, good ones.", "objective"),
    _counter("slo_tokens", "tokens", "slo", "Generated tokens of finished requests that the objective judges.", "objective"),
    _counter("slo_good_tokens", "tokens", "slo", "Of those, tokens of good requests: token goodput.", "objective"),
    # Keys: key is the name of an API key ("" where keys are off), never the key
    _counter("key_requests", "", "keys", "Finished generation requests.", "key", "model"),
    _counter("key_errors", "", "keys", "Of those, answered with 5xx.", "key", "model"),
    _counter("key_slo_requests", "", "keys", "Of those, requests that the SLO judges (TTFT and TPOT together).", "key", "model"),
    _counter("key_slo_good_requests", "", "keys", "Of those, good ones.", "key", "model"),
    _counter("key_slo_tokens", "tokens", "keys", "Generated tokens of requests that the SLO judges.", "key", "model"),
    _counter("key_slo_good_tokens", "tokens", "keys", "Of those, tokens of good requests.", "key", "model"),
    _counter("key_prompt_tokens", "tokens", "keys", "Prompt tokens of finished generation requests.", "key", "model"),
    _counter("key_generated_tokens", "tokens", "keys", "Generated tokens of finished generation requests.", "key", "model"),
    _counter(
        "key_engine_seconds",
        "seconds",
        "keys",
        "Engine time of finished requests: each step's, split by modelled cost over its rows.",
        "key",
        "model",
    ),
    _counter("key_joules", "joules", "keys", "Energy of finished requests, split likewise; absent without an energy reading.", "key", "model"),
    # KV cache
    _gauge("kv_blocks", "", "kv", "KV blocks of the pool."),
    _gauge("kv_used_blocks", "", "kv", "KV blocks that a sequence refers to."),
    _gauge("kv_cached_blocks", "", "kv", "KV blocks that a prefix lookup can find, in use or not."),
    _gauge("kv_evictable_blocks", "", "kv", "Of those, blocks that no sequence refers to: the next to be reused once no block is empty."),
    _gauge("kv_used_tokens", "tokens", "kv", "Tokens held in used blocks."),
    _gauge("kv_bytes", "bytes", "kv", "Bytes of the KV pool."),
    _gauge("kv_used_bytes", "bytes", "kv", "Bytes of used blocks."),
    _gauge("kv_utilisation_ratio", "ratio", "kv", "Used blocks over all blocks."),
    _gauge("kv_cached_ratio", "ratio", "kv", "Free blocks that a prefix lookup can still find, over all blocks."),
    _gauge("kv_waste_ratio", "ratio", "kv", "Slots without a token in used blocks, over the slots of used blocks; 0 when none is used."),
    _counter("prefix_query_tokens", "tokens", "kv", "Prompt tokens looked up in the prefix cache."),
    _counter("prefix_hit_tokens", "tokens", "kv", "Of those, found."),
    _counter("kv_allocated_blocks", "", "kv", "Blocks handed out to be written."),
    _counter("kv_reused_blocks", "", "kv", "Blocks that a prefix lookup found and a sequence went on from."),
    _counter("kv_evicted_blocks", "", "kv", "Cached blocks whose content was given up for a new one."),
    _histogram("kv_block_lifetime_seconds", "seconds", "kv", buckets.BLOCK_SECONDS, "Allocation of a block to the end of its content."),
    _histogram("kv_block_idle_seconds", "seconds", "kv", buckets.BLOCK_SECONDS, "Of evicted blocks, the time from the last use to the eviction."),
    _histogram("kv_block_reuses", "", "kv", buckets.BLOCK_REUSES, "How often a block's content was found by another sequence before its end."),
    _counter("preemptions", "", "kv", "Sequences that lost their blocks to others."),
    # Engine
    _counter("aborts", "", "engine", "Sequences that the engine dropped before their end."),
    _counter("engine_steps", "", "engine", "Engine steps."),
    _counter("engine_busy_seconds", "seconds", "engine", "Time in which a step was under way; steps that overlap count once."),
    _counter("engine_prefill_tokens", "tokens", "engine", "Prompt tokens computed, recomputed ones included."),
    _counter("engine_decode_tokens", "tokens", "engine", "Decode tokens computed, surplus ones included."),
    _counter("engine_graph_hits", "", "engine", "Of those, replayed as a CUDA graph."),
    _histogram("engine_step_seconds", "seconds", "engine", buckets.STEP, "Host time of a step: schedule, launch, wait and output."),
    _counter("engine_phase_seconds", "seconds", "engine", "Host time of the step loop by phase.", "phase"),
    _histogram("engine_batch_sequences", "sequences", "engine", buckets.BATCH, "Sequences in a step's batch."),
    _histogram("engine_batch_decode_tokens", "tokens", "engine", buckets.BATCH, "Decode tokens of a step."),
    _histogram("engine_batch_prefill_tokens", "tokens", "engine", buckets.BATCH, "Prefill tokens of a step."),
    _histogram("engine_step_tokens", "tokens", "engine", buckets.BATCH, "Tokens of a step: decode and prefill."),
    _histogram("engine_chunk_tokens", "tokens", "engine", buckets.BATCH, "Tokens of a prefill chunk."),
    _counter(
        "engine_model_flops", "", "engine", "Floating-point operations that the model's arithmetic takes, padding and recomputed products left out."
    ),
    _counter("engine_model_bytes", "bytes", "engine", "Device memory that a step must move at least: weights once, the contexts' KV, new KV."),
    _gauge(
        "engine_peak_flops_per_second", "", "engine", "Dense peak of the device at the model's dtype: known by its name, else measured; 0 if neither."
    ),
    _gauge("engine_peak_bytes_per_second", "", "engine", "Peak memory bandwidth of the device, likewise."),
    _gauge("engine_flops_utilisation_ratio", "ratio", "engine", "Model FLOP utilisation: model FLOPs over peak, over the fast window's wall time."),
    _gauge("engine_bandwidth_utilisation_ratio", "ratio", "engine", "Model bytes over peak, likewise."),
    _gauge("engine_busy_ratio", "ratio", "engine", "Share of the fast window in which a step was under way."),
    _gauge("engine_state", "", "engine", "1 for the state that the engine is in.", "state"),
    _counter("engine_events", "", "engine", "What happened to the engine process.", "kind"),
    _counter("engine_restarts", "", "engine", "Restarts of the engine process after a crash or hang."),
    _gauge("engine_report_age_seconds", "seconds", "engine", "Age of the newest heartbeat or step of the engine."),
    _gauge("engine_free_bytes", "bytes", "engine", "Device memory that the engine sees free; 0 on CPU."),
    # Scaling
    _gauge("scaling_desired_replicas", "", "scaling", "Replicas that the policy asks for."),
    _gauge("scaling_pinned", "", "scaling", "1 while the policy wants more than max_replicas."),
    _counter("scaling_runs", "", "scaling", "Runs of the policy loop."),
    _gauge("scaling_run_age_seconds", "seconds", "scaling", "Time since the newest run of the policy loop."),
    _counter("scaling_decisions", "", "scaling", "Changes of the desired number of replicas.", "direction"),
    _counter("webhook_deliveries", "", "scaling", "Attempts to deliver a signal, and signals given up, by outcome.", "outcome"),
    _gauge("webhook_pending", "", "scaling", "Signals that wait to be delivered."),
    # SQL writer
    _gauge("store_available", "", "store", "1 while the newest flush reached the database."),
    _gauge("store_queued_rows", "rows", "store", "Rows in memory, not yet in the database."),
    _gauge("store_queue_limit_rows", "rows", "store", "Rows that the queue holds before they spool to disk."),
    _gauge("store_spool_backlog_rows", "rows", "store", "Rows on disk that wait for the database."),
    _counter("store_written_rows", "rows", "store", "Rows written to the database."),
    _counter("store_spooled_rows", "rows", "store", "Rows that ever went to the spool."),
    _counter("store_dropped_rows", "rows", "store", "Rows lost because neither database nor disk would take them."),
    _counter("store_refused_rows", "rows", "store", "Rows that the database refused as invalid."),
    _counter("store_flushes", "", "store", "Batches written."),
    _counter("store_failed_flushes", "", "store", "Batches that the database did not take."),
    _counter("store_flush_seconds", "seconds", "store", "Time spent writing batches."),
    # Processes and host
    _counter("process_cpu_seconds", "seconds", "host", "CPU time of our processes.", "process"),
    _gauge("process_resident_bytes", "bytes", "host", "Resident memory of our processes.", "process"),
    _gauge("process_open_fds", "", "host", "Open file descriptors of our processes.", "process"),
    _gauge("process_threads", "", "host", "Threads of our processes.", "process"),
    _histogram(
        "event_loop_lag_seconds", "seconds", "host", buckets.LAG, "How late the server's event loop runs a callback that is due, five times a second."
    ),
    _gauge("host_cpus", "", "host", "CPUs of the host that we may use."),
    _gauge("host_cpu_utilisation_ratio", "ratio", "host", "Busy share of the host's CPUs over the last reading period."),
    _gauge("host_memory_used_bytes", "bytes", "host", "Memory of the host in use."),
    _gauge("host_memory_bytes", "bytes", "host", "Memory of the host."),
    _gauge("host_disk_free_bytes", "bytes", "host", "Free bytes where the state folder lies."),
    _gauge("uptime_seconds", "seconds", "host", "Time since the recorder was made."),
    _gauge("build_info", "", "host", "1; what is running.", "version", "model", "instance_id", "fleet"),
    _gauge("engine_info", "", "engine", "1; facts of the newest engine that became ready.", "device", "dtype", "quantization"),
    _gauge("kv_info", "", "kv", "1; facts of the newest engine's KV pool.", "block_size", "num_blocks", "dtype", "prefix_caching"),
    # Energy of the engine's device
    _counter("energy_joules", "joules", "energy", "Energy of the engine's device since start, by use: serving or idle.", "use"),
    _gauge("energy_idle_watts", "watts", "energy", "Power of the device without work, as last seen; 0 before."),
    _gauge("energy_serving_watts", "watts", "energy", "Power of the device while a step is under way, above idle shares; 0 before."),
    _histogram(
        "request_joules", "joules", "energy", buckets.JOULES, "Energy of a finished request: each step's, split by modelled cost over its rows."
    ),
    _histogram("request_joules_per_token", "", "energy", buckets.TOKEN_JOULES, "Energy of a finished request over its generated tokens."),
    # GPU
    _gauge("gpu_info", "", "gpu", "1; the GPU's name and UUID.", "gpu", "name", "uuid"),
    _gauge("gpu_utilisation_ratio", "ratio", "gpu", "Share of the sampling period in which a kernel ran.", "gpu"),
    _gauge("gpu_memory_utilisation_ratio", "ratio", "gpu", "Share of the sampling period in which device memory was read or written.", "gpu"),
    _gauge("gpu_memory_used_bytes", "bytes", "gpu", "Device memory in use.", "gpu"),
    _gauge("gpu_memory_bytes", "bytes", "gpu", "Device memory.", "gpu"),
    _gauge("gpu_power_watts", "watts", "gpu", "Power drawn.", "gpu"),
    _counter("gpu_energy_joules", "joules", "gpu", "Energy drawn since the driver was loaded.", "gpu"),
    _gauge("gpu_temperature_celsius", "celsius", "gpu", "Temperature of the chip.", "gpu"),
    _gauge("gpu_sm_clock_hertz", "hertz", "gpu", "Clock of the multiprocessors.", "gpu"),
    _gauge("gpu_memory_clock_hertz", "hertz", "gpu", "Clock of the memory.", "gpu"),
    _gauge("gpu_throttled", "", "gpu", "1 while the clock is held down for the reason.", "gpu", "reason"),
    _counter("gpu_xid_errors", "", "gpu", "XID errors reported by the driver since the reader was started.", "gpu"),
)
