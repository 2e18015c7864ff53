"""A node with keys: everything is closed but health and readiness, and records tell whose request it was."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from appliance_server import EXACT, ApplianceServer, serving

ALICE, BOB = "sk-alice-0123456789", "sk-bob-9876543210"
KNOWN_ROUTES = ("/v1/models", "/v1/models/tiny", "/metrics", "/version", "/openapi.json", "/v1/scale", "/v1/scale/keda")
UNKNOWN_ROUTES = ("/nowhere", "/", "/health/", "/ready/x", "//health", "/%68ealth/../metrics")
NO_KEYS = ("Bearer sk-wrong", ALICE, "Bearer ", f"Basic {ALICE}", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}")


@pytest.fixture(scope="module")
def server(dummy_model: str, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """A tiny model behind two keys."""
    state = state_folder()
    (state / "keys").write_text(f"# who may\nalice:{ALICE}\nbob:{BOB}\n")
    settings = {**EXACT, "model.path": dummy_model, "model.served_name": "tiny", "server.api_keys_file": state / "keys", "server.host": "0.0.0.0"}
    with serving(state, settings) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


def test_only_health_and_readiness_are_open(server: ApplianceServer) -> None:
    """Without a key or with a wrong one, every other route (known or not) is 401; with one, known routes answer."""
    assert server.status("/health") == server.status("/ready") == 200
    for route in KNOWN_ROUTES + UNKNOWN_ROUTES:
        for headers in ({}, *({"Authorization": value} for value in NO_KEYS)):
            status, body = server.get(route, headers)
            assert status == 401, (route, headers)
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for route in KNOWN_ROUTES:
        assert server.get(route, {"Authorization": f"Bearer {ALICE}"})[0] == 200, route
        assert server.get(route, {"X-Api-Key": BOB})[0] == 200, route
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/scale/replicas"):
        request = urllib.request.Request(server.url + path, b"{}", {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 401
        refused.value.close()


async def test_records_name_the_key_and_never_hold_it(server: ApplianceServer) -> None:
    """Each request's row carries its key's name; no secret is in the database, the metrics or the log."""
    for secret in (ALICE, BOB, BOB):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=secret, max_retries=0) as client:
            assert (await client.completions.create(model="tiny", prompt="abc", max_tokens=2)).usage is not None
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.completions.create(model="tiny", prompt="abc", max_tokens=2)
    rows = server.wait_rows("select key_id from requests order by received_wall", count=3)
    assert [row["key_id"] for row in rows] == ["alice", "bob", "bob"]
    stored = b"".join(path.read_bytes() for path in server.state.glob("appliance.db*"))
    told = server.get("/metrics", {"Authorization": f"Bearer {ALICE}"})[1] + "\n".join(server.output)
    for secret in (ALICE, BOB):
        assert secret.encode() not in stored
        assert secret not in told
