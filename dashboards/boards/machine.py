"""The host, our processes, and the way of a row to the database."""

from __future__ import annotations

from boards.frame import Board
from boards.panels import heat, lines
from boards.promql import highest, lowest, quantiles, rate, total

_STORE = [
    lines(
        "Rows",
        [
            (rate("store_written_rows_total"), "written"),
            (rate("store_spooled_rows_total"), "spooled"),
            (rate("store_dropped_rows_total"), "dropped"),
            (rate("store_refused_rows_total"), "refused"),
        ],
        "cps",
        "Rows a second to the database.",
    ),
    lines(
        "Backlog",
        [
            (total("store_queued_rows"), "in memory"),
            (total("store_queue_limit_rows"), "room in memory"),
            (total("store_spool_backlog_rows"), "on disk"),
        ],
        "none",
        "Rows that wait for the database.",
    ),
    lines(
        "Flushes",
        [(rate("store_flushes_total"), "written"), (rate("store_failed_flushes_total"), "failed"), (lowest("store_available"), "database available")],
        "none",
        "Batches a second.",
    ),
    lines("Time of a flush", [(f"{rate('store_flush_seconds_total')} / {rate('store_flushes_total')}", "mean")], "s", "Of one batch.", width=24),
]

_HOST = [
    lines("Host CPU", [(highest("host_cpu_utilisation_ratio", "instance"), "{{instance}}")], "percentunit", "Busy share of the CPUs."),
    lines(
        "CPU of our processes",
        [(rate("process_cpu_seconds_total", "process"), "{{process}}"), (total("host_cpus"), "CPUs")],
        "none",
        "Cores.",
    ),
    lines(
        "Memory",
        [
            (total("process_resident_bytes", "process"), "{{process}}"),
            (total("host_memory_used_bytes"), "host, used"),
            (total("host_memory_bytes"), "host"),
        ],
        "bytes",
        "Resident, and of the host.",
    ),
    lines("Disk free", [(lowest("host_disk_free_bytes", "instance"), "{{instance}}")], "bytes", "Where the state folder lies."),
    lines(
        "Descriptors and threads",
        [(total("process_open_fds", "process"), "fds {{process}}"), (total("process_threads", "process"), "threads {{process}}")],
        "none",
        "Of our processes.",
    ),
    heat(
        "Event loop lag",
        "event_loop_lag_seconds",
        "s",
        "How late the server's callbacks run: above the ITL it is the server that holds streams up.",
        width=12,
    ),
    lines("Event loop lag, quantiles", quantiles("event_loop_lag_seconds"), "s", "The same as curves.", width=12),
    lines("Uptime", [(lowest("uptime_seconds", "instance"), "{{instance}}")], "s", "Of the server."),
]

BOARD = Board(
    "appliance-machine",
    "Appliance: machine and store",
    "CPU, memory, disk and descriptors of the host and of our processes; rows on their way to SQL.",
    [("Store", _STORE), ("Machine", _HOST)],
)
