"""Small charts as inline SVG. Colours are classes (`s0` to `s5`) that the page's style gives meaning to, so that they follow dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

WIDTH, HEIGHT = 720.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 8.0, 10.0, 24.0
_NUM_LABELS = 6
_TIME_STEPS = (60, 300, 600, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800, 1_209_600, 2_592_000, 7_776_000)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: a value a bucket, None where there is a gap."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Axis:
    """Time runs from `start_wall` in buckets of `width_seconds`."""

    start_wall: float
    width_seconds: float
    num_buckets: int

    @property
    def end_wall(self) -> float:
        """The end of the last bucket."""
        return self.start_wall + self.num_buckets * self.width_seconds

    def x(self, wall: float) -> float:
        """Where an instant lies."""
        return _LEFT + (wall - self.start_wall) / (self.end_wall - self.start_wall) * (WIDTH - _LEFT - _RIGHT)


def line_chart(
    title: str,
    axis: Axis,
    lines: Sequence[Line],
    *,
    unit: str,
    share: bool = False,
    limit: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over time with a legend; `limit` is a dashed line across, `marks` are instants with what happened then. "" without any value."""
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return ""
    top = 1.0 if share else nice_top(max([*values, *([limit] if limit is not None else [])]))
    parts = [_grid(axis, top, share)]
    parts += [_path(axis, line.values, top, index) for index, line in enumerate(lines)]
    if limit is not None:
        y = _y(limit, top)
        parts.append(f'<line class="limit" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for at, text in marks:
        x = axis.x(at)
        parts.append(f'<g class="mark"><title>{escape(text)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP:g}" y2="{HEIGHT - _BOTTOM:g}"/></g>')
    return _figure(title, unit, [line.name for line in lines], "".join(parts))


def bar_chart(
    title: str,
    axis: Axis,
    stacks: Sequence[Line],
    *,
    unit: str,
    share: bool = False,
    limit: float | None = None,
    stacked: bool = True,
) -> str:
    """Bars over time, stacked or side by side; each says its value when pointed at. "" without any value."""
    columns = [[line.values[i] for line in stacks] for i in range(axis.num_buckets)]
    heights = [sum(v or 0.0 for v in column) if stacked else max((v or 0.0 for v in column), default=0.0) for column in columns]
    if not any(value is not None for column in columns for value in column) or (not share and max(heights) <= 0):
        return ""
    top = 1.0 if share else nice_top(max(heights))
    slot = (WIDTH - _LEFT - _RIGHT) / axis.num_buckets
    parts = [_grid(axis, top, share)]
    for i, column in enumerate(columns):
        base, at = 0.0, axis.start_wall + i * axis.width_seconds
        for index, value in enumerate(column):
            if value is None or (value <= 0 and not share):
                continue
            width = slot * 0.8 / (1 if stacked else len(stacks))
            x = _LEFT + i * slot + slot * 0.1 + (0 if stacked else index * width)
            y, height = _y(base + value, top), max(value / top * (HEIGHT - _TOP - _BOTTOM), 0.0 if value else 1.0)  # a share of zero is seen as well
            label = f"{moment(at)}  {stacks[index].name}: {number(value, share)} {unit}".rstrip()
            parts.append(_rect(f"s{index}", x, y, max(0.5, width), height, label))
            base += value if stacked else 0.0
    if limit is not None:
        y = _y(limit, top)
        parts.append(f'<line class="limit" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return _figure(title, unit, [line.name for line in stacks], "".join(parts))


def waterfall(parts: Sequence[tuple[str, float]], longest: float) -> str:
    """One bar of what a request was doing, in proportion to `longest` seconds; class `w` and the index of the state in `parts`."""
    x, scale, shapes = 0.0, 100.0 / longest if longest > 0 else 0.0, []
    for index, (name, seconds) in enumerate(parts):
        if seconds > 0:
            width = seconds * scale
            shapes.append(_rect(f"w{index}", x, 0.0, width, 10.0, f"{name} {span(seconds)}"))
            x += width
    head = '<svg class="waterfall" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="latency ledger">'
    return f"{head}{''.join(shapes)}</svg>"


def nice_top(most: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is no less than `most`; 1 for zero."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= most * (1 - 1e-9))


def moment(wall: float, step: float = 60) -> str:
    """An instant in UTC; the day alone where labels are a day or more apart."""
    at = datetime.fromtimestamp(wall, UTC)
    return at.strftime("%d %b") if step >= 86_400 else at.strftime("%d %b %H:%M")


def number(value: float | None, share: bool = False) -> str:
    """Short, for people; a dash for what is not known."""
    if value is None:
        return "-"
    if share:
        return f"{100 * value:.1f} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g} {letter}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def span(seconds: float | None) -> str:
    """A duration in its own unit."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _rect(kind: str, x: float, y: float, width: float, height: float, label: str) -> str:
    shape = f'class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
    return f"<rect {shape}><title>{escape(label)}</title></rect>"


def _figure(title: str, unit: str, names: Sequence[str], body: str) -> str:
    keys = "".join(f'<span class="key s{index}">{escape(name)}</span>' for index, name in enumerate(names))
    measure = f'<span class="dim">, {escape(unit)}</span>' if unit else ""
    return (
        f'<figure><figcaption>{escape(title)}{measure} <span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )


def _grid(axis: Axis, top: float, share: bool) -> str:
    parts = []
    for tick in range(5):
        value = top * tick / 4
        y = _y(value, top)
        label = f"{100 * value:g} %" if share else number(value)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    seconds = axis.end_wall - axis.start_wall
    step = next((step for step in _TIME_STEPS if seconds / step <= _NUM_LABELS), _TIME_STEPS[-1])
    at = math.ceil(axis.start_wall / step) * step
    while at <= axis.end_wall:
        x = axis.x(at)
        if _LEFT + 20 <= x <= WIDTH - _RIGHT - 28:
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6:g}" text-anchor="middle">{moment(at, step)}</text>')
        at += step
    return "".join(parts)


def _path(axis: Axis, values: Sequence[float | None], top: float, index: int) -> str:
    """One line, broken where there is no value; a value between two gaps is a dot."""
    steps, pen, dots = [], False, []
    for i, value in enumerate(values):
        if value is None:
            pen = False
            continue
        x, y = axis.x(axis.start_wall + (i + 0.5) * axis.width_seconds), _y(value, top)
        steps.append(f"{'L' if pen else 'M'}{x:.1f} {y:.1f}")
        alone = (i == 0 or values[i - 1] is None) and (i + 1 == len(values) or values[i + 1] is None)
        if alone:
            dots.append(f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="1.5"/>')
        pen = True
    return f'<path class="line s{index}" d="{"".join(steps)}"/>{"".join(dots)}' if steps else ""


def _y(value: float, top: float) -> float:
    return HEIGHT - _BOTTOM - min(1.0, max(0.0, value / top)) * (HEIGHT - _TOP - _BOTTOM)
