"""The report as one HTML file that needs nothing else: no network, no script. All text from SQL is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from appliance import __version__
from appliance.report.charts import Axis, Line, bar_chart, line_chart, number, span, waterfall
from appliance.report.collect import ReportData
from appliance.report.findings import FAULTS, capacity, findings
from appliance.report.style import stylesheet
from appliance.store.results import StoredRequest, Usage

_HOUR = 3600.0
_MAX_KEYS = 30
_MAX_BARS = 400  # then bars are of days
# No script, no request: what is in the database cannot make the reader's browser do anything, even if an escape were forgotten.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(data: ReportData) -> str:
    """The whole file."""
    sections = (
        ("Findings", _findings(data)),
        ("Traffic", _traffic(data)),
        ("Service level", _slo(data)),
        ("Latency and queue", _latency(data)),
        ("Capacity", _capacity(data)),
        ("Energy and hardware", _energy(data)),
        ("Usage and cost by key", _keys(data)),
        ("Slowest requests", _slowest(data)),
        ("Scale decisions", _decisions(data)),
        ("Engine events", _events(data)),
    )
    body = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>' for title, content in sections if content)
    start, end = _iso(data.since_wall), _iso(data.until_wall)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>Appliance report, {start} to {end}</title>'
        f"<style>{stylesheet()}</style></head><body><header><h1>Inference appliance: {start} to {end} UTC</h1>"
        f'<p class="dim">{escape(_subject(data))} Made {_iso(data.made_wall)} UTC by version {escape(__version__)}. Times are UTC, totals of '
        f"whole hours.</p>{_tiles(data)}</header>{body}</body></html>\n"
    )


def _subject(data: ReportData) -> str:
    named = [("Model", data.known.models), ("instance", data.known.instances), ("fleet", (data.fleet,) if data.fleet else data.known.fleets)]
    words = [f"{name}{'s' if len(values) > 1 else ''} {', '.join(values[:6])}{' ...' if len(values) > 6 else ''}" for name, values in named if values]
    return "; ".join(words) + "." if words else "No request was recorded."


def _tiles(data: ReportData) -> str:
    total = data.total
    costs = [key.cost for key in data.keys if key.cost is not None]
    tiles = [
        ("requests", number(total.num_requests), ""),
        ("prompt tokens", number(total.num_prompt_tokens), ""),
        ("output tokens", number(total.num_generated_tokens), ""),
        ("goodput", number(total.goodput, share=True), "bad" if total.goodput is not None and total.goodput < data.slo.target else ""),
        ("5xx", number(total.num_errors), "bad" if total.num_errors else ""),
        ("refused", number(total.num_rejected), ""),
        ("clients that left", number(total.num_aborted), ""),
        ("mean TTFT", span(total.mean_ttft_seconds), ""),
        ("longest request", span(total.max_duration_seconds), ""),
        *([("cost", f"{number(sum(costs))} {data.currency}", "")] if costs else []),
        *([("energy", f"{number(data.timeline.joules / 3.6e6)} kWh", "")] if data.timeline.joules is not None else []),
    ]
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(name: str, value: str, kind: str) -> str:
    return f'<div class="tile"><span class="dim">{name}</span><b class="{kind}">{escape(value)}</b></div>'


def _findings(data: ReportData) -> str:
    items = "".join(f"<li{' class=bad' if finding.bad else ''}>{escape(finding.text)}</li>" for finding in findings(data))
    return f"<ul>{items}</ul>"


def _traffic(data: ReportData) -> str:
    t, axis = data.timeline, _axis(data)
    by, bars = _bars(data)
    ends = [
        Line("answered", _sums(data, bars, lambda usage: usage.num_requests - usage.num_errors - usage.num_aborted)),
        Line("5xx", _sums(data, bars, lambda usage: usage.num_errors)),
        Line("client left", _sums(data, bars, lambda usage: usage.num_aborted)),
    ]
    rates = [Line("finished", t.requests_per_second), Line("5xx", t.errors_per_second), Line("refused", t.rejections_per_second)]
    return _charts(
        line_chart("Tokens", axis, [Line("output", t.output_tokens_per_second), Line("prompt", t.prompt_tokens_per_second)], unit="tokens/s"),
        bar_chart(f"Requests by {by}", bars, ends, unit="requests"),
        line_chart("Requests, errors and refusals", axis, rates, unit="a second"),
    )


def _slo(data: ReportData) -> str:
    by, bars = _bars(data)
    good, judged = _sums(data, bars, lambda usage: usage.num_good), _sums(data, bars, lambda usage: usage.num_judged)
    ttft_good, ttft_judged = _sums(data, bars, lambda usage: usage.num_ttft_good), _sums(data, bars, lambda usage: usage.num_ttft_judged)
    tpot_good, tpot_judged = _sums(data, bars, lambda usage: usage.num_tpot_good), _sums(data, bars, lambda usage: usage.num_tpot_judged)
    attainment = [Line("TTFT", _shares(ttft_good, ttft_judged)), Line("TPOT", _shares(tpot_good, tpot_judged))]
    return _charts(
        bar_chart(f"Requests within the SLO, by {by}", bars, [Line("goodput", _shares(good, judged))], unit="", share=True, limit=data.slo.target),
        bar_chart(f"By objective and {by}", bars, attainment, unit="", share=True, limit=data.slo.target, stacked=False),
    )


def _latency(data: ReportData) -> str:
    t, axis = data.timeline, _axis(data)
    tpot = [Line("median", _milli(t.tpot_p50_seconds)), Line("worst p95", _milli(t.tpot_p95_seconds))]
    return _charts(
        line_chart("Time to first token", axis, [Line("median", t.ttft_p50_seconds), Line("worst p95", t.ttft_p95_seconds)], unit="s"),
        line_chart("Time per output token", axis, tpot, unit="ms"),
        line_chart("Sequences", axis, [Line("running", t.num_running), Line("waiting", t.num_waiting)], unit=""),
        line_chart("Oldest waiting sequence", axis, [Line("age", t.waiting_age_seconds)], unit="s"),
    )


def _capacity(data: ReportData) -> str:
    axis, found = _axis(data), capacity(data)
    lines = [Line(limit.name, limit.used) for limit in found.limits]
    total = _added(data.timeline.output_tokens_per_second, data.timeline.prompt_tokens_per_second)
    served = [Line("prompt and output", total)]
    note = (
        f'<p class="dim">Limits: {span(data.slo.ttft_seconds)} to the first token, {span(data.slo.tpot_seconds)} a token '
        f"({escape(data.slo.reason)}), {number(data.kv_limit, share=True)} of the KV cache. Above 1 a limit was passed.</p>"
    )
    charts = _charts(
        line_chart("How near each limit was", axis, lines, unit="share of the limit", limit=1.0),
        line_chart("Load, and the most served within the SLO", axis, served, unit="tokens/s", limit=found.tokens_per_second),
    )
    return note + charts if charts else ""


def _added(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None else a + (b or 0.0) for a, b in zip(first, second, strict=True)]


def _energy(data: ReportData) -> str:
    t, axis = data.timeline, _axis(data)
    busy = [Line("CPU", t.cpu_utilisation), *([Line("GPU", t.gpu_utilisation)] if any(v is not None for v in t.gpu_utilisation) else [])]
    return _charts(
        line_chart("Power of the GPUs", axis, [Line("power", t.gpu_power_watts)], unit="W"),
        line_chart("Energy per output token", axis, [Line("energy", t.joules_per_token)], unit="J"),
        line_chart("Busy share", axis, busy, unit="", share=True),
    )


def _keys(data: ReportData) -> str:
    if not data.keys:
        return ""
    priced = any(key.cost is not None for key in data.keys)
    measured = any(key.usage.joules is not None for key in data.keys)
    heads = ["key", "model", "#requests", "#5xx", "#prompt tokens", "#cached", "#output tokens", "#goodput"]
    heads += (["#kJ"] if measured else []) + ([f"#cost, {data.currency}"] if priced else [])
    rows = []
    for key in data.keys[:_MAX_KEYS]:
        usage = key.usage
        cells = [escape(key.key_id) or "-", escape(key.model)]
        cells += [f"{count:,}" for count in (usage.num_requests, usage.num_errors, usage.num_prompt_tokens, usage.num_cached_tokens)]
        cells += [f"{usage.num_generated_tokens:,}", number(usage.goodput, share=True)]
        cells += [number(None if usage.joules is None else usage.joules / 1e3)] if measured else []
        cells += [number(key.cost)] if priced else []
        rows.append(cells)
    more = f'<p class="dim">{len(data.keys) - _MAX_KEYS} more keys are left out.</p>' if len(data.keys) > _MAX_KEYS else ""
    hint = "" if priced else '<p class="dim">No cost: cost.prompt_per_million and cost.output_per_million are not set.</p>'
    return _table(heads, rows) + more + hint


def _slowest(data: ReportData) -> str:
    if not data.slowest:
        return ""
    longest = data.slowest[0].record.duration_seconds
    states = list(data.slowest[0].record.states)
    legend = "".join(f'<span class="key w{index}">{escape(state.replace("_", " "))}</span>' for index, state in enumerate(states))
    heads = ["received", "request", "key", "#status", "#tokens", "#TTFT", "#took", "where the time went"]
    rows = [_slow_row(stored, states, longest) for stored in data.slowest]
    return f'<p class="keys">{legend}</p>{_table(heads, rows)}'


def _slow_row(stored: StoredRequest, states: Sequence[str], longest: float) -> list[str]:
    record = stored.record
    names = f"<code>{escape(record.id)}</code>"
    if record.client_request_id:
        names += f'<br><code class="dim">{escape(record.client_request_id)}</code>'
    status = f"{record.status}{' ' + escape(record.error_code) if record.error_code else ''}"
    return [
        _iso(record.received_wall),
        names,
        escape(record.key_id) or "-",
        status,
        f"{record.num_prompt_tokens:,} + {record.num_generated_tokens:,}",
        span(record.ttft_seconds),
        span(record.duration_seconds),
        waterfall([(state, record.states.get(state, 0.0)) for state in states], longest),
    ]


def _decisions(data: ReportData) -> str:
    heads = ["at", "direction", "#replicas", "reason", "mode", "what came of it"]
    rows = []
    for stored in data.decisions:
        decision = stored.decision
        approval = f"approved by {stored.approved_by or 'somebody'}" if stored.approved_wall is not None else ""
        signals = ", ".join(f"{count} {state}" for state, count in sorted(stored.signals.items()))
        after = "; ".join(part for part in (approval, signals, stored.outcome or "") if part)
        change = f"{decision.current_replicas} &rarr; {decision.desired_replicas}"
        rows.append([_iso(decision.at_wall), escape(decision.direction), change, escape(decision.reason), escape(decision.mode), escape(after)])
    return _table(heads, rows) if rows else ""


def _events(data: ReportData) -> str:
    marks = [(stored.event.at_wall, f"{stored.event.kind}: {stored.event.detail}") for stored in data.events if stored.event.kind in FAULTS]
    ready = line_chart("Engine ready", _axis(data), [Line("ready", data.timeline.ready_share)], unit="", share=True, marks=marks)
    heads = ["at", "instance", "event", "detail", "#in flight"]
    rows = []
    for stored in data.events:
        event = stored.event
        kind = f'<span class="bad">{escape(event.kind)}</span>' if event.kind in FAULTS else escape(event.kind)
        rows.append([_iso(event.at_wall), escape(stored.instance_id), kind, escape(event.detail), str(event.num_in_flight)])
    return _charts(ready) + (_table(heads, rows) if rows else "")


def _charts(*charts: str) -> str:
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`heads` that begin with # are of numbers; cells are HTML."""
    numeric = [head.startswith("#") for head in heads]
    top = "".join(
        f"<th{' class=n' if is_number else ''}>{escape(head.removeprefix('#'))}</th>" for head, is_number in zip(heads, numeric, strict=True)
    )
    lines = []
    for row in rows:
        cells = zip(row, numeric, strict=True)
        lines.append("<tr>" + "".join(f"<td{_class(cell, is_number)}>{cell}</td>" for cell, is_number in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _class(cell: str, is_number: bool) -> str:
    return " class=n" if is_number else " class=bar" if cell.startswith("<svg") else ""


def _axis(data: ReportData) -> Axis:
    return Axis(data.timeline.start_wall, data.timeline.width_seconds, data.timeline.num_buckets)


def _bars(data: ReportData) -> tuple[str, Axis]:
    """Bars of hours, or of days where hours would be too many."""
    seconds = data.until_wall - data.since_wall
    width = _HOUR if seconds / _HOUR <= _MAX_BARS else 24 * _HOUR
    return ("hour" if width == _HOUR else "day"), Axis(data.since_wall, width, max(1, math.ceil(seconds / width)))


def _sums(data: ReportData, axis: Axis, of: Callable[[Usage], int]) -> list[float | None]:
    """Sums by bar; None where no request was."""
    sums: list[float | None] = [None] * axis.num_buckets
    for hour in data.hours:
        index = int((hour.start_wall - axis.start_wall) // axis.width_seconds)
        if 0 <= index < axis.num_buckets:
            sums[index] = (sums[index] or 0.0) + of(hour.usage)
    return sums


def _shares(parts: Sequence[float | None], wholes: Sequence[float | None]) -> list[float | None]:
    return [part / whole if part is not None and whole else None for part, whole in zip(parts, wholes, strict=True)]


def _milli(seconds: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 1e3 * value for value in seconds]


def _iso(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%d %H:%M")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
