"""Load that one node cannot hold becomes a decision in SQL and a signed signal at the receiver."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from appliance_server import EXACT, ApplianceServer, Stream, run_stream, serving, until
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver:
    """An autoscaler's endpoint: keeps what it got, and answers its first signal with 503."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], str]] = []
        self.port = 0

    async def take(self, request: web.Request) -> web.Response:
        self.received.append(({name.lower(): value for name, value in request.headers.items()}, await request.text()))
        return web.Response(status=503 if len(self.received) == 1 else 204)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on a free port of this machine."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/scale", receiver.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.port = runner.addresses[0][1]
    yield receiver
    await runner.cleanup()


@pytest.fixture
def server(receiver: Receiver, dummy_model: str, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """One sequence at a time, short windows, signals to the receiver as soon as they are decided."""
    settings = {
        **EXACT,
        "model.path": dummy_model,
        "model.context_length": 4096,
        "engine.max_num_seqs": 1,
        "metrics.fast_window_seconds": 2,
        "metrics.slow_window_seconds": 4,
        "scaling.mode": "act",
        "scaling.interval_seconds": 0.25,
        "scaling.startup_seconds": 5,
        "scaling.max_queue_age_seconds": 0.3,
        "scaling.max_replicas": 4,
        "scaling.webhook_urls": f"http://127.0.0.1:{receiver.port}/scale",
        "instance_id": "node-1",
        "fleet": "blue",
    }
    with serving(state_folder(), settings, {"APPLIANCE_SCALING__WEBHOOK_SECRET": SECRET}) as server:
        yield server


async def test_a_queue_becomes_a_signed_signal(server: ApplianceServer, receiver: Receiver) -> None:
    """The queue's age passes its limit: a decision with its reason is stored, delivered again after a 503 under the same id, and verifies."""
    assert (await asyncio.to_thread(server.get, "/v1/scale/keda"))[0] == 200
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(110)) as session:

        async def keep_asking(index: int) -> None:
            while True:
                await run_stream(session, server.url, {"prompt": f"{index}", "max_tokens": 300, "ignore_eos": True, "seed": index}, Stream())

        load = [asyncio.create_task(keep_asking(index)) for index in range(6)]
        try:
            await until(lambda: len(receiver.received) >= 2, "a signal and its repetition", 60)
        finally:
            for task in load:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*load, return_exceptions=True)

    (first, first_body), (again, again_body) = receiver.received[:2]  # the first was answered with 503: it comes again, or a newer one instead
    verifier = Webhook(KEY)
    for headers, body in receiver.received:
        verifier.verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        verifier.verify(first_body.replace('"desired_replicas":', '"desired_replicas": '), first)
    with pytest.raises(WebhookVerificationError):
        Webhook(b"another key of thirty-two bytes!").verify(first_body, first)
    event = json.loads(again_body)
    if again["webhook-id"] == first["webhook-id"]:
        assert again_body == first_body
    else:
        assert event["data"]["sequence"] > json.loads(first_body)["data"]["sequence"]
    assert event["specversion"] == "1.0"
    assert event["type"] == "appliance.scale.up"
    assert event["source"] == "/fleets/blue/instances/node-1"
    data = event["data"]
    assert (data["direction"], data["mode"], data["current_replicas"], data["desired_replicas"]) == ("up", "act", 1, 2)
    assert "waiting" in data["reason"]
    assert data["inputs"]["num_waiting"] > 0

    (decision,) = server.wait_rows("select * from scale_decisions where id = ?", event["id"])
    assert decision["reason"] == data["reason"]
    assert json.loads(decision["inputs"]) == data["inputs"]
    server.wait_rows("select * from outbox where decision_id = ? and state = 'delivered'", event["id"])
    statuses = "select d.status from deliveries d join outbox o on o.id = d.outbox_id where o.decision_id = ? order by d.at_wall"
    assert server.sql(statuses, event["id"])[-1]["status"] == 204
    metrics = server.metrics()
    assert metrics.value("scaling_decisions_total", direction="up") >= 1
    assert metrics.value("scaling_desired_replicas") >= 2
    # It is counted behind its row in SQL, which this test may see first.
    await until(lambda: server.metrics().value("webhook_deliveries_total", outcome="delivered") >= 1, "the delivery counted")
    assert metrics.value("webhook_deliveries_total", outcome="failed") == 1
    assert metrics.value("scaling_run_age_seconds") < 5
    assert json.loads(server.get("/v1/scale")[1])["desired_replicas"] >= 2
