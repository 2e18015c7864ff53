"""Figures as a screen of any size: cards side by side where there is room, fewer cards where there is none, never a broken line."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from appliance.top.figures import Figures

_CARD_WIDTH = 36
_GAP = 2
_NONE = "-"
_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"
_GOOD, _BAD, _DIM = "green", "bold red", "dim"
Line = tuple[str, str, str]  # label, value, style
Card = tuple[str, list[Line]]


def screen(
    figures: Figures | None,
    *,
    width: int,
    height: int,
    url: str,
    away: str | None = None,
    rates: Sequence[float] = (),
    requests: Sequence[dict[str, Any]] | None = None,
    decisions: Sequence[dict[str, Any]] | None = None,
    unicode: bool = True,
) -> RenderableType:
    """At most `height` lines of at most `width` columns. `away` says why the newest look failed; figures are then those of the last that did not."""
    lines = _head(figures, url, away, width)[:height]
    if figures is None:
        return Group(*lines)
    columns = max(1, (width + _GAP) // (_CARD_WIDTH + _GAP))
    cards = _cards(figures, rates, unicode)
    room = height - len(lines)
    block = _side_by_side(cards, columns, room, stale=away is not None)
    room -= sum(rows for _, rows in block)
    tails = _requests(requests, width, room) if requests else []
    room -= len(tails)
    tails += _decisions(decisions, width, room) if decisions else []
    return Group(*lines, *(table for table, _ in block), *tails)


def _head(figures: Figures | None, url: str, away: str | None, width: int) -> list[Text]:
    """One line of what this is, one more where it does not answer."""
    title = Text(no_wrap=True, overflow="ellipsis")
    if figures is None:
        title.append(url, "bold")
    else:
        title.append(figures.model or "?", "bold")
        state = figures.engine_state
        title.append(f"  {state}", _GOOD if state == "ready" else _BAD)
        facts = [
            figures.instance_id,
            figures.device,
            f"up {_span(figures.uptime_seconds)}",
            url,
            time.strftime("%H:%M:%S", time.localtime(figures.at_wall)),
        ]
        title.append("".join(f"  {fact}" for fact in facts if fact), _DIM)
    lines = [title]
    if away is not None:
        lines.append(Text(f"no answer: {away} (trying again)", _BAD, no_wrap=True, overflow="ellipsis"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _cards(figures: Figures, rates: Sequence[float], unicode: bool) -> list[Card]:
    """In order of importance: the last ones go first where the screen is small."""
    f = figures
    traffic: list[Line] = [
        ("output", _rate(f.output_tokens_per_second, "tok/s"), "bold"),
        ("prompt", _rate(f.prompt_tokens_per_second, "tok/s"), ""),
        ("requests", _rate(f.requests_per_second, "/s"), ""),
        ("errors, refused", f"{_number(f.errors_per_second)}, {_number(f.rejections_per_second)} /s", _alarm((f.errors_per_second or 0) > 0)),
        ("", spark(rates, _CARD_WIDTH - 1, unicode), "cyan"),
    ]
    latency: list[Line] = [
        ("TTFT p50, p95", _pair(f.ttft_p50_seconds, f.ttft_p95_seconds), _over(f.ttft_p95_seconds, f.ttft_slo_seconds)),
        ("TPOT p50, p95", _pair(f.tpot_p50_seconds, f.tpot_p95_seconds), _over(f.tpot_p95_seconds, f.tpot_slo_seconds)),
        ("ITL p95", _seconds(f.itl_p95_seconds), ""),
        ("request p95", _seconds(f.duration_p95_seconds), ""),
    ]
    queue: list[Line] = [
        ("running, waiting", f"{_number(f.num_running)}, {_number(f.num_waiting)}", ""),
        ("oldest waits", _seconds(f.oldest_waiting_age_seconds), _over(f.oldest_waiting_age_seconds, f.ttft_slo_seconds)),
        ("predicted TTFT", _seconds(f.predicted_ttft_seconds), _over(f.predicted_ttft_seconds, f.ttft_slo_seconds)),
        ("preemptions", _rate(f.preemptions_per_second, "/s"), _alarm((f.preemptions_per_second or 0) > 0)),
    ]
    goodput: list[Line] = [
        ("goodput", _percent(f.goodput), _under(f.goodput, f.slo_target)),
        ("TTFT", f"{_percent(f.ttft_attainment)} in {_seconds(f.ttft_slo_seconds)}", _under(f.ttft_attainment, f.slo_target)),
        ("TPOT", f"{_percent(f.tpot_attainment)} in {_seconds(f.tpot_slo_seconds)}", _under(f.tpot_attainment, f.slo_target)),
        ("target", _percent(f.slo_target), _DIM),
    ]
    kv: list[Line] = [
        ("in use", _bar(f.kv_utilisation, unicode), _over(f.kv_utilisation, 0.9)),
        ("cached", _percent(f.kv_cached_share), ""),
        ("prefix hits", _percent(f.prefix_hit_share), ""),
        ("waste", _percent(f.kv_waste), ""),
    ]
    engine: list[Line] = [
        ("steps", _rate(f.steps_per_second, "/s"), ""),
        ("step, batch", f"{_seconds(f.mean_step_seconds)}, {_number(f.mean_batch_sequences)} seqs", ""),
        ("busy", _percent(f.engine_busy_share), ""),
        ("FLOPs, bandwidth", f"{_percent(f.flops_utilisation)}, {_percent(f.bandwidth_utilisation)}", ""),
    ]
    return [
        ("Traffic", traffic),
        ("Latency", latency),
        ("Queue", queue),
        ("Goodput", goodput),
        ("KV cache", kv),
        *_hardware(f, unicode),
        ("Engine", engine),
        ("Scale and store", _scale_and_store(f)),
    ]


def _hardware(f: Figures, unicode: bool) -> list[Card]:
    """A card a GPU; the host's where there is none."""
    cards: list[Card] = []
    for gpu in f.gpus[:8]:
        temperature = _NONE if gpu.temperature_celsius is None else f"{gpu.temperature_celsius:.0f} °C"
        state = "throttled: " + ", ".join(gpu.throttled) if gpu.throttled else "not throttled"
        lines: list[Line] = [
            ("busy", _bar(gpu.utilisation, unicode), ""),
            ("memory", f"{_bytes(gpu.memory_used_bytes)} of {_bytes(gpu.memory_bytes)}", ""),
            ("power", f"{_number(gpu.power_watts)} W, {temperature}", ""),
            (state, "", _alarm(bool(gpu.throttled)) or _DIM),
        ]
        cards.append((f"GPU {gpu.index} {gpu.name.removeprefix('NVIDIA ')}", lines))
    if f.gpus:
        cards[0][1][3:3] = [("energy", f"{_number(f.joules_per_token)} J a token", "")]
        return cards
    cpu: list[Line] = [
        ("busy", _bar(f.cpu_utilisation, unicode), ""),
        ("cores", _number(f.num_cpus), ""),
        ("memory", f"{_bytes(f.memory_used_bytes)} of {_bytes(f.memory_bytes)}", ""),
        ("engine", _bytes(f.engine_resident_bytes), ""),
    ]
    return [("CPU", cpu)]


def _scale_and_store(f: Figures) -> list[Line]:
    pinned = " (pinned)" if f.scaling_pinned else ""
    store = {None: "off", True: "available", False: "away"}[f.store_available]
    dropped = f.num_dropped_rows or 0.0
    return [
        ("replicas wanted", f"{_number(f.desired_replicas)}{pinned}", _alarm(f.scaling_pinned)),
        ("database", store, _alarm(f.store_available is False)),
        ("rows queued", _number(f.num_queued_rows), ""),
        ("spooled, dropped", f"{_number(f.num_spooled_rows)}, {_number(f.num_dropped_rows)}", _alarm(dropped > 0)),
    ]


def _side_by_side(cards: Sequence[Card], columns: int, room: int, *, stale: bool) -> list[tuple[Table, int]]:
    """Rows of cards, each with the number of its lines, as many as there is room for; of the first row that does not fit, its first lines."""
    block: list[tuple[Table, int]] = []
    for start in range(0, len(cards), columns):
        row = cards[start : start + columns]
        rows = min(room, 1 + max(len(lines) for _, lines in row))
        if rows < 2:
            break
        room -= rows
        table = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in range(columns):
            table.add_column(width=_CARD_WIDTH if columns > 1 else None, no_wrap=True, overflow="ellipsis")
        table.add_row(*(_card(title, lines, rows, stale) for title, lines in row))
        block.append((table, rows))
    return block


def _card(title: str, lines: Sequence[Line], rows: int, stale: bool) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(title[: _CARD_WIDTH - 1], "bold underline")
    for index in range(rows - 1):
        text.append("\n")
        if index < len(lines):
            label, value, style = lines[index]
            gap = " " * max(1, _CARD_WIDTH - 1 - len(label) - len(value)) if label and value else ""
            text.append(label, _DIM if value else style)
            text.append(gap + value, _DIM if stale else style)
    return text


def _requests(requests: Sequence[dict[str, Any]], width: int, room: int) -> list[RenderableType]:
    """The newest requests, one a line, under a heading; nothing where two lines do not fit."""
    if room < 2:
        return []
    lines: list[RenderableType] = [_heading("Last requests", width)]
    for row in requests[: min(room - 1, 8)]:
        record = row.get("record", row)
        wall = time.strftime("%H:%M:%S", time.localtime(_float(record.get("received_wall")) or 0.0))
        status = str(record.get("status", _NONE))
        tokens = f"{record.get('num_prompt_tokens', _NONE)}+{record.get('num_generated_tokens', _NONE)}"
        ttft, duration = _seconds(_float(record.get("ttft_seconds"))), _seconds(_float(record.get("duration_seconds")))
        end = record.get("error_code") or record.get("finish_reason") or ""
        text = f"{wall}  {status}  {tokens:>11} tok  TTFT {ttft:>7}  {duration:>8}  {end}  {record.get('key_id') or ''}  {record.get('id', '')}"
        lines.append(_cut(text, width, _BAD if status.startswith("5") or row.get("good") is False else ""))
    return lines


def _decisions(decisions: Sequence[dict[str, Any]], width: int, room: int) -> list[RenderableType]:
    """The newest scale decisions, likewise."""
    if room < 2:
        return []
    lines: list[RenderableType] = [_heading("Last scale decisions", width)]
    for row in decisions[: min(room - 1, 3)]:
        decision = row.get("decision", row)
        wall = time.strftime("%H:%M:%S", time.localtime(_float(decision.get("at_wall")) or 0.0))
        change = f"{decision.get('current_replicas', '?')} -> {decision.get('desired_replicas', '?')}"
        lines.append(_cut(f"{wall}  {decision.get('direction', '')}  {change}  {decision.get('reason', '')}", width, ""))
    return lines


def _heading(text: str, width: int) -> Text:
    return Text(text[:width], "bold underline", no_wrap=True)


def _cut(text: str, width: int, style: str) -> Text:
    line = Text(" ".join(text.splitlines()), style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line


def spark(values: Sequence[float], width: int, unicode: bool = True) -> str:
    """The newest values as bars of eight heights, the highest among them being full."""
    shown = list(values)[-width:]
    most = max(shown, default=0.0)
    bars = _BARS if unicode else _ASCII_BARS
    return "".join(bars[math.ceil(value / most * 8) if most > 0 else 0] for value in shown)


def _bar(share: float | None, unicode: bool, width: int = 12) -> str:
    if share is None:
        return _NONE
    full = round(min(1.0, max(0.0, share)) * width)
    return f"{('█' if unicode else '#') * full}{('░' if unicode else '.') * (width - full)} {_percent(share):>5}"


def _alarm(bad: bool) -> str:
    return _BAD if bad else ""


def _over(value: float | None, limit: float | None) -> str:
    return "" if value is None or limit is None else (_BAD if value > limit else _GOOD)


def _under(value: float | None, limit: float | None) -> str:
    return "" if value is None or limit is None else (_BAD if value < limit else _GOOD)


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _number(value: float | None) -> str:
    if value is None:
        return _NONE
    if abs(value) >= 10_000:
        return f"{value / 1e3:.1f}k" if abs(value) < 1e6 else f"{value / 1e6:.1f}M"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _rate(value: float | None, unit: str) -> str:
    return _NONE if value is None else f"{_number(value)} {unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else _span(value)


def _pair(first: float | None, second: float | None) -> str:
    return f"{_seconds(first)}, {_seconds(second)}"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share * 100:.0f}%" if share in (0, 1) else f"{share * 100:.1f}%"


def _bytes(value: float | None) -> str:
    return _NONE if value is None else f"{value / 2**30:.1f} GiB"


def _span(seconds: float | None) -> str:
    """Two units of days, hours, minutes and seconds."""
    if seconds is None:
        return _NONE
    whole = int(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
