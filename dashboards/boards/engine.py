"""The step loop and the KV pool."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import heat, lines
from boards.promql import highest, increase, lowest, mean, quantiles, rate, recorded, total

_KV = [
    lines(
        "KV use",
        [
            (highest("kv_utilisation_ratio"), "used"),
            (highest("kv_cached_ratio"), "cached, free"),
            (highest("kv_waste_ratio"), "waste of the used"),
        ],
        "percentunit",
        "Of the block pool.",
    ),
    lines(
        "KV blocks",
        [
            (total("kv_blocks"), "all"),
            (total("kv_used_blocks"), "used"),
            (total("kv_cached_blocks"), "cached, in use or not"),
            (total("kv_evictable_blocks"), "cached and evictable"),
        ],
        "none",
        "Blocks of the pool.",
    ),
    lines("KV bytes", [(total("kv_bytes"), "pool"), (total("kv_used_bytes"), "used")], "bytes", "Memory of the pool."),
    lines("KV tokens", [(total("kv_used_tokens"), "in used blocks")], "none", "Context that running sequences hold."),
    lines(
        "Prefix cache hits",
        [(f"{rate('prefix_hit_tokens_total')} / {rate('prefix_query_tokens_total')}", "hits")],
        "percentunit",
        "Share of looked-up prompt tokens that were found.",
    ),
    lines(
        "Blocks a second",
        [
            (rate("kv_allocated_blocks_total"), "allocated"),
            (rate("kv_reused_blocks_total"), "reused by a prefix"),
            (rate("kv_evicted_blocks_total"), "evicted"),
        ],
        "cps",
        "Evictions near the allocations: the cache turns over before it is used.",
    ),
    heat("Lifetime of a block", "kv_block_lifetime_seconds", "s", "From allocation to the end of its content."),
    heat("Idle time before eviction", "kv_block_idle_seconds", "s", "A cache that is too small evicts what was just used."),
    lines("Reuses of a block", [(mean("kv_block_reuses"), "mean")], "none", "How often a block's content was found again before its end."),
    lines(
        "Preemptions and aborts",
        [(rate("preemptions_total"), "preempted"), (rate("aborts_total"), "aborted")],
        "cps",
        "Sequences a second.",
    ),
    lines(
        "Preemptions a request",
        [(recorded("preemptions_per_request:ratio_rate10m"), "{{instance}}")],
        "none",
        "Over 10 minutes; above 0.1 the pool is too small.",
    ),
    lines("Device memory free", [(lowest("engine_free_bytes", "instance"), "{{instance}}")], "bytes", "As the engine sees it; 0 on CPU."),
]

_STEPS = [
    lines("Step time", quantiles("engine_step_seconds"), "s", "Host time of a step."),
    lines(
        "Step time by phase",
        [(f"{rate('engine_phase_seconds_total', 'phase')} / scalar({rate('engine_steps_total')})", "{{phase}}")],
        "s",
        "Mean per step.",
        stacked=True,
    ),
    lines(
        "Steps",
        [(rate("engine_steps_total"), "steps"), (rate("engine_graph_hits_total"), "of those, CUDA graphs")],
        "ops",
        "Steps a second.",
    ),
    heat("Tokens of a step", "engine_step_tokens", "none", "Decode and prefill together."),
    heat("Prefill chunks", "engine_chunk_tokens", "none", "Tokens of a chunk: the ITL target cuts them."),
    heat("Batch size", "engine_batch_sequences", "none", "Sequences in a step."),
    lines(
        "Tokens in a step",
        [(mean("engine_batch_decode_tokens"), "decode"), (mean("engine_batch_prefill_tokens"), "prefill")],
        "none",
        "Mean per step.",
        stacked=True,
    ),
    lines("Output by instance", [(recorded("output_tokens:rate5m"), "{{instance}}")], "cps", "Tokens a second over 5 minutes.", stacked=True),
]

_WORK = [
    lines(
        "Utilisation of the device",
        [
            (highest("engine_busy_ratio"), "time with a step under way"),
            (highest("engine_flops_utilisation_ratio"), "model FLOPs (MFU)"),
            (highest("engine_bandwidth_utilisation_ratio"), "model bytes (MBU)"),
        ],
        "percentunit",
        "Of wall time, of the device's peak FLOPs, of its peak bandwidth.",
    ),
    lines(
        "Model FLOPs",
        [(rate("engine_model_flops_total"), "done"), (total("engine_peak_flops_per_second"), "peak")],
        "flops",
        "What the model's arithmetic takes.",
    ),
    lines(
        "Model bytes",
        [(rate("engine_model_bytes_total"), "moved at least"), (total("engine_peak_bytes_per_second"), "peak")],
        "Bps",
        "Weights once a step, the contexts' KV, new KV.",
    ),
    lines(
        "Tokens computed",
        [(rate("engine_prefill_tokens_total"), "prefill"), (rate("engine_decode_tokens_total"), "decode")],
        "cps",
        "Recomputed and surplus ones included.",
        stacked=True,
    ),
    lines(
        "Prefill rate and backlog",
        [(total("prefill_tokens_per_second"), "tokens/s while prefilling"), (total("backlog_tokens"), "tokens waiting for prefill")],
        "none",
        "Their ratio is what predicts the time to the first token.",
    ),
    lines("Busy seconds", [(rate("engine_busy_seconds_total", "instance"), "{{instance}}")], "percentunit", "Share of time with a step under way."),
]

_PROCESS = [
    lines("Engine state", [(f"{total('engine_state', 'state')} > 0", "{{state}}")], "none", "Instances in each state."),
    lines(
        "Engine events",
        [(increase("engine_events_total", "kind"), "{{kind}}"), (increase("engine_restarts_total"), "restarts")],
        "none",
        "Starts, crashes, hangs.",
    ),
    lines(
        "Age of the engine's report",
        [(highest("engine_report_age_seconds", "instance"), "{{instance}}")],
        "s",
        "Above a few seconds the engine hangs.",
    ),
]

BOARD = Board(
    "appliance-engine",
    "Appliance: engine and KV",
    "What the step loop does with its time, and what the KV pool holds.",
    [("KV cache", _KV), ("Steps", _STEPS), ("Work", _WORK), ("Engine process", _PROCESS)],
)
