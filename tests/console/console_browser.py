"""Headless Chromium over its DevTools protocol: what a test needs of a browser, on aiohttp's websocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

_FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class PageError(AssertionError):
    """A script threw, or something did not come to be."""


class Page:
    """One tab. `problems` collects what its console called an error or a warning, exceptions that nobody caught, and requests that failed."""

    def __init__(self, socket: ClientWebSocketResponse, session_id: str, calls: Calls) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._socket = socket
        self._session_id = session_id
        self._calls = calls
        calls.listeners[session_id] = self._on_event

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return await self._calls(method, parameters, self._session_id)

    async def open(self, url: str) -> None:
        """Go to `url` and wait until its document is loaded."""
        result = await self.call("Page.navigate", url=url)
        assert "errorText" not in result, result
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, expression: str) -> Any:
        """The value of an expression (a promise is awaited), as JSON."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise PageError(result["exceptionDetails"].get("exception", {}).get("description", str(result)))
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = 15.0) -> Any:
        """The value of an expression as soon as it is truthy; a page that is about to be left may throw meanwhile."""
        value: Any = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    with contextlib.suppress(PageError):
                        value = await self.js(expression)
                        if value:
                            return value
                    await asyncio.sleep(0.05)
        told = await self.js("document.body ? document.body.innerText.slice(0, 1500) : ''")
        raise PageError(f"not within {seconds} s: {expression}\nproblems: {self.problems}\n{told}")

    async def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        """The size of the window in CSS pixels."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    async def prefer(self, scheme: str) -> None:
        """What the system prefers: "dark" or "light"."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard, down and up."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def type(self, text: str) -> None:
        """Text into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def screenshot(self) -> bytes:
        """What the window shows, as a PNG."""
        result = await self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        return base64.b64decode(result["data"])

    def _on_event(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(argument.get("value", argument.get("description"))) for argument in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


class Calls:
    """Matches answers to calls on one socket, and hands events to the page they are of."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._socket = socket
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __call__(self, method: str, parameters: dict[str, Any], session_id: str | None = None) -> dict[str, Any]:
        number = next(self._ids)
        self._open[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session_id} if session_id else {})
        await self._socket.send_json(message)
        return await asyncio.wait_for(self._open[number], 30)

    async def read(self) -> None:
        """Until the socket ends."""
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            told = json.loads(message.data)
            if "id" not in told:
                if (listener := self.listeners.get(told.get("sessionId", ""))) is not None:
                    listener(told["method"], told["params"])
                continue
            future = self._open.pop(told["id"])
            if future.done():
                continue
            if "error" in told:
                future.set_exception(PageError(f"{told['error']}"))
            else:
                future.set_result(told["result"])


class Browser:
    """A running Chromium. Each page is of a context of its own: no cookie or storage is shared."""

    def __init__(self, socket: ClientWebSocketResponse, calls: Calls) -> None:
        self._socket = socket
        self._calls = calls
        self._contexts: list[str] = []

    async def close(self) -> None:
        """Close every page."""
        for context in self._contexts:
            await self._calls("Target.disposeBrowserContext", {"browserContextId": context})

    async def page(self, width: int = 1280, height: int = 900, *, scheme: str = "light", mobile: bool = False) -> Page:
        """An empty tab."""
        context = (await self._calls("Target.createBrowserContext", {}))["browserContextId"]
        self._contexts.append(context)
        target = (await self._calls("Target.createTarget", {"url": "about:blank", "browserContextId": context}))["targetId"]
        session_id = (await self._calls("Target.attachToTarget", {"targetId": target, "flatten": True}))["sessionId"]
        page = Page(self._socket, session_id, self._calls)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        await page.size(width, height, mobile=mobile)
        await page.prefer(scheme)
        return page


@contextmanager
def running_chromium(program: str, folder: Path) -> Iterator[str]:
    """The address of a browser with an empty profile under `folder`, ended at the end of the block."""
    profile = folder / "profile"
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium refuses to run as root with it
    command = [program, *_FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, path = _wait_for(profile / "DevToolsActivePort", process)
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Browser]:
    """The browser at `address` for the length of the block; its pages end with it."""
    async with ClientSession() as session, session.ws_connect(address, max_msg_size=1 << 27) as socket:
        calls = Calls(socket)
        reading = asyncio.create_task(calls.read())
        browser = Browser(socket, calls)
        try:
            yield browser
        finally:
            await browser.close()
            reading.cancel()


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Port and path, once the browser has written them down."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the browser left with {process.returncode}"
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) == 2:
            return lines[0], lines[1]
        time.sleep(0.05)
    raise AssertionError("the browser does not answer within 30 s")
