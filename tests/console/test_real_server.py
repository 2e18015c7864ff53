"""The console of `appliance serve` itself, with the embedded model behind keys, in a headless Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from appliance_server import ApplianceServer, check_ledger
from console_browser import Browser
from server_fixtures import shared_state, state_folder

__all__ = ["shared_state", "state_folder"]
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]
KEY = "sk-console-0123456789"


@pytest.fixture
def starting_server(embedded_model: Path, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """A server that has only just begun to load its model."""
    state = state_folder()
    (state / "keys").write_text(f"alice:{KEY}\n")
    server = ApplianceServer(state, {"server.api_keys_file": state / "keys", "model.context_length": 1024, "metrics.sample_seconds": 2})
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0, "\n".join(server.output[-30:])
    assert not any("Traceback" in line for line in server.output), "\n".join(server.output)


async def test_from_the_start_to_a_chat_and_its_ledger(starting_server: ApplianceServer, browser: Browser) -> None:
    """Log in while the model loads, watch it become ready, ask it something, see the tokens in the charts, and find the request in SQL."""
    server = starting_server
    page = await browser.page(scheme="dark")
    await page.open(server.url)
    await page.until("location.pathname === '/console/login'")
    await page.type(KEY)
    await page.press("Enter", 13, "\r")
    await page.until("document.documentElement.dataset.started === 'yes'")
    await page.until("document.getElementById('state').textContent === 'ready'", seconds=120)
    assert await page.js("document.getElementById('startup').hidden")
    await page.js("location.hash = '#chat'")
    await page.until("document.activeElement.id === 'chat-input'")
    await page.js("document.getElementById('temperature').value = '0'")
    await page.type("What is the capital of France?")
    await page.press("Enter", 13, "\r")
    await page.until("document.querySelector('.bubble.assistant .note a') !== null", seconds=60)
    assert "Paris" in await page.js("document.querySelector('.bubble.assistant .text').textContent")
    (row,) = await asyncio.to_thread(server.wait_rows, "select * from requests")
    check_ledger(row)
    assert row["key_id"] == "alice"
    await page.js("document.querySelector('.bubble.assistant .note a').click()")
    await page.until("document.querySelectorAll('.details:not([hidden]) .lane').length >= 4")
    assert row["id"] in await page.js("document.querySelector('.details:not([hidden])').innerText")
    await page.js("location.hash = '#overview'")
    await page.until("/\\d/.test(document.querySelector('#chart-ttft .readout').textContent)")
    await page.until("document.getElementById('events').innerText.includes('ready')")
    assert server.wait_rows("select * from samples where num_generated_tokens > 0")
    assert page.problems == []
