"""Every metric, declared once: exporter, documentation, dashboards and tests derive from this list.

Names are as PromQL sees them (`_total` included). Units are Prometheus base units; shares are `_ratio`, 0-1. Labels are bounded: each value comes
from a set that the recorder holds, never from a user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from appliance.metrics.goodput import Slo

Kind = Literal["counter", "gauge", "histogram"]

# A healthy GPU streams at 2-7 ms a token and queues for less than a millisecond: the edges must tell those apart.
_FIRST_TOKEN = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
_TOKEN = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
_PHASE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_REQUEST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_STEP = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
_BATCH = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


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
    objective: Literal["ttft", "tpot"] | None = None

    def edges(self, slo: Slo) -> tuple[float, ...]:
        """The bucket edges, the SLO threshold among them, without +Inf."""
        extra = () if self.objective is None else (slo.ttft_seconds if self.objective == "ttft" else slo.tpot_seconds,)
        return tuple(sorted({*self.buckets, *extra}))


def _histogram(name: str, unit: str, group: str, buckets: tuple[float, ...], text: str, objective: Literal["ttft", "tpot"] | None = None) -> Metric:
    return Metric(f"appliance_{name}", "histogram", unit, group, text, (), buckets, objective)


def _counter(name: str, unit: str, group: str, text: str, *labels: str) -> Metric:
    return Metric(f"appliance_{name}_total", "counter", unit, group, text, labels)


def _gauge(name: str, unit: str, group: str, text: str, *labels: str) -> Metric:
    return Metric(f"appliance_{name}", "gauge", unit, group, text, labels)


CATALOGUE: tuple[Metric, ...] = (
    # What a user feels
    _histogram(
        "time_to_first_token_seconds", "seconds", "latency", _FIRST_TOKEN, "Receipt of a request to its first token, observed as it is sent.", "ttft"
    ),
    _histogram(
        "inter_token_latency_seconds", "seconds", "latency", _TOKEN, "Each gap between two tokens of a sequence, as the server receives them.", "tpot"
    ),
    _histogram("time_per_output_token_seconds", "seconds", "latency", _TOKEN, "Mean gap of a finished request: (last - first) / (n - 1).", "tpot"),
    _histogram("request_duration_seconds", "seconds", "latency", _REQUEST, "Receipt to the last byte of answered generation requests."),
    _histogram("request_queue_seconds", "seconds", "latency", _PHASE, "Time of a finished request in the waiting queue."),
    _histogram(
        "request_prefill_seconds", "seconds", "latency", _PHASE, "Time of a finished request in prefill, waiting for others' chunks included."
    ),
    _histogram("request_decode_seconds", "seconds", "latency", _PHASE, "Time of a finished request in decode."),
    _counter("request_state_seconds", "seconds", "latency", "Wall time of finished requests by what they were doing (the ledger).", "state"),
    # Requests
    _counter("requests_received", "", "requests", "Requests whose headers were read.", "endpoint"),
    _counter("requests", "", "requests", "Finished requests, whatever their end.", "endpoint", "status", "finish_reason"),
    _counter("rejections", "", "requests", "Requests refused at admission.", "code"),
    _gauge("requests_running", "", "requests", "Sequences in the running batch."),
    _gauge("requests_waiting", "", "requests", "Sequences in the waiting queue; while the engine is down, all that are in flight."),
    _gauge("requests_in_flight", "", "requests", "Sequences handed to the engine and not yet finished."),
    _gauge("oldest_waiting_age_seconds", "seconds", "requests", "Age of the oldest waiting sequence, now; 0 when none waits."),
    # Tokens
    _histogram("request_prompt_tokens", "tokens", "tokens", _TOKENS, "Prompt tokens of finished generation requests."),
    _histogram("request_generated_tokens", "tokens", "tokens", _TOKENS, "Generated tokens of finished generation requests."),
    _counter("prompt_tokens", "tokens", "tokens", "Prompt tokens of finished requests."),
    _counter("cached_tokens", "tokens", "tokens", "Prompt tokens of finished requests that came from the prefix cache."),
    _counter("generated_tokens", "tokens", "tokens", "Tokens generated for finished requests; equals the sum in SQL."),
    _counter("written_tokens", "tokens", "tokens", "Of the generated tokens, those written to clients."),
    _counter("output_tokens", "tokens", "tokens", "Tokens received from the engine, counted as they arrive."),
    _counter("surplus_tokens", "tokens", "tokens", "Tokens sampled past a stop and discarded."),
    _counter("admitted_prompt_tokens", "tokens", "tokens", "Demand: prompt tokens at admission."),
    _counter("admitted_max_tokens", "tokens", "tokens", "Demand: output tokens asked for (max_tokens) at admission."),
    # SLO
    _gauge("slo_ttft_seconds", "seconds", "slo", "Time to first token that counts as good."),
    _gauge("slo_tpot_seconds", "seconds", "slo", "Time per output token that counts as good."),
    _gauge("slo_target_ratio", "ratio", "slo", "Share of requests that must be good."),
    _counter("slo_requests", "", "slo", "Finished requests that the objective judges.", "objective"),
    _counter("slo_good_requests", "", "slo", "Of those, good ones.", "objective"),
    # KV cache
    _gauge("kv_blocks", "", "kv", "KV blocks of the pool."),
    _gauge("kv_used_blocks", "", "kv", "KV blocks that a sequence refers to."),
    _gauge("kv_utilisation_ratio", "ratio", "kv", "Used blocks over all blocks."),
    _gauge("kv_cached_ratio", "ratio", "kv", "Free blocks that a prefix lookup can still find, over all blocks."),
    _gauge("kv_waste_ratio", "ratio", "kv", "Slots without a token in used blocks, over the slots of used blocks; 0 when none is used."),
    _counter("prefix_query_tokens", "tokens", "kv", "Prompt tokens looked up in the prefix cache."),
    _counter("prefix_hit_tokens", "tokens", "kv", "Of those, found."),
    _counter("preemptions", "", "kv", "Sequences that lost their blocks to others."),
    # Engine
    _counter("aborts", "", "engine", "Sequences that the engine dropped before their end."),
    _counter("engine_steps", "", "engine", "Engine steps."),
    _counter("engine_graph_hits", "", "engine", "Of those, replayed as a CUDA graph."),
    _histogram("engine_step_seconds", "seconds", "engine", _STEP, "Host time of a step: schedule, launch, wait and output."),
    _counter("engine_phase_seconds", "seconds", "engine", "Host time of the step loop by phase.", "phase"),
    _histogram("engine_batch_sequences", "sequences", "engine", _BATCH, "Sequences in a step's batch."),
    _histogram("engine_batch_decode_tokens", "tokens", "engine", _BATCH, "Decode tokens of a step."),
    _histogram("engine_batch_prefill_tokens", "tokens", "engine", _BATCH, "Prefill tokens of a step."),
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
    _gauge("host_cpus", "", "host", "CPUs of the host that we may use."),
    _gauge("host_cpu_utilisation_ratio", "ratio", "host", "Busy share of the host's CPUs over the last reading period."),
    _gauge("host_memory_used_bytes", "bytes", "host", "Memory of the host in use."),
    _gauge("host_memory_bytes", "bytes", "host", "Memory of the host."),
    _gauge("host_disk_free_bytes", "bytes", "host", "Free bytes where the state folder lies."),
    _gauge("uptime_seconds", "seconds", "host", "Time since the recorder was made."),
    _gauge("build_info", "", "host", "1; what is running.", "version", "model", "instance_id", "fleet"),
    _gauge("engine_info", "", "engine", "1; facts of the newest engine that became ready.", "device", "dtype", "quantization"),
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
