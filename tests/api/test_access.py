"""API keys and request ids."""

import uuid

import pytest

from appliance.api.keys import ApiKeys, load_keys
from appliance.api.request_id import clean_client_id, mint_request_id
from appliance.errors import ConfigError
from appliance.settings import ServerSettings

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}
KEYS = {"alice": "sk-a", "bob": "sk-b"}


async def test_every_route_but_two_is_closed(start_server):
    """With keys only /health and /ready answer without one; unknown routes and other methods are closed too."""
    server = await start_server(keys=KEYS)
    routes = {resource.canonical for resource in server.session and app_resources(server)}
    for path in sorted(routes - {"/health", "/ready"}):
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            async with server.session.request(method, server.url + path.replace("{model}", "tiny")) as response:
                assert response.status == 401, (method, path)
                body = await response.json()
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert (await server.get(path))[0] == 200
    for path in ("/nothing", "/health/", "//health", "/health/../v1/models", "/v1/models;/health", "/%2e/health", "/v1%2Fmodels"):
        async with server.session.get(encoded(server.url + path)) as response:
            assert response.status == 401, path
    assert server.records == []


def app_resources(server):
    """The routes of the application."""
    from appliance.api.app import create_app

    return create_app(server.services).router.resources()


def encoded(url):
    """`url` sent as it is written."""
    from yarl import URL

    return URL(url, encoded=True)


async def test_no_host_header_or_absolute_url_opens_a_route(start_server):
    """What counts is the route that runs: a request line or Host that mentions /health changes nothing."""
    import asyncio

    server = await start_server(keys=KEYS)
    host, port = server.url.removeprefix("http://").split(":")
    for request in (
        "GET http://localhost/health/../v1/models HTTP/1.1\r\nHost: localhost",
        "GET /v1/models HTTP/1.1\r\nHost: localhost/health",
        "GET /v1/models?/health HTTP/1.1\r\nHost: /health",
        "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{request}\r\nConnection: close\r\n\r\n".encode())
        reply = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert reply.split(b" ")[1] in (b"401", b"400"), reply


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer sk-a"}, 200),
        ({"Authorization": "bearer  sk-b"}, 200),
        ({"X-Api-Key": "sk-a"}, 200),
        ({"Authorization": "Bearer sk-"}, 401),
        ({"Authorization": "Bearer sk-aa"}, 401),
        ({"Authorization": "Bearer \u00e9\u20ac"}, 401),
        ({"Authorization": "Basic sk-a"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({}, 401),
    ],
)
async def test_a_key_is_recognised_or_not(start_server, headers, status):
    """Only a whole known key lets in, as a bearer token or as X-Api-Key."""
    server = await start_server(keys=KEYS)
    assert (await server.get("/v1/models", **headers))[0] == status


async def test_the_key_is_named_in_record_and_submission(start_server):
    """Accounting and fairness see the key's name, never the key."""
    server = await start_server(keys=KEYS)
    assert (await server.post(CHAT, ASK, Authorization="Bearer sk-b"))[0] == 200
    assert server.records[0].key_id == "bob"
    assert server.engine.generations[0].request.key_id == "bob"


def test_every_key_is_compared(monkeypatch):
    """The time of a look-up does not tell which key matched: all are compared, in constant time."""
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("appliance.api.keys.hmac.compare_digest", lambda a, b: compared.append(b) or real(a, b))
    assert ApiKeys(KEYS).name_of("sk-a") == "alice"
    assert compared == [b"sk-a", b"sk-b"]


def test_keys_come_from_file_and_settings(tmp_path):
    """Lines are `name:key` or a bare key, which is named by its fingerprint; comments and blanks are skipped."""
    file = tmp_path / "keys"
    file.write_text("# ours\nalice: sk-a\n\nsk-bare\n")
    keys = load_keys(ServerSettings(api_keys_file=file, api_key="sk-env"))
    assert keys.name_of("sk-a") == "alice"
    assert keys.name_of("sk-env") == "default"
    name = keys.name_of("sk-bare")
    assert name is not None
    assert name.startswith("key-")
    assert "bare" not in name
    assert not load_keys(ServerSettings())


@pytest.mark.parametrize("content", ["", "# nothing\n", "a:x\na:y\n", ":x\n", "a:\n"])
def test_a_bad_key_file_stops_the_start(tmp_path, content):
    """A file that would leave the node open or ambiguous is an error, and the message holds no key."""
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_keys(ServerSettings(api_keys_file=file))
    assert caught.value.problems[0].key == "server.api_keys_file"


def test_a_missing_key_file_stops_the_start(tmp_path):
    """A path that cannot be read must not mean an open node."""
    with pytest.raises(ConfigError):
        load_keys(ServerSettings(api_keys_file=tmp_path / "none"))


async def test_a_clients_request_id_is_echoed_and_recorded(server):
    """X-Request-Id comes back cleaned and cut to 64 characters; the record has it beside the server's own id."""
    _, _, headers = await server.post(CHAT, ASK, **{"X-Request-Id": 'abc-1<script>"' + "x" * 100})
    assert headers["X-Request-Id"] == ("abc-1script" + "x" * 100)[:64]
    record = server.records[0]
    assert record.client_request_id == headers["X-Request-Id"]
    assert uuid.UUID(record.id).version == 7
    _, body, headers = await server.post(CHAT, ASK)
    assert headers["X-Request-Id"] == server.records[1].id
    assert body["id"] == f"chatcmpl-{server.records[1].id}"
    assert server.records[1].client_request_id is None


async def test_streams_and_errors_carry_the_request_id(server):
    """Every response has X-Request-Id, whatever its kind."""
    async with server.session.post(server.url + CHAT, json={**ASK, "stream": True}, headers={"X-Request-Id": "s1"}) as response:
        assert response.headers["X-Request-Id"] == "s1"
        await response.read()
    assert (await server.get("/nothing", **{"X-Request-Id": "e1"}))[2]["X-Request-Id"] == "e1"


def test_ids_are_version_7_and_sort_by_time():
    """Ids minted later sort later, and carry version and variant."""
    ids = [mint_request_id(wall) for wall in (1.0, 1.5, 1_700_000_000.0, 1_800_000_000.5)]
    assert ids == sorted(ids)
    assert all(one.version == 7 and one.variant == uuid.RFC_4122 for one in ids)
    assert ids[3].int >> 80 == 1_800_000_000_500


def test_a_client_id_of_nothing_is_none():
    """An id that is empty after cleaning is no id."""
    assert clean_client_id(None) is None
    assert clean_client_id("") is None
    assert clean_client_id("\x00\n<>") is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.test"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "OWN"}, 200),
        ({}, 200),
    ],
)
async def test_without_keys_pages_of_other_origins_are_refused(server, headers, status):
    """A browser on the machine must not be a way in for any page that it shows; programs, and our own page, are no such thing."""
    headers = {name: server.url if value == "OWN" else value for name, value in headers.items()}
    async with server.session.post(server.url + CHAT, json=ASK, headers=headers) as response:
        assert response.status == status
    async with server.session.get(server.url + "/v1/models", headers=headers) as response:
        assert response.status == 200
