"""With keys on, the console is closed to everyone who has not shown one, and its cookie opens no more than the console needs."""

from __future__ import annotations

from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from aiohttp import ClientResponse, ClientSession, CookieJar
from console_server import ConsoleServer, console_server

from appliance.clock import ManualClock
from appliance.console.sessions import SESSION_SECONDS

ROUTES = ("/", "/console/api/about", "/console/api/live", "/console/api/snapshot", "/console/api/history", "/console/api/requests",
          "/console/api/requests/x", "/console/api/decisions", "/console/api/events", "/console/static/0/main.js")  # fmt: skip
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def _session() -> ClientSession:
    return ClientSession(cookie_jar=CookieJar(unsafe=True))  # keeps cookies of an IP address


async def _log_in(session: ClientSession, server: ConsoleServer, key: str = "sk-alice") -> ClientResponse:
    return await session.post(server.url + "/console/login", data={"key": key}, headers={"Origin": server.url}, allow_redirects=False)


async def test_every_route_is_closed_without_a_session(locked_server: ConsoleServer) -> None:
    """Page, files and JSON answer 401; a browser that opens the page is led to the login."""
    async with ClientSession() as session:
        for path in ROUTES:
            async with session.get(locked_server.url + path) as response:
                assert response.status == 401, path
                assert (await response.json())["error"]["code"] == "invalid_api_key"
        async with session.get(locked_server.url + "/", headers=HTML, allow_redirects=False) as response:
            assert response.status == 303
            assert response.headers["Location"] == "/console/login"
        async with session.get(locked_server.url + "/console/api/about", headers=HTML, allow_redirects=False) as response:
            assert response.status == 401
        async with session.post(locked_server.url + "/console/logout", headers={"Origin": locked_server.url}) as response:
            assert response.status == 401


async def test_a_key_is_exchanged_for_a_cookie_that_opens_the_console(locked_server: ConsoleServer) -> None:
    """The cookie is HttpOnly and SameSite=Strict, ends by itself, and holds no key; with it every route of the console answers."""
    async with _session() as session:
        response = await _log_in(session, locked_server)
        assert response.status == 303
        assert response.headers["Location"] == "/"
        cookie = SimpleCookie(response.headers["Set-Cookie"])["appliance_session"]
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"
        assert cookie["path"] == "/"
        assert int(cookie["max-age"]) == SESSION_SECONDS
        assert not cookie["secure"]
        assert "sk-alice" not in cookie.value
        for path in ("/", "/console/api/about", "/console/api/snapshot", "/console/api/history", "/console/api/requests", "/metrics"):
            async with session.get(locked_server.url + path) as response:
                assert response.status == 200, path
        async with session.get(locked_server.url + "/console/login", allow_redirects=False) as response:
            assert response.status == 303


async def test_behind_tls_the_cookie_is_secure(locked_server: ConsoleServer) -> None:
    """A proxy that ends TLS says so, and the cookie then never travels in the clear."""
    headers = {"Origin": locked_server.url, "X-Forwarded-Proto": "https"}
    url = locked_server.url + "/console/login"
    async with ClientSession() as session, session.post(url, data={"key": "sk-bob"}, headers=headers, allow_redirects=False) as response:
        assert SimpleCookie(response.headers["Set-Cookie"])["appliance_session"]["secure"]


@pytest.mark.parametrize("key", ["", "sk-alic", "sk-alicex", "alice", "\u00e9\u20ac", "x" * 8000])
async def test_a_wrong_key_gets_no_cookie(locked_server: ConsoleServer, key: str) -> None:
    """The page comes again with 401 and says why, without the key that was tried."""
    async with _session() as session:
        response = await _log_in(session, locked_server, key)
        assert response.status == 401
        assert "Set-Cookie" not in response.headers
        text = await response.text()
        assert 'role="alert"' in text
        assert not key or key not in text or key == "alice"
        async with session.get(locked_server.url + "/console/api/about") as again:
            assert again.status == 401


async def test_an_oversized_form_is_refused(locked_server: ConsoleServer) -> None:
    """The one route that takes a body from strangers takes a small one."""
    async with _session() as session:
        response = await _log_in(session, locked_server, "x" * 9000)
        assert response.status == 413


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_no_foreign_page_acts_for_a_browser(locked_server: ConsoleServer, headers: dict[str, str]) -> None:
    """A post that does not come from our own page neither chats nor approves nor logs in or out, cookie or not; reading is not affected."""
    async with _session() as session:
        await _log_in(session, locked_server)
        chat = {"model": "Qwen3-0.6B", "messages": [{"role": "user", "content": "hi"}]}
        for path, body in (("/v1/chat/completions", chat), ("/v1/scale/decisions/x/approve", {}), ("/console/logout", {})):
            async with session.post(locked_server.url + path, json=body, headers=headers) as response:
                assert response.status == 401, (path, headers)
        async with session.post(locked_server.url + "/console/login", data={"key": "sk-bob"}, headers=headers) as response:
            assert response.status == 403
        async with session.get(locked_server.url + "/console/api/about") as response:
            assert response.status == 200
    assert locked_server.records == []


async def test_the_cookie_opens_the_chat_under_the_name_of_its_key(locked_server: ConsoleServer) -> None:
    """The chat box needs no key of its own, and its requests are accounted to the key that logged in."""
    body = {"model": "Qwen3-0.6B", "messages": [{"role": "user", "content": "hi"}]}
    async with _session() as session:
        await _log_in(session, locked_server, "sk-bob")
        for headers in ({"Origin": locked_server.url}, {"Sec-Fetch-Site": "same-origin", "Origin": "null"}):
            async with session.post(locked_server.url + "/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == 200
    assert [record.key_id for record in locked_server.records] == ["bob", "bob"]


async def test_the_cookie_opens_nothing_else(locked_server: ConsoleServer) -> None:
    """Routes that the page does not call take a key and nothing else."""
    async with _session() as session:
        await _log_in(session, locked_server)
        origin = {"Origin": locked_server.url}
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/nowhere"), ("GET", "/console/x")):
            async with session.request(method, locked_server.url + path, headers=origin) as response:
                assert response.status == 401, path


async def test_logging_out_ends_the_session_on_the_server_too(locked_server: ConsoleServer) -> None:
    """A copy of the cookie is worth nothing afterwards; other sessions go on."""
    async with _session() as session, _session() as other:
        await _log_in(session, locked_server)
        await _log_in(other, locked_server)
        copy = {cookie.key: cookie.value for cookie in session.cookie_jar}
        async with session.post(locked_server.url + "/console/logout", headers={"Origin": locked_server.url}, allow_redirects=False) as response:
            assert response.status == 303
            assert response.headers["Location"] == "/console/login"
        assert not list(session.cookie_jar)
        async with _session() as thief, thief.get(locked_server.url + "/console/api/about", cookies=copy) as response:
            assert response.status == 401
        async with other.get(locked_server.url + "/console/api/about") as response:
            assert response.status == 200


async def test_a_session_survives_a_restart_and_ends_in_time(tmp_path: Path) -> None:
    """The secret is in the state folder, so the next process knows the cookie, until it has expired."""
    clock = ManualClock()
    keys = {"alice": "sk-alice"}
    async with _session() as session:
        async with console_server(tmp_path, keys=keys, clock=clock) as server:
            await _log_in(session, server)
        cookie = {cookie.key: cookie.value for cookie in session.cookie_jar}
        async with console_server(tmp_path, keys=keys, clock=clock) as server:
            for advance, status in ((0.0, 200), (SESSION_SECONDS - 1.0, 200), (1.0, 401)):
                clock.advance(advance)
                async with session.get(server.url + "/console/api/about", cookies=cookie) as response:
                    assert response.status == status


async def test_an_api_key_opens_the_console_as_well(locked_server: ConsoleServer) -> None:
    """Scripts read the same JSON with a bearer token and never see a login page."""
    async with ClientSession(headers={"Authorization": "Bearer sk-alice"}) as session:
        for path in ("/", "/console/api/snapshot"):
            async with session.get(locked_server.url + path) as response:
                assert response.status == 200


async def test_without_keys_foreign_names_are_refused(server: ConsoleServer) -> None:
    """A name of the Internet that resolves to this machine (DNS rebinding) reads nothing; localhost and addresses do."""
    port = server.url.rpartition(":")[2]
    async with ClientSession() as session:
        for host, status in (
            (f"localhost:{port}", 200),
            ("app.localhost", 200),
            (f"127.0.0.1:{port}", 200),
            (f"[::1]:{port}", 200),
            (f"evil.example:{port}", 403),
            ("localhost.evil.example", 403),
            ("", 403),
        ):
            for path in ("/", "/console/api/snapshot"):
                async with session.get(server.url + path, headers={"Host": host}) as response:
                    assert response.status == status, host
        async with session.get(server.url + "/console/login") as response:
            assert response.status == 404
