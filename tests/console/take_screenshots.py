"""Takes the pictures of docs/console.md: `python tests/console/take_screenshots.py`. The numbers in them are the tests' made-up traffic."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from console_browser import Browser, connected, find_chromium, running_chromium
from console_server import ConsoleServer, console_server, keep_busy, seed

from appliance.store.database import Database

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
MAX_BYTES = 250_000
_LIVE_SECONDS = 25.0  # so that the right end of the charts is the live stream's


async def take(browser: Browser, server: ConsoleServer) -> dict[str, bytes]:
    """Every picture by its file's name."""
    pages = {}
    for name, (width, height, scheme, view) in {
        "console-dark.png": (1360, 1060, "dark", ""),
        "console-light.png": (1360, 1000, "light", "#requests"),
        "console-phone.png": (390, 844, "light", ""),
    }.items():
        page = await browser.page(width, height, scheme=scheme, mobile=width < 600)
        await page.open(server.url + "/" + view)
        await page.until("document.documentElement.dataset.started === 'yes'")
        pages[name] = page
    await pages["console-light.png"].js("document.querySelectorAll('.ledger tbody button')[4].click()")
    await asyncio.sleep(_LIVE_SECONDS)
    pictures = {}
    for name, page in pages.items():
        await page.call("Page.bringToFront")
        await asyncio.sleep(2.0)
        pictures[name] = await page.screenshot()
    return pictures


async def main(address: str, folder: Path) -> None:
    """Serve, look, write."""
    database = Database(f"sqlite+aiosqlite:///{folder / 'appliance.db'}")
    await seed(database, time.time())
    async with console_server(folder, database=database) as server, connected(address) as browser:
        working = asyncio.create_task(keep_busy(server.recorder))
        try:
            pictures = await take(browser, server)
        finally:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
    await database.close()
    for name, picture in pictures.items():
        assert len(picture) < MAX_BYTES, (name, len(picture))
        (FOLDER / name).write_bytes(picture)


if __name__ == "__main__":
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium is installed (Debian: apt-get install chromium)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, running_chromium(program, Path(scratch)) as found:
        asyncio.run(main(found, Path(scratch)))
