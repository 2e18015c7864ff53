"""The GPUs: how busy, how hot, and what their energy buys."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import ALWAYS_GREEN, heat, lines, number
from boards.promql import highest, increase, lowest, quantiles, rate, total

_EACH = "{{instance}} {{gpu}}"

_ENERGY = [
    number("Power", total("gpu_power_watts"), "watt", "Drawn now by all GPUs chosen.", width=6),
    number(
        "Energy", f"{increase('gpu_energy_joules_total', window='$__range')} / 3.6e6", "kwatth", "In the time shown, idle energy included.", width=6
    ),
    number(
        "Joules an output token",
        f"{increase('gpu_energy_joules_total', window='$__range')} / {increase('output_tokens_total', window='$__range')}",
        "joule",
        "In the time shown, idle energy included.",
        width=6,
    ),
    number(
        "Output tokens a kWh",
        f"3.6e6 * {increase('output_tokens_total', window='$__range')} / {increase('gpu_energy_joules_total', window='$__range')}",
        "short",
        "In the time shown.",
        width=6,
    ),
    lines(
        "Power by use",
        [
            (rate("energy_joules_total", "use"), "{{use}}"),
            (total("energy_idle_watts"), "level: idle"),
            (total("energy_serving_watts"), "level: above idle, in a step"),
        ],
        "watt",
        "Of the engine's device: what serving takes, and what it draws anyway.",
    ),
    lines("Power by GPU", [(total("gpu_power_watts", "instance, gpu"), _EACH)], "watt", "Drawn."),
    lines(
        "Energy per output token",
        [(f"{rate('gpu_energy_joules_total')} / {rate('output_tokens_total')}", "joules a token")],
        "joule",
        "Idle energy included.",
    ),
    heat("Energy of a request", "request_joules", "joule", "Each step's energy, split by modelled cost over its rows."),
    lines("Energy a token, of requests", quantiles("request_joules_per_token"), "joule", "Idle energy apart."),
    lines("Power by key", [(rate("key_joules_total", "key, model"), "{{key}} {{model}}")], "watt", "Energy of finished requests.", stacked=True),
]

_LOAD = [
    lines("GPU utilisation", [(highest("gpu_utilisation_ratio", "instance, gpu"), _EACH)], "percentunit", "Share of time in which a kernel ran."),
    lines(
        "GPU memory traffic",
        [(highest("gpu_memory_utilisation_ratio", "instance, gpu"), _EACH)],
        "percentunit",
        "Share of time in which memory was read or written.",
    ),
    lines(
        "GPU memory",
        [(total("gpu_memory_used_bytes", "instance, gpu"), _EACH), (total("gpu_memory_bytes"), "all")],
        "bytes",
        "In use.",
    ),
]

_HEALTH = [
    lines("Temperature", [(highest("gpu_temperature_celsius", "instance, gpu"), _EACH)], "celsius", "Of the chip."),
    lines(
        "Clocks",
        [(lowest("gpu_sm_clock_hertz", "gpu"), "SM {{gpu}}"), (lowest("gpu_memory_clock_hertz", "gpu"), "memory {{gpu}}")],
        "hertz",
        "Lowest of the chosen.",
    ),
    lines("Throttled", [(total("gpu_throttled", "reason"), "{{reason}}")], "none", "GPUs held down, by reason."),
    lines("XID errors", [(increase("gpu_xid_errors_total", "instance, gpu"), _EACH)], "none", "Reported by the driver.", width=18),
    number("GPUs", f"count ({total('gpu_power_watts', 'instance, gpu')})", "none", "That report.", steps=ALWAYS_GREEN, width=6),
]

BOARD = Board(
    "appliance-gpu",
    "Appliance: GPU and energy",
    "Load, health and energy of the GPUs, and what a token costs in joules.",
    [("Energy", _ENERGY), ("Load", _LOAD), ("Health", _HEALTH)],
)
