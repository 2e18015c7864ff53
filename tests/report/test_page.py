"""The file itself: complete, small, self-contained, and deaf to what is in the database."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from appliance.cli import main
from appliance.report.charts import Axis, Line, bar_chart, line_chart, nice_top, number, span
from appliance.report.page import render

MIDNIGHT = 1_700_006_400.0
SECTIONS = [
    *("findings", "traffic", "service-level", "latency-and-queue", "capacity", "energy-and-hardware", "usage-and-cost-by-key"),
    *("slowest-requests", "scale-decisions", "engine-events"),
]


class Document(HTMLParser):
    """Elements in order, and whether each was closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def count(self, tag: str) -> int:
        """Elements of a kind."""
        return sum(name == tag for name, _ in self.elements)


async def test_the_page_is_whole_and_alone(collected: Any) -> None:
    """Every section is there; nothing is fetched from anywhere, there is no script, and the file is small."""
    text = render(await collected())
    document = Document(text)
    assert [attributes.get("id") for tag, attributes in document.elements if tag == "section"] == SECTIONS
    assert document.count("figure") >= 12
    assert document.count("script") == document.count("link") == document.count("img") == document.count("iframe") == 0
    addresses = [
        value for _, attributes in document.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href", "action")
    ]
    assert addresses == []
    assert "url(" not in text
    assert "@import" not in text
    assert len(text.encode()) < 1_000_000
    assert "default-src 'none'" in text


async def test_every_drawing_is_well_formed(collected: Any) -> None:
    """Each SVG is XML; no coordinate is NaN or infinite, and everything lies within the view."""
    text = render(await collected())
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)  # noqa: S314 - our own
        width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
        for shape in root.iter("rect"):
            x, y, w, h = (float(shape.attrib[name]) for name in ("x", "y", "width", "height"))
            assert -0.01 <= x <= x + w <= width + 0.5, shape.attrib
            assert -0.1 <= y <= y + h <= height + 0.1, shape.attrib
        for path in root.iter("path"):
            numbers = [float(part) for part in re.findall(r"-?[\d.]+", path.attrib["d"])]
            assert all(0 <= value <= max(width, height) for value in numbers)
    assert "nan" not in "".join(drawings).lower().replace("instance", "")
    assert ">inf" not in text


async def test_hostile_text_stays_text(collected: Any) -> None:
    """What a client put into a key's name, an error or a model, and what an engine said, is shown, never run."""
    text = render(await collected())
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5
    words = "".join(Document(text).text)
    assert "<script>alert('x')</script>" in words


async def test_numbers_are_those_of_the_database(collected: Any) -> None:
    """Requests, cost and the ledger of the slowest request."""
    words = " ".join(" ".join(Document(render(await collected())).text).split())
    assert "271 prompt tokens" in words
    assert "order-4711" in words
    assert "EUR" in words
    assert "1 min" in words or "60 s" in words
    for state in ("write blocked", "queued", "decode"):
        assert state in words
    assert re.search(r"up\s+1\s+→\s+2", words)


async def test_without_gpu_prices_or_data_nothing_is_made_up(database: Any) -> None:
    """An empty database gives a page without charts."""
    from appliance.report.collect import collect
    from appliance.settings import Settings

    data = await collect(database, since_wall=MIDNIGHT, until_wall=MIDNIGHT + 3600, made_wall=MIDNIGHT, settings=Settings())
    document = Document(render(data))
    assert document.count("svg") == 0
    words = " ".join(document.text)
    assert "No request was recorded." in words
    assert "kWh" not in words
    assert "USD" not in words


def test_lines_break_at_gaps() -> None:
    """No value is drawn where none was measured; one between two gaps is a dot."""
    axis = Axis(MIDNIGHT, 60.0, 6)
    drawing = line_chart("x", axis, [Line("a", (1.0, 2.0, None, 3.0, None, 4.0))], unit="s")
    (path,) = re.findall(r'd="([^"]+)"', drawing)
    assert path.count("M") == 3
    assert path.count("L") == 1
    assert drawing.count("<circle") == 2
    assert line_chart("x", axis, [Line("a", (None,) * 6)], unit="s") == ""
    assert bar_chart("x", axis, [Line("a", (0.0,) * 6)], unit="s") == ""


def test_bars_stack_to_their_sum() -> None:
    """The heights of a column's parts add up, the tallest column reaching the top of a round axis."""
    axis = Axis(MIDNIGHT, 3600.0, 2)
    drawing = bar_chart("x", axis, [Line("a", (30.0, 10.0)), Line("b", (70.0, None))], unit="requests")
    heights = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', drawing)]
    assert sum(heights[:2]) == pytest.approx(166.0, abs=0.2)
    assert heights[2] == pytest.approx(16.6, abs=0.1)
    assert "15 Nov 01:00  a: 10 requests" in drawing


@pytest.mark.parametrize(("most", "top"), [(0, 1), (0.7, 1), (1, 1), (1.01, 2), (2.2, 2.5), (37, 50), (5100, 10_000), (1e-4, 1e-4)])
def test_axes_end_at_round_numbers(most: float, top: float) -> None:
    """The next of 1, 2, 2.5 and 5."""
    assert nice_top(most) == pytest.approx(top)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (0.123456, "0.123"), (12, "12"), (12345, "12.35 k"), (2.5e6, "2.5 M"), (3e9, "3 G")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    """For people."""
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (300, "5 min"), (7200, "2 h")])
def test_spans_have_their_unit(seconds: float | None, text: str) -> None:
    """From milliseconds to hours."""
    assert span(seconds) == text


async def test_the_command_writes_the_file(day: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the database alone; it prints where the file is, or the file itself."""
    import asyncio

    monkeypatch.chdir(tmp_path)
    url = f"sqlite+aiosqlite:///{day.url.database}"
    monkeypatch.setenv("APPLIANCE_STORE__URL", url)
    monkeypatch.setenv("APPLIANCE_STATE_DIR", str(tmp_path))
    when = ["--since", "2023-11-15T00:00", "--until", "2023-11-15T06:00"]
    assert await asyncio.to_thread(main, ["report", *when, "--output", "report.html"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert "order-4711" in (tmp_path / "report.html").read_text()
    assert await asyncio.to_thread(main, ["report", *when, "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    assert await asyncio.to_thread(main, ["report", *when]) == 0
    name = capsys.readouterr().out.strip()
    assert re.fullmatch(r"appliance-report-\d{8}-\d{6}\.html", name)
    assert await asyncio.to_thread(main, ["report", "--since", "soon"]) == 2
    assert await asyncio.to_thread(main, ["report", *when, "-o", "/nonexistent/x.html"]) == 1
    assert "/nonexistent/x.html" in capsys.readouterr().err


async def test_no_database_is_made_by_looking(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is not there, or not migrated, is said to be so with exit status 1."""
    import asyncio
    import sqlite3

    monkeypatch.setenv("APPLIANCE_STATE_DIR", str(tmp_path))
    assert await asyncio.to_thread(main, ["report"]) == 1
    assert "there is no database yet" in capsys.readouterr().err
    assert list(tmp_path.glob("*.db*")) == []
    sqlite3.connect(tmp_path / "appliance.db").execute("create table x (y)").connection.close()
    assert await asyncio.to_thread(main, ["report"]) == 1
    assert "appliance db check" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
async def test_it_is_readable_in_a_browser(collected: Any, browser: Any, tmp_path: Any, scheme: str, width: int) -> None:
    """Chromium, dark and light, on a desk and on a phone: no complaint, no request, no sideways scrolling, text that stands out."""
    file = tmp_path / "report.html"
    file.write_text(render(await collected()))
    page = await browser.page(width, 900, scheme=scheme, mobile=width < 600)
    await page.open(f"file://{file}")
    assert page.problems == []
    assert page.requests == [f"file://{file}"]
    assert await page.js("document.documentElement.scrollWidth <= window.innerWidth")
    shown = await page.js("[...document.querySelectorAll('figure svg')].every(svg => svg.getBoundingClientRect().height > 50)")
    assert shown
    background, text = await page.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark, bright = sorted(_brightness(colour) for colour in (background, text))
    assert bright - dark > 150
    assert (_brightness(background) < 100) == (scheme == "dark")
    strokes = await page.js("[...new Set([...document.querySelectorAll('.line')].map(line => getComputedStyle(line).stroke))]")
    assert len(strokes) >= 3
    assert "none" not in strokes
    (tmp_path / "report.png").write_bytes(await page.screenshot())


def _brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue
