"""A run's figures for people: a table (rich where it is installed, plain text elsewhere) and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from appliance.bench.records import BenchReport, Distribution, LevelReport


def print_report(report: BenchReport) -> None:
    """A table with a column for each level, then what a reader must know before quoting it."""
    title = f"{report.model} at {report.base_url}"
    head = ["", *(level.label for level in report.levels)]
    rows = list(zip(_NAMES, *(_figures(level) for level in report.levels), strict=True))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}\n{plain_table(head, rows)}")
    else:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(head):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=i in (_NUM_COUNTS - 1, len(rows) - 1))
        Console().print(table)
    for note in notes(report):
        print(note)


def notes(report: BenchReport) -> list[str]:
    """The ceiling, and every reason not to claim a figure."""
    lines = []
    if report.ceiling_events_per_second is not None:
        lines.append(f"Client's own ceiling against a null server: {report.ceiling_events_per_second:,.0f} events/s.")
    for level in report.levels:
        if level.claimable is False:
            lines.append(
                f"{level.label}: {level.events_per_second:,.0f} events/s is above half of that ceiling: NOT CLAIMABLE. Use more --processes."
            )
        if level.usage_missing:
            lines.append(f"{level.label}: the server sent no usage; chunks were counted for tokens.")
        if level.send_lag_p99_seconds is not None and level.send_lag_p99_seconds > 0.05:
            lines.append(
                f"{level.label}: requests were sent up to {level.send_lag_p99_seconds:.2f} s late (p99): raise --max-in-flight or --processes."
            )
        lines += [f"{level.label}: {count} x {error}" for error, count in level.errors.items()]
    return lines


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces."""
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))


def write_plot(report: BenchReport, path: Path) -> None:
    """Throughput and latencies over the levels, as PNG. Raises ImportError where matplotlib is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = [level.label for level in report.levels]
    positions = list(range(len(labels)))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    throughput = axes[0][0]
    bars = throughput.bar(positions, [level.output_tokens_per_second for level in report.levels], color="#3b6ea5")
    throughput.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    throughput.set_title("output tokens/s")
    for axis, title, scale, name in (
        (axes[0][1], "TTFT, ms", 1e3, "ttft"),
        (axes[1][0], "TPOT, ms", 1e3, "tpot"),
        (axes[1][1], "e2e, s", 1.0, "e2e"),
    ):
        for share, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            values = [getattr(d, share) * scale if (d := getattr(level, name)) else float("nan") for level in report.levels]
            axis.plot(positions, values, style, marker="o", markersize=3, label=share, color="#3b6ea5")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.set_xticks(positions, labels)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{report.model} at {report.base_url}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_LATENCIES = (("TTFT", "ttft", 1e3, "ms", 1), ("TPOT", "tpot", 1e3, "ms", 2), ("ITL", "itl", 1e3, "ms", 2), ("e2e", "e2e", 1.0, "s", 2))
_SHARES = ("p50", "p90", "p99")
_COUNTS = ("requests", "failed", "requests/s", "output tokens/s", "total tokens/s", "client CPU, cores")
_NUM_COUNTS = len(_COUNTS)
_NAMES = (*_COUNTS, *(f"{name} {share}, {unit}" for name, _, _, unit, _ in _LATENCIES for share in _SHARES))


def _figures(level: LevelReport) -> list[str]:
    """One level's column, in the order of `_NAMES`."""
    mark = "*" if level.claimable is False else ""
    cells = [str(level.num_requests), str(level.num_failed), f"{level.requests_per_second:,.2f}", f"{level.output_tokens_per_second:,.1f}{mark}"]
    cells += [f"{level.total_tokens_per_second:,.1f}{mark}", f"{level.client_cpu_share:.2f}"]
    for _, field, scale, _, digits in _LATENCIES:
        values: Distribution | None = getattr(level, field)
        cells += ["-" if values is None else f"{getattr(values, share) * scale:,.{digits}f}" for share in _SHARES]
    return cells
