"""The page as a person sees it, in a headless Chromium: it renders, streams, logs in, and fits a phone, in both themes, without one complaint."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from console_browser import Browser, Page
from console_server import REPLY, ConsoleServer, FakeEngine, console_server, work

from appliance.engine.wire import Heartbeat

# Contrast of an element's text on the nearest opaque ground behind it (WCAG 2).
CONTRAST = """(selector) => {
  const element = document.querySelector(selector);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  let ground = element;
  while (parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [a, b] = [parse(getComputedStyle(element).color), parse(getComputedStyle(ground).backgroundColor)].map(light).sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
# Where each bar of the open waterfall begins and ends, as shares of its lane.
BARS = """[...document.querySelectorAll(".details:not([hidden]) .lane")].map((lane) => {
  const [whole, bar] = [lane.getBoundingClientRect(), lane.firstChild.getBoundingClientRect()];
  return [(bar.left - whole.left) / whole.width, (bar.right - whole.left) / whole.width];
})"""
TOO_WIDE = """[...document.querySelectorAll("body *")]
  .filter((element) => element.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((element) => element.outerHTML.slice(0, 120))"""
MIDDLE = """(() => {
  const box = document.querySelector("#chart-tps .u-over").getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()"""
VIEWS = ("overview", "requests", "scaling", "chat")
CHARTS = ("tps", "prompt", "ttft", "tpot", "goodput", "requests", "queue", "age", "kv", "gpu", "memory", "power", "energy")
# The share of a chart's pixels that are not transparent, and how many colours it has: an empty grid has two or three.
DRAWN = """(id) => {
  const canvas = document.querySelector(`#chart-${id} canvas`);
  if (!canvas || !canvas.width) return null;
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const data = new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  const colours = new Set(data);
  return { filled: data.filter((pixel) => pixel !== 0).length / data.length, colours: colours.size };
}"""


async def _open(page: Page, url: str) -> None:
    await page.open(url)
    await page.until("document.documentElement.dataset.started === 'yes'")
    await page.until("document.getElementById('state').textContent === 'ready'")


async def _no_sideways_scroll(page: Page) -> None:
    assert await page.js("document.documentElement.scrollWidth <= window.innerWidth"), await page.js(TOO_WIDE)


async def _contrast(page: Page, selector: str) -> float:
    ratio: float = await page.js(f"({CONTRAST})({selector!r})")
    return ratio


async def test_every_chart_is_drawn_and_goes_on_live(server: ConsoleServer, browser: Browser) -> None:
    """Thirteen charts with history from SQL, a live point each second, values under the pointer; nothing comes from elsewhere, nothing complains."""
    page = await browser.page()
    await _open(page, server.url)
    for chart in CHARTS:
        await page.until(f"({DRAWN})('{chart}')?.colours > 3")
        drawn = await page.js(f"({DRAWN})('{chart}')")
        assert drawn["filled"] > 0.01, (chart, drawn)
    label = await page.js("document.querySelector('#chart-ttft .plot').getAttribute('aria-label')")
    assert "median" in label
    assert "the SLO is 0.5" in label
    before = await page.js("document.querySelector('#chart-queue .readout').textContent")
    work(server.recorder)
    await page.until(f"document.querySelector('#chart-queue .readout').textContent !== {before!r} || /running 96/.test({before!r})")
    tiles = await page.js("[...document.querySelectorAll('.tile')].map((tile) => tile.innerText.replaceAll('\\n', ' '))")
    assert len(tiles) == 8
    assert any("100\u00a0%" in tile for tile in tiles), tiles
    assert await page.js("[...document.querySelectorAll('.tile')].some((tile) => tile.dataset.mood === 'good')")
    assert "H100" in await page.js("document.getElementById('facts').innerText")
    await page.js("document.querySelector('#chart-tps .u-over').scrollIntoView({ block: 'center' })")
    box = await page.js(MIDDLE)
    await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    for chart in ("tps", "kv"):  # the pointer is over one chart, and all tell their values at that time
        await page.until(f"/\\d\\d:\\d\\d:\\d\\d: .*\\d/.test(document.querySelector('#chart-{chart} .readout').textContent)")
    assert all(url.startswith((server.url, "data:")) for url in page.requests), page.requests
    assert page.problems == []


async def test_another_range_reads_its_history(server: ConsoleServer, browser: Browser) -> None:
    """Choosing an hour by keyboard asks for it and shows more points."""
    page = await browser.page()
    await _open(page, server.url)
    await page.js("document.querySelector('#range input:checked').focus()")
    await page.press("ArrowRight", 39)
    await page.until("document.querySelector('#range input:checked').value === '3600'")
    await page.until("performance.getEntriesByType('resource').some((entry) => entry.name.includes('history?seconds=3600'))")
    assert any("seconds=3600" in url for url in page.requests)
    assert page.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_both_themes_are_readable(server: ConsoleServer, browser: Browser, scheme: str) -> None:
    """The system's theme is followed, the button overrides it and lasts; text reaches a contrast of 4.5 on every view."""
    page = await browser.page(scheme=scheme)
    await _open(page, server.url)
    ground = "getComputedStyle(document.body).backgroundColor"
    own, other = {"light": ("rgb(244, 246, 249)", "rgb(13, 18, 25)"), "dark": ("rgb(13, 18, 25)", "rgb(244, 246, 249)")}[scheme]
    assert await page.js(ground) == own
    for selector in ("h1", ".tile .muted", ".tile strong", "nav a[aria-current]", "#resolution", ".readout", "footer", "#state"):
        assert await _contrast(page, selector) >= 4.5, selector
    for _ in range(2 if scheme == "dark" else 1):  # as the system, dark, light
        await page.js("document.getElementById('theme').click()")
    assert await page.js(ground) == other
    for selector in ("h1", ".tile .muted", "nav a[aria-current]", ".readout"):
        assert await _contrast(page, selector) >= 4.5, selector
    await _open(page, server.url + "/?again")
    assert await page.js(ground) == other
    assert page.problems == []


async def test_a_phone_scrolls_down_only(server: ConsoleServer, browser: Browser) -> None:
    """At 360 pixels no view is wider than the screen, and what must be wide scrolls in a box of its own."""
    page = await browser.page(360, 740, mobile=True)
    await _open(page, server.url)
    for view in VIEWS:
        await page.js(f"location.hash = '#{view}'")
        await page.until(f"!document.getElementById('view-{view}').hidden")
        if view == "requests":
            await page.until("document.querySelectorAll('.ledger tbody button').length > 10")
            await page.js("document.querySelector('.ledger tbody button').click()")
        await _no_sideways_scroll(page)
    assert page.problems == []


async def test_the_ledger_opens_and_goes_on(server: ConsoleServer, browser: Browser) -> None:
    """By keyboard: a row opens into a waterfall whose bars follow each other and end at its wall time; older requests follow on demand."""
    page = await browser.page()
    await _open(page, server.url + "/#requests")
    await page.until("document.querySelectorAll('.ledger tbody button').length === 50")
    await page.js("document.querySelectorAll('.ledger tbody button')[1].focus()")
    await page.press("Enter", 13, "\r")
    await page.until("document.activeElement.getAttribute('aria-expanded') === 'true'")
    bars = await page.js(BARS)
    assert len(bars) >= 6
    for (_, end), (start, _) in pairwise(bars):
        assert start == pytest.approx(end, abs=0.02)
    assert bars[0][0] == pytest.approx(0.0, abs=0.01)
    assert bars[-1][1] == pytest.approx(1.0, abs=0.03)
    shown = await page.js("document.querySelector('.details:not([hidden])').innerText")
    assert "prefill" in shown
    assert "01900000-0000-7000-8000-000000000001" in shown
    await page.js("[...document.querySelectorAll('#requests button')].find((button) => button.textContent === 'Older').click()")
    await page.until("document.querySelectorAll('.ledger tbody button').length === 100")
    await page.js("document.getElementById('failed').click()")
    await page.until("document.querySelectorAll('.ledger tbody button').length === 10")
    assert page.problems == []


async def test_decisions_show_their_reasons_and_can_be_approved(server: ConsoleServer, browser: Browser) -> None:
    """The newest decision first, in words; the one that waits has a button, which posts the approval."""
    page = await browser.page()
    await _open(page, server.url + "/#scaling")
    await page.until("document.querySelectorAll('.decisions > li').length === 3")
    told = await page.js("document.querySelector('.decisions > li').innerText")
    assert "91 % of first tokens came within 0.5 s" in told
    assert "up to 2" in told
    assert "2 wanted, 1 there" in await page.js("document.getElementById('scaling-now').innerText")
    assert await page.js("document.querySelectorAll('.decisions button').length") == 1
    await page.js("document.querySelector('.decisions button').click()")
    await page.until("performance.getEntriesByType('resource').some((entry) => entry.name.endsWith('/approve'))")
    assert page.problems == []


async def test_the_chat_streams_and_leads_to_its_ledger(server: ConsoleServer, browser: Browser) -> None:
    """Enter sends; the answer grows token by token, then its times and a link follow; what was said before goes along with the next message."""
    server.engine.pace_seconds = 0.03
    page = await browser.page()
    await _open(page, server.url + "/#chat")
    await page.until("document.activeElement.id === 'chat-input'")
    await page.type("<b>capital</b> of France?")
    await page.press("Enter", 13, "\r")
    answer = "document.querySelector('.bubble.assistant .text')?.textContent"
    partial = await page.until(f"{answer} && {answer}.length < {len(REPLY)} && {answer}")
    assert REPLY.startswith(partial)
    await page.until(f"{answer} === {REPLY!r}")
    assert await page.js("document.querySelector('.bubble.user .text').textContent") == "<b>capital</b> of France?"
    note = "document.querySelector('.bubble.assistant .note').textContent"
    await page.until(f"/first token .* tokens\\/s .* tokens/.test({note})")
    link = await page.js("document.querySelector('.bubble.assistant a').hash")
    await page.type("And of Spain?")
    await page.press("Enter", 13, "\r")
    await page.until("document.querySelectorAll('.bubble.assistant').length === 2 && !document.getElementById('chat-send').disabled")
    assert len(server.records) == 2
    assert link == f"#requests/{server.records[0].id}"
    assert server.records[1].num_prompt_tokens > server.records[0].num_prompt_tokens + len(REPLY)
    assert page.problems == []


async def test_stopping_a_chat_ends_its_request(server: ConsoleServer, browser: Browser) -> None:
    """The stop button closes the stream: the server sees a client that left, and the box is ready for the next message."""
    server.engine.pace_seconds = 0.4
    page = await browser.page()
    await _open(page, server.url + "/#chat")
    await page.type("Tell me everything")
    await page.press("Enter", 13, "\r")
    await page.until("document.querySelector('.bubble.assistant .text')?.textContent.length > 0")
    await page.js("document.getElementById('chat-stop').click()")
    await page.until("document.querySelector('.bubble.assistant .note').textContent === 'stopped' && !document.getElementById('chat-send').disabled")
    while not server.records:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert server.records[0].status == 499
    assert page.problems == []


async def test_a_refused_chat_says_why(server: ConsoleServer, browser: Browser) -> None:
    """The server's own words appear under the message, and are announced."""
    server.engine.state = "starting"
    server.engine.ready = None
    page = await browser.page()
    await page.open(server.url + "/#chat")
    await page.until("document.documentElement.dataset.started === 'yes'")
    await page.type("hello")
    await page.press("Enter", 13, "\r")
    told = await page.until("document.querySelector('.bubble.assistant .note[role=alert]')?.textContent")
    assert "loading" in told or "starting" in told
    assert [problem for problem in page.problems if "503" not in problem] == []  # the browser logs the refusal itself


async def test_a_start_is_followed_to_its_end(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine loads the page shows phase and progress; the card goes once it serves."""
    engine = FakeEngine()
    engine.state, engine.ready = "starting", None
    engine.heartbeat = Heartbeat("load", 0.0, 900.0, 0.42, "model-00002")
    async with console_server(tmp_path, engine=engine) as server:
        monkeypatch.setattr(server.console._feed, "_period", 0.1)
        page = await browser.page()
        await page.open(server.url)
        await page.until("document.querySelector('#startup progress')?.value === 0.42")
        text = await page.js("document.getElementById('startup').innerText")
        assert "42\u00a0%" in text
        assert "model-00002" in text
        engine.heartbeat = Heartbeat("compile", 0.0, 900.0)
        await page.until("document.querySelector('#startup .here')?.innerText.startsWith('Compile')")
        engine.state = "ready"
        await page.until("document.getElementById('startup').hidden")
        engine.state = "failed"
        await page.until("document.getElementById('startup').innerText.includes('has failed')")
        allowed = [problem for problem in page.problems if "404" not in problem]  # without a store there is no history
        assert allowed == []


async def test_logging_in_and_out(locked_server: ConsoleServer, browser: Browser) -> None:
    """From the page to the login, past a wrong key, into a console that streams, and out again: the cookie is never seen by a script."""
    page = await browser.page()
    await page.open(locked_server.url)
    await page.until("location.pathname === '/console/login'")
    assert await page.js("document.activeElement.id") == "key"
    await page.type("sk-wrong")
    await page.press("Enter", 13, "\r")
    await page.until("document.querySelector('[role=alert]')?.textContent.includes('not known')")
    await page.js("document.getElementById('key').focus()")
    await page.type("sk-alice")
    await page.press("Enter", 13, "\r")
    await page.until("location.pathname === '/' && document.getElementById('state')?.textContent === 'ready'")
    await page.until(f"({DRAWN})('tps')?.colours > 3")
    assert await page.js("document.cookie") == ""
    assert await page.js("Object.values(localStorage).concat(Object.values(sessionStorage)).join().includes('sk-')") is False
    await page.js("location.hash = '#chat'")
    await page.until("document.activeElement.id === 'chat-input'")
    await page.type("hello")
    await page.press("Enter", 13, "\r")
    await page.until(f"document.querySelector('.bubble.assistant .text')?.textContent === {REPLY!r}")
    await page.js("document.querySelector('#logout button').click()")
    await page.until("location.pathname === '/console/login'")
    await page.open(locked_server.url + "/#chat")
    await page.until("location.pathname === '/console/login'")
    assert [problem for problem in page.problems if "401" not in problem] == []
    assert [record.key_id for record in locked_server.records] == ["alice"]


async def test_every_control_has_a_name_and_can_be_reached(server: ConsoleServer, browser: Browser) -> None:
    """Tab walks from the skip link through the navigation; no control on any view is nameless to a screen reader, no id is used twice."""
    page = await browser.page()
    await _open(page, server.url)
    await page.press("Tab", 9)
    assert await page.js("document.activeElement.className") == "skip"
    reached = []
    for _ in range(6):
        await page.press("Tab", 9)
        reached.append(await page.js("document.activeElement.textContent || document.activeElement.value"))
    assert reached[:4] == ["Overview", "Requests", "Scaling", "Chat"]
    for view in VIEWS:
        await page.js(f"location.hash = '#{view}'")
        await page.until(f"!document.getElementById('view-{view}').hidden")
        await asyncio.sleep(0.2)
        tree: list[dict[str, Any]] = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = {"button", "link", "textbox", "checkbox", "radio", "spinbutton", "image", "region", "navigation", "log", "table"}
        nameless = [node for node in tree if not node.get("ignored") and node["role"]["value"] in roles and not node.get("name", {}).get("value")]
        assert nameless == [], (view, nameless)
    ids = await page.js("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.problems == []
