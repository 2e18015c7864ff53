"""Dashboards as code: `python dashboards/build.py` writes appliance-overview.json beside this file; a test holds the committed file current.

Series carry Prometheus' own `job` and `instance`; the model is a label of appliance_build_info alone, so the variable `instance` is narrowed
by `model`, and every query by `instance`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

OUTPUT = Path(__file__).with_name("appliance-overview.json")
UID = "appliance-overview"
SOURCE = models.DataSourceRef("prometheus", "${datasource}")

Query = tuple[str, str]  # (PromQL, legend)


def series(name: str, **labels: str) -> str:
    """`name` of the chosen instances; a label value that starts with ~ is a regular expression."""
    matchers = [
        'instance=~"$instance"',
        *(f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"' for label, value in labels.items()),
    ]
    return f"appliance_{name}{{{', '.join(matchers)}}}"


def rate(name: str, by: str = "", **labels: str) -> str:
    """Per-second rate of a counter, summed over the chosen instances (and kept apart `by` a label)."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({series(name, **labels)}[$__rate_interval]))"


def total(name: str, by: str = "", **labels: str) -> str:
    """A gauge summed over the chosen instances."""
    return f"sum{f' by ({by})' if by else ''} ({series(name, **labels)})"


def quantile(share: float, name: str) -> str:
    """A quantile of a histogram over all chosen instances."""
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', 'le')})"


def attainment(objective: str, window: str = "$__rate_interval") -> str:
    """Share of judged requests that were good."""
    good, judged = (f"sum (increase({series(name, objective=objective)}[{window}]))" for name in ("slo_good_requests_total", "slo_requests_total"))
    return f"{good} / {judged}"


def quantiles(name: str) -> list[Query]:
    """p50, p95 and p99."""
    return [(quantile(share, name), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def _targets(panel: Any, queries: Iterable[Query], *, instant: bool = False, heat: bool = False) -> None:
    for index, (expr, legend) in enumerate(queries):
        target = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + index)).datasource(SOURCE)
        if instant:
            target = target.instant()
        if heat:
            target = target.format(prometheus_models.PromQueryFormat.HEATMAP).exemplar(True)
        panel.with_target(target)


def number(
    title: str, expr: str, unit: str, text: str, *, steps: Sequence[tuple[float | None, str]] = ((None, "green"),), width: int = 4
) -> stat.Panel:
    """One number with its recent course behind it."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(width).height(5)
    thresholds = [models.Threshold(value, colour) for value, colour in steps]
    panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(thresholds))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    _targets(panel, [(expr, title)])
    return panel


def lines(
    title: str, queries: Sequence[Query], unit: str, text: str, *, width: int = 8, stacked: bool = False, low: float | None = 0.0
) -> timeseries.Panel:
    """Curves over time."""
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(width).height(8)
    panel.line_width(1).fill_opacity(30 if stacked else 8).show_points(common_models.VisibilityMode.NEVER)
    if low is not None:
        panel.min(low)
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    _targets(panel, queries)
    return panel


def heat(title: str, name: str, unit: str, text: str, *, width: int = 8) -> heatmap.Panel:
    """A histogram's buckets over time, with exemplars."""
    panel = heatmap.Panel().title(title).description(text).datasource(SOURCE).span(width).height(8).calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit(unit))
    panel.color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Turbo").exponent(0.5).steps(64))
    _targets(panel, [(rate(f"{name}_bucket", "le"), "{{le}}")], heat=True)
    return panel


def _variables(board: dashboard.Dashboard) -> None:
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name, label, query in (
        ("model", "Model", "label_values(appliance_build_info, model)"),
        ("instance", "Instance", 'label_values(appliance_build_info{model=~"$model"}, instance)'),
    ):
        variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(query).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        everything = models.VariableOption(True, ["All"], ["$__all"])
        board.with_variable(variable.multi(True).include_all(True).current(everything).sort(models.VariableSort.ALPHABETICAL_ASC))


def _annotations(board: dashboard.Dashboard) -> None:
    for name, colour, expr in (
        ("Scale decisions", "blue", f"sum by (direction) (increase({series('scaling_decisions_total')}[$__rate_interval])) > 0"),
        ("Engine restarts", "red", f"sum by (instance) (increase({series('engine_restarts_total')}[$__rate_interval])) > 0"),
    ):
        board.annotation(dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour).expr(expr))


GOOD_ABOVE_99 = ((None, "red"), (0.95, "orange"), (0.99, "green"))
BAD_ABOVE_ZERO = ((None, "green"), (1e-9, "red"))


def rows() -> list[tuple[str, list[Any]]]:
    """The rows with their panels, in order."""
    available = f"1 - sum (increase({series('requests_total', status='~5..')}[$__range])) / sum (increase({series('requests_total')}[$__range]))"
    burn = f"(1 - {attainment('both', '1h')}) / (1 - min ({series('slo_target_ratio')}))"
    return [
        (
            "Service level",
            [
                number(
                    "Goodput", attainment("both", "$__range"), "percentunit", "Share of requests within the TTFT and TPOT SLO.", steps=GOOD_ABOVE_99
                ),
                number("TTFT within SLO", attainment("ttft", "$__range"), "percentunit", "Share of first tokens in time.", steps=GOOD_ABOVE_99),
                number(
                    "TPOT within SLO", attainment("tpot", "$__range"), "percentunit", "Share of replies at the promised pace.", steps=GOOD_ABOVE_99
                ),
                number("Availability", available, "percentunit", "Share of requests not answered with 5xx; refusals count.", steps=GOOD_ABOVE_99),
                number(
                    "Burn rate, 1 h",
                    burn,
                    "none",
                    "1 spends the error budget exactly in its period.",
                    steps=((None, "green"), (1.0, "orange"), (6.0, "red")),
                ),
                number("Oldest waiting", f"max ({series('oldest_waiting_age_seconds')})", "s", "Age of the oldest request that waits now."),
                lines(
                    "SLO attainment",
                    [*((attainment(o), o) for o in ("ttft", "tpot", "both")), (f"max ({series('slo_target_ratio')})", "target")],
                    "percentunit",
                    "Per objective, against the target.",
                    width=12,
                    low=None,
                ),
                lines(
                    "SLO thresholds",
                    [(f"max ({series('slo_ttft_seconds')})", "TTFT"), (f"max ({series('slo_tpot_seconds')})", "TPOT")],
                    "s",
                    "What counts as good.",
                    width=4,
                ),
                lines(
                    "Judged and good requests",
                    [(rate("slo_requests_total", objective="both"), "judged"), (rate("slo_good_requests_total", objective="both"), "good")],
                    "reqps",
                    "Requests that the SLO judges.",
                ),
            ],
        ),
        (
            "Latency",
            [
                heat("Time to first token", "time_to_first_token_seconds", "s", "Receipt to first token; points are exemplars with request ids."),
                heat("Inter-token latency", "inter_token_latency_seconds", "s", "Every gap between two tokens."),
                heat("Request duration", "request_duration_seconds", "s", "Receipt to the last byte."),
                lines("TTFT", quantiles("time_to_first_token_seconds"), "s", "Quantiles of the time to first token."),
                lines("TPOT", quantiles("time_per_output_token_seconds"), "s", "Quantiles of the mean gap of a request."),
                lines("ITL", quantiles("inter_token_latency_seconds"), "s", "Quantiles of the gaps themselves: stalls show here first."),
                lines("Queue time", quantiles("request_queue_seconds"), "s", "In the waiting queue."),
                lines("Prefill time", quantiles("request_prefill_seconds"), "s", "Waiting for others' chunks included."),
                lines("Decode time", quantiles("request_decode_seconds"), "s", "From the prompt's end to the last token."),
                lines(
                    "Where the time goes",
                    [(rate("request_state_seconds_total", "state"), "{{state}}")],
                    "s",
                    "Ledger of finished requests, request-seconds a second.",
                    width=24,
                    stacked=True,
                ),
            ],
        ),
        (
            "Traffic",
            [
                lines(
                    "Tokens",
                    [
                        (rate("output_tokens_total"), "output"),
                        (rate("admitted_prompt_tokens_total"), "prompt, at admission"),
                        (rate("cached_tokens_total"), "prompt, from cache"),
                        (rate("surplus_tokens_total"), "surplus, discarded"),
                    ],
                    "cps",
                    "Tokens a second.",
                ),
                lines("Requests by status", [(rate("requests_total", "status"), "{{status}}")], "reqps", "Finished requests.", stacked=True),
                lines("Refused at admission", [(rate("rejections_total", "code"), "{{code}}")], "reqps", "Queue full, draining, quotas."),
                lines(
                    "Received and finished",
                    [(rate("requests_received_total"), "received"), (rate("requests_total"), "finished")],
                    "reqps",
                    "A gap that grows is a backlog.",
                ),
                lines(
                    "Demand",
                    [(rate("admitted_prompt_tokens_total"), "prompt"), (rate("admitted_max_tokens_total"), "output asked for (max_tokens)")],
                    "cps",
                    "Measured at admission.",
                ),
                lines(
                    "Finished requests' tokens",
                    [
                        (rate("prompt_tokens_total"), "prompt"),
                        (rate("generated_tokens_total"), "generated"),
                        (rate("written_tokens_total"), "written"),
                    ],
                    "cps",
                    "Written below generated: clients that left.",
                ),
                heat("Prompt length", "request_prompt_tokens", "none", "Tokens of finished requests.", width=12),
                heat("Output length", "request_generated_tokens", "none", "Tokens of finished requests.", width=12),
            ],
        ),
        (
            "Queue",
            [
                lines(
                    "Requests in the engine",
                    [(total("requests_running"), "running"), (total("requests_waiting"), "waiting"), (total("requests_in_flight"), "in flight")],
                    "none",
                    "Running is bounded by the batch, waiting by nothing but the queue.",
                    width=12,
                ),
                lines(
                    "Age of the oldest waiting request",
                    [(f"max by (instance) ({series('oldest_waiting_age_seconds')})", "{{instance}}")],
                    "s",
                    "Live, while the queue builds.",
                    width=12,
                ),
            ],
        ),
        (
            "KV cache",
            [
                lines(
                    "KV use",
                    [
                        (f"max ({series('kv_utilisation_ratio')})", "used"),
                        (f"max ({series('kv_cached_ratio')})", "cached, free"),
                        (f"max ({series('kv_waste_ratio')})", "waste of the used"),
                    ],
                    "percentunit",
                    "Of the block pool.",
                ),
                lines("KV blocks", [(total("kv_blocks"), "all"), (total("kv_used_blocks"), "used")], "none", "Blocks of the pool."),
                lines(
                    "Prefix cache hits",
                    [(f"{rate('prefix_hit_tokens_total')} / {rate('prefix_query_tokens_total')}", "hits")],
                    "percentunit",
                    "Share of looked-up prompt tokens that were found.",
                ),
                lines(
                    "Preemptions and aborts",
                    [(rate("preemptions_total"), "preempted"), (rate("aborts_total"), "aborted")],
                    "cps",
                    "Sequences a second.",
                    width=12,
                ),
                lines(
                    "Device memory free",
                    [(f"min by (instance) ({series('engine_free_bytes')})", "{{instance}}")],
                    "bytes",
                    "As the engine sees it; 0 on CPU.",
                    width=12,
                ),
            ],
        ),
        (
            "Engine",
            [
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
                heat("Batch size", "engine_batch_sequences", "none", "Sequences in a step."),
                lines(
                    "Tokens in a step",
                    [
                        (f"{rate('engine_batch_decode_tokens_sum')} / {rate('engine_steps_total')}", "decode"),
                        (f"{rate('engine_batch_prefill_tokens_sum')} / {rate('engine_steps_total')}", "prefill"),
                    ],
                    "none",
                    "Mean per step.",
                    stacked=True,
                ),
                lines("Engine state", [(f"{total('engine_state', 'state')} > 0", "{{state}}")], "none", "Instances in each state."),
                lines(
                    "Engine events",
                    [
                        (f"sum by (kind) (increase({series('engine_events_total')}[$__rate_interval]))", "{{kind}}"),
                        (f"sum (increase({series('engine_restarts_total')}[$__rate_interval]))", "restarts"),
                    ],
                    "none",
                    "Starts, crashes, hangs.",
                    width=12,
                ),
                lines(
                    "Age of the engine's report",
                    [(f"max by (instance) ({series('engine_report_age_seconds')})", "{{instance}}")],
                    "s",
                    "Above a few seconds the engine hangs.",
                    width=12,
                ),
            ],
        ),
        (
            "Scaling",
            [
                lines(
                    "Replicas wanted",
                    [(f"max by (instance) ({series('scaling_desired_replicas')})", "{{instance}}")],
                    "none",
                    "What the policy of each instance asks for.",
                ),
                lines(
                    "Decisions",
                    [(f"sum by (direction) (increase({series('scaling_decisions_total')}[$__rate_interval]))", "{{direction}}")],
                    "none",
                    "Changes of the number.",
                ),
                lines(
                    "Signals",
                    [(f"sum by (outcome) (increase({series('webhook_deliveries_total')}[$__rate_interval]))", "{{outcome}}")],
                    "none",
                    "Attempts and ends of deliveries.",
                ),
                number(
                    "Pinned at max",
                    f"max ({series('scaling_pinned')})",
                    "none",
                    "1 while more than max_replicas is wanted.",
                    steps=BAD_ABOVE_ZERO,
                    width=6,
                ),
                number(
                    "Age of the policy loop",
                    f"max ({series('scaling_run_age_seconds')})",
                    "s",
                    "Time since its newest run.",
                    steps=((None, "green"), (60.0, "red")),
                    width=6,
                ),
                number("Signals waiting", total("webhook_pending"), "none", "Not yet delivered.", width=6),
                number("Runs of the policy", rate("scaling_runs_total"), "ops", "Looks a second.", width=6),
            ],
        ),
        (
            "Store",
            [
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
                    [(total("store_queued_rows"), "in memory"), (total("store_spool_backlog_rows"), "on disk")],
                    "none",
                    "Rows that wait for the database.",
                ),
                lines(
                    "Flushes",
                    [
                        (rate("store_flushes_total"), "written"),
                        (rate("store_failed_flushes_total"), "failed"),
                        (f"min ({series('store_available')})", "database available"),
                    ],
                    "none",
                    "Batches a second.",
                ),
                lines(
                    "Time of a flush",
                    [(f"{rate('store_flush_seconds_total')} / {rate('store_flushes_total')}", "mean")],
                    "s",
                    "Of one batch.",
                    width=24,
                ),
            ],
        ),
        (
            "Machine",
            [
                lines(
                    "Host CPU",
                    [(f"max by (instance) ({series('host_cpu_utilisation_ratio')})", "{{instance}}")],
                    "percentunit",
                    "Busy share of the CPUs.",
                ),
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
                lines(
                    "Disk free", [(f"min by (instance) ({series('host_disk_free_bytes')})", "{{instance}}")], "bytes", "Where the state folder lies."
                ),
                lines(
                    "Descriptors and threads",
                    [(total("process_open_fds", "process"), "fds {{process}}"), (total("process_threads", "process"), "threads {{process}}")],
                    "none",
                    "Of our processes.",
                ),
                lines("Uptime", [(f"min by (instance) ({series('uptime_seconds')})", "{{instance}}")], "s", "Of the server."),
            ],
        ),
        (
            "GPU",
            [
                lines(
                    "GPU utilisation",
                    [
                        (f"max by (instance, gpu) ({series('gpu_utilisation_ratio')})", "{{instance}} {{gpu}}"),
                        (f"max by (instance, gpu) ({series('gpu_memory_utilisation_ratio')})", "memory {{instance}} {{gpu}}"),
                    ],
                    "percentunit",
                    "Share of time in which a kernel ran; in which memory was read or written.",
                ),
                lines(
                    "GPU memory",
                    [(total("gpu_memory_used_bytes", "instance, gpu"), "{{instance}} {{gpu}}"), (total("gpu_memory_bytes"), "all")],
                    "bytes",
                    "In use.",
                ),
                lines("Power", [(total("gpu_power_watts", "instance, gpu"), "{{instance}} {{gpu}}")], "watt", "Drawn."),
                lines(
                    "Energy per output token",
                    [(f"{rate('gpu_energy_joules_total')} / {rate('output_tokens_total')}", "joules a token")],
                    "joule",
                    "Idle energy included.",
                ),
                lines(
                    "Temperature",
                    [(f"max by (instance, gpu) ({series('gpu_temperature_celsius')})", "{{instance}} {{gpu}}")],
                    "celsius",
                    "Of the chip.",
                ),
                lines(
                    "Clocks",
                    [
                        (f"min by (instance, gpu) ({series('gpu_sm_clock_hertz')})", "SM {{gpu}}"),
                        (f"min by (instance, gpu) ({series('gpu_memory_clock_hertz')})", "memory {{gpu}}"),
                    ],
                    "hertz",
                    "Lowest of the chosen.",
                ),
                lines("Throttled", [(f"{total('gpu_throttled', 'reason')} > 0", "{{reason}}")], "none", "GPUs held down, by reason.", width=12),
                lines(
                    "XID errors",
                    [(f"sum by (instance, gpu) (increase({series('gpu_xid_errors_total')}[$__rate_interval]))", "{{instance}} {{gpu}}")],
                    "none",
                    "Reported by the driver.",
                    width=12,
                ),
            ],
        ),
    ]


def build() -> str:
    """The dashboard's JSON, as committed."""
    board = dashboard.Dashboard("Appliance overview").uid(UID).tags(["appliance", "llm"]).timezone("browser").refresh("30s").time("now-1h", "now")
    board.description("Whether users are served within the SLO, why not, and what it would take.").tooltip(
        models.DashboardCursorSync.CROSSHAIR
    ).editable()
    _variables(board)
    _annotations(board)
    for title, panels in rows():
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    made = board.build()
    for index, panel in enumerate(made.panels or [], start=1):
        panel.id_val = index
    return JSONEncoder(sort_keys=True, indent=2).encode(made) + "\n"


def metric_names(expr: str) -> set[str]:
    """Families that `expr` reads: every appliance_... name, histogram suffixes taken off."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"(?<![\w:])appliance_[a-z0-9_]+", expr)}


def expressions(board: dict[str, Any]) -> list[str]:
    """Every query of a dashboard: of panels, variables and annotations."""
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    found += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return found + [annotation["expr"] for annotation in board["annotations"]["list"] if "expr" in annotation]


def main() -> int:
    """Write the file, or with --check say whether it is current."""
    text = build()
    if "--check" in sys.argv[1:]:
        return 0 if OUTPUT.is_file() and OUTPUT.read_text() == text else 1
    OUTPUT.write_text(text)
    print(f"{OUTPUT}: {len(json.loads(text)['panels'])} panels and rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
