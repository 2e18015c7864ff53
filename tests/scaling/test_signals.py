"""From decision to receiver: the outbox, the courier and the loop over a real SQLite file and a real receiver on loopback."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from cloudevents.core.formats.json import JSONFormat
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from appliance.clock import ManualClock
from appliance.errors import ConfigError, InvalidRequest, NotFound
from appliance.events import ScaleDecision, Snapshot
from appliance.scaling import adapters
from appliance.scaling.endpoint import create_scaling_app
from appliance.scaling.loop import ScalingLoop
from appliance.scaling.policy import Hold, Policy, PolicyConfig, PolicyState
from appliance.scaling.webhook import Courier, Signer, check_endpoints, cloud_event
from appliance.store.database import Database
from appliance.store.outbox import Message, Outbox, webhook_id
from appliance.store.tables import DeliveryRow, OutboxRow, ScaleDecisionRow

Make = Callable[..., Any]
SECRET = "whsec_" + base64.b64encode(b"n" * 32).decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"o" * 32).decode()


@dataclass
class Receiver:
    """Verifies what it gets and answers as told; the last answer stays."""

    secret: str = SECRET
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=lambda: [(200, {})])
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    refused: int = 0
    before_answer: Callable[[], Awaitable[None]] | None = None

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            Webhook(self.secret).verify(body, headers)
        except WebhookVerificationError:
            self.refused += 1
            return web.Response(status=401)
        self.got.append((headers, body))
        if self.before_answer is not None:
            await self.before_answer()
        status, extra = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers=extra)

    @property
    def sequences(self) -> list[int]:
        return [json.loads(body)["data"]["sequence"] for _, body in self.got]


@dataclass
class Ears:
    """Counts what the observers hear."""

    outcomes: list[str] = field(default_factory=list)
    runs: list[tuple[int, str | None]] = field(default_factory=list)
    pinned: list[bool] = field(default_factory=list)

    def on_delivery(self, outcome: str, num_pending: int) -> None:
        self.outcomes.append(outcome)

    def on_policy(self, desired_replicas: int, direction: str | None = None, *, pinned: bool) -> None:
        self.runs.append((desired_replicas, direction))
        self.pinned.append(pinned)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """A migrated SQLite file."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database, instance_id="node-1", fleet="blue")


@pytest.fixture
def clock() -> ManualClock:
    """Real wall time (the receiver checks timestamps), moved by hand."""
    return ManualClock(wall=time.time())


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def url(receiver: Receiver) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/hook", receiver.handle)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/hook"))
    await server.close()


@pytest.fixture
def ears() -> Ears:
    return Ears()


@pytest.fixture
async def courier(outbox: Outbox, clock: ManualClock, ears: Ears) -> AsyncIterator[Courier]:
    courier = Courier(outbox, Signer(SECRET), clock=clock, observer=ears, seed=0)
    yield courier
    await courier.close()


def decision(clock: ManualClock, sequence: int = 1, **changes: Any) -> ScaleDecision:
    base = ScaleDecision(
        id=f"01900000-0000-7000-8000-{sequence:012d}",
        sequence=sequence,
        at_wall=clock.wall(),
        expires_wall=clock.wall() + 300.0,
        instance_id="node-1",
        fleet="blue",
        direction="up",
        current_replicas=1,
        desired_replicas=2,
        reason="the queue is old",
        inputs={"num_waiting": 4.0, "kv_utilisation": None},
        alternatives=("stay at 1",),
        mode="act",
    )
    return msgspec.structs.replace(base, **changes)


async def put(outbox: Outbox, one: ScaleDecision, *urls: str) -> int:
    return await outbox.record(one, [Message(url, cloud_event(one)) for url in urls])


async def states(database: Database) -> dict[int, str]:
    async with database.session() as session:
        return {row.sequence: row.state for row in (await session.execute(select(OutboxRow))).scalars()}


async def outcome(database: Database, sequence: int = 1) -> str | None:
    async with database.session() as session:
        return (await session.execute(select(ScaleDecisionRow.outcome).where(ScaleDecisionRow.sequence == sequence))).scalar_one()


# The body and its signature


def test_the_body_is_a_cloud_event(clock: ManualClock) -> None:
    """CloudEvents 1.0 with the decision as data."""
    event = JSONFormat().read(None, cloud_event(decision(clock)))
    assert event.get_type() == "appliance.scale.up"
    assert event.get_source() == "/fleets/blue/instances/node-1"
    assert event.get_specversion() == "1.0"
    data = event.get_data()
    assert isinstance(data, dict)
    assert msgspec.convert(data, ScaleDecision) == decision(clock)


def test_the_body_stays_under_20_kb_and_is_json(clock: ManualClock) -> None:
    """What was considered gives way before the decision does; NaN does not make broken JSON."""
    big = decision(clock, alternatives=("x" * 30_000,), inputs={"a": float("nan")})
    body = cloud_event(big)
    assert len(body) < 20_000
    data = json.loads(body, parse_constant=lambda name: pytest.fail(name))["data"]
    assert data["alternatives"] == []
    assert data["inputs"] == {"a": None}
    with pytest.raises(ValueError, match="20000 are allowed"):
        cloud_event(decision(clock, reason="x" * 30_000))


def test_rotating_keys_sign_with_all(clock: ManualClock) -> None:
    """A receiver with either secret accepts; a third refuses, and so does either for a changed body."""
    body = cloud_event(decision(clock))
    headers = Signer(f"{SECRET} {OLD_SECRET}").headers("id-1", clock.wall(), body)
    for secret in (SECRET, OLD_SECRET):
        Webhook(secret).verify(body, headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body.replace('"desired_replicas": 2', '"desired_replicas": 9'), headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, headers | {"webhook-id": "id-2"})
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(b"x" * 32).decode()).verify(body, headers)


@pytest.mark.parametrize("secret", ["", "nonsense", "whsec_!!!", "whsec_" + base64.b64encode(b"short").decode()])
def test_a_bad_secret_is_named_but_not_printed(secret: str) -> None:
    """The config error says what is wrong without the secret."""
    with pytest.raises(ConfigError, match="webhook_secret") as caught:
        Signer(secret)
    assert not secret or secret not in str(caught.value)


@pytest.mark.parametrize("bad", ["ftp://a/b", "file:///etc/passwd", "/hook", "http://", "http://user:hunter2@host/hook", "http://host:99999/"])
def test_only_http_urls_without_credentials(bad: str) -> None:
    """Anything else is a config error, shown without its password."""
    with pytest.raises(ConfigError, match="webhook_urls") as caught:
        check_endpoints([bad, "https://fine.example/hook"])
    assert "hunter2" not in str(caught.value)
    assert check_endpoints(["https://a.example/h", "https://a.example/h"]) == ("https://a.example/h",)


# Delivery


async def test_a_signal_arrives_signed(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database
) -> None:
    """The receiver verifies it with the standardwebhooks library, and SQL says so."""
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    ((headers, body),) = receiver.got
    assert headers["webhook-id"] == webhook_id(decision(clock).id, url)
    assert headers["content-type"] == "application/cloudevents+json"
    assert json.loads(body)["data"]["desired_replicas"] == 2
    assert await states(database) == {1: "delivered"}
    assert await outcome(database) == "1 delivered"
    await courier.deliver_due()
    assert len(receiver.got) == 1


async def test_retries_keep_the_id_and_renew_the_timestamp(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database, ears: Ears
) -> None:
    """The same key for the receiver's deduplication, a fresh time for its replay check."""
    receiver.answers = [(500, {}), (503, {}), (204, {})]
    await put(outbox, decision(clock), url)
    for _ in range(3):
        wait = await courier.deliver_due()
        clock.advance(max(wait, 1.0))
    assert await states(database) == {1: "delivered"}
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({headers["webhook-timestamp"] for headers, _ in receiver.got}) == 3
    assert ears.outcomes == ["failed", "failed", "delivered"]
    async with database.session() as session:
        rows = (await session.execute(select(DeliveryRow.attempt, DeliveryRow.status).order_by(DeliveryRow.id))).all()
    assert [tuple(row) for row in rows] == [(1, 500), (2, 503), (3, 204)]


async def test_backoff_doubles_with_jitter(outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str) -> None:
    """Each wait lies between half and the whole of 1, 2, 4, ... seconds."""
    receiver.answers = [(500, {})]
    await put(outbox, decision(clock), url)
    for attempt in range(5):
        wait = await courier.deliver_due()
        assert 0.5 * 2**attempt <= wait + 1e-6 <= 1.0 * 2**attempt + 1e-6
        clock.advance(wait + 0.001)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_retry_after_is_honoured_by_newer_signals_too(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, status: int
) -> None:
    """The endpoint asked for a pause: the next signal does not break it."""
    receiver.answers = [(status, {"Retry-After": "20"}), (200, {})]
    await put(outbox, decision(clock), url)
    assert await courier.deliver_due() == pytest.approx(20.0, abs=0.5)
    clock.advance(5.0)
    await put(outbox, decision(clock, 2), url)
    await courier.deliver_due()
    assert receiver.sequences == [1]
    clock.advance(15.5)
    await courier.deliver_due()
    assert receiver.sequences == [1, 2]


async def test_a_newer_signal_supersedes_an_undelivered_one(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database, ears: Ears
) -> None:
    """Only the newest state is worth sending, and at once."""
    receiver.answers = [(500, {}), (200, {})]
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    courier.wake(num_superseded=await put(outbox, decision(clock, 2), url))
    await courier.deliver_due()
    assert receiver.sequences == [1, 2]
    assert await states(database) == {1: "superseded", 2: "delivered"}
    assert await outcome(database, 1) == "1 superseded"
    assert ears.outcomes == ["failed", "superseded", "delivered"]


async def test_a_signal_superseded_in_flight_is_not_tried_again(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database
) -> None:
    """A failed attempt does not bring a superseded row back to life."""

    async def newer() -> None:
        receiver.before_answer = None
        await put(outbox, decision(clock, 2), url)

    receiver.answers, receiver.before_answer = [(500, {})], newer
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    assert await states(database) == {1: "superseded", 2: "pending"}


async def test_410_disables_the_endpoint_across_restarts(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database, ears: Ears
) -> None:
    """Gone is gone until someone says otherwise."""
    receiver.answers = [(410, {})]
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    assert await states(database) == {1: "dead"}
    assert ears.outcomes == ["dead"]
    fresh = Outbox(database, instance_id="node-1", fleet="blue")
    assert await fresh.disabled_endpoints() == {url}
    assert await fresh.enable(url)
    assert not await fresh.enable(url)
    assert await fresh.disabled_endpoints() == frozenset()


async def test_an_expired_signal_is_a_dead_letter(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database, ears: Ears
) -> None:
    """It is kept and counted, not sent."""
    await put(outbox, decision(clock), url)
    clock.advance(301.0)
    await courier.deliver_due()
    assert receiver.got == []
    assert await states(database) == {1: "dead"}
    assert await outcome(database) == "1 dead"
    assert ears.outcomes == ["dead"]


async def test_no_attempt_is_planned_beyond_the_expiry(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database
) -> None:
    """A Retry-After past the signal's life makes it a dead letter at once."""
    receiver.answers = [(503, {"Retry-After": "4000"})]
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    assert await states(database) == {1: "dead"}


async def test_redirects_are_not_followed(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, database: Database
) -> None:
    """Only configured URLs are ever called."""
    receiver.answers = [(307, {"Location": url.replace("/hook", "/elsewhere")})]
    await put(outbox, decision(clock), url)
    await courier.deliver_due()
    assert await states(database) == {1: "pending"}
    async with database.session() as session:
        error = (await session.execute(select(OutboxRow.last_error))).scalar_one()
    assert error == "HTTP 307 (redirects are not followed)"


async def test_an_endpoint_that_is_away_delays_no_other(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, unused_tcp_port: int, database: Database
) -> None:
    """A refused connection is retried; the other endpoint has its signal."""
    await put(outbox, decision(clock), url, f"http://127.0.0.1:{unused_tcp_port}/hook")
    await courier.deliver_due()
    assert receiver.sequences == [1]
    async with database.session() as session:
        found = {row[0]: row[1] for row in (await session.execute(select(OutboxRow.state, func.count()).group_by(OutboxRow.state))).all()}
    assert found == {"delivered": 1, "pending": 1}


async def test_a_restart_in_the_middle_sends_again_with_the_same_id(
    outbox: Outbox, clock: ManualClock, receiver: Receiver, url: str, database: Database
) -> None:
    """The process dies after the receiver has the signal and before SQL knows: at least once, and recognisable."""
    arrived, never = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        arrived.set()
        await never.wait()

    receiver.before_answer = hang
    await put(outbox, decision(clock), url)
    first = Courier(outbox, Signer(SECRET), clock=clock)
    first.start()
    await asyncio.wait_for(arrived.wait(), 10)
    await first.close()
    never.set()
    receiver.before_answer = None
    assert await states(database) == {1: "pending"}
    second = Courier(Outbox(database, instance_id="node-1", fleet="blue"), Signer(SECRET), clock=clock)
    await second.deliver_due()
    await second.close()
    assert len(receiver.got) == 2
    assert receiver.got[0][0]["webhook-id"] == receiver.got[1][0]["webhook-id"]
    assert await states(database) == {1: "delivered"}


async def test_the_courier_outlives_a_database_that_is_away(
    outbox: Outbox, courier: Courier, clock: ManualClock, receiver: Receiver, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries again and delivers when it is back."""
    await put(outbox, decision(clock), url)
    due, failed = outbox.due, asyncio.Event()

    async def away(_: float) -> Any:
        monkeypatch.setattr(outbox, "due", due)
        failed.set()
        raise OperationalError("select", {}, OSError("away"))

    monkeypatch.setattr(outbox, "due", away)
    courier.start()
    await asyncio.wait_for(failed.wait(), 10)
    courier.wake()
    for _ in range(200):
        if receiver.got:
            break
        await asyncio.sleep(0.02)
    assert receiver.sequences == [1]


async def test_two_instances_share_a_database(outbox: Outbox, clock: ManualClock, url: str, database: Database) -> None:
    """Each delivers and supersedes its own signals only."""
    other = Outbox(database, instance_id="node-2", fleet="blue")
    await put(outbox, decision(clock), url)
    theirs = decision(clock, 1, id="01900000-0000-7000-8000-00000000ffff", instance_id="node-2")
    assert await put(other, theirs, url) == 0
    assert [row.decision_id for row in await outbox.due(clock.wall())] == [decision(clock).id]
    assert [row.decision_id for row in await other.due(clock.wall())] == [theirs.id]
    with pytest.raises(NotFound):
        await outbox.find(theirs.id)


# The loop


@dataclass
class Rig:
    """A loop over a machine whose snapshot the test sets."""

    outbox: Outbox | None
    clock: ManualClock
    make_snapshot: Make
    make_window: Make
    ears: Ears
    courier: Courier | None
    url: str
    busy: bool = True

    def look(self) -> Snapshot:
        if not self.busy:
            return self.make_snapshot(self.clock.monotonic(), at_wall=self.clock.wall(), slow=self.make_window(), fast=self.make_window())
        fast = self.make_window(mean_waiting=9.0)
        return self.make_snapshot(self.clock.monotonic(), at_wall=self.clock.wall(), fast=fast, num_waiting=9, oldest_waiting_age_seconds=9.0)

    def loop(self, mode: str = "act", *, warm: bool = True, **changes: Any) -> ScalingLoop:
        config = PolicyConfig(
            **{"instance_id": "node-1", "fleet": "blue", "mode": mode, "max_queue_age_seconds": 1.0, "startup_seconds": 60.0} | changes
        )
        made = ScalingLoop(
            Policy(config), self.look, clock=self.clock, outbox=self.outbox, courier=self.courier, endpoints=(self.url,), observer=self.ears
        )
        if warm:
            now = self.clock.monotonic()
            made.state = PolicyState(started_at=now - 900, evaluated_at=now)
        return made


@pytest.fixture
def rig(outbox: Outbox, clock: ManualClock, make_snapshot: Make, make_window: Make, ears: Ears, courier: Courier, url: str) -> Rig:
    return Rig(outbox, clock, make_snapshot, make_window, ears, courier, url)


async def test_acting_decides_records_and_delivers(rig: Rig, receiver: Receiver, database: Database) -> None:
    """Decision and signal are in SQL after one run, and at the receiver after one delivery."""
    loop = rig.loop()
    answer = await loop.run()
    assert isinstance(answer, ScaleDecision)
    assert await states(database) == {1: "pending"}
    assert rig.courier is not None
    await rig.courier.deliver_due()
    assert receiver.sequences == [1]
    assert rig.ears.runs == [(2, "up")]
    assert loop.view().desired_replicas == 2
    assert loop.age_seconds == 0.0
    async with database.session() as session:
        row = (await session.execute(select(ScaleDecisionRow))).scalar_one()
    assert row.inputs["num_waiting"] == 9
    assert row.reason == answer.reason
    assert row.alternatives == list(answer.alternatives)


async def test_every_run_says_whether_the_fleet_is_pinned(rig: Rig) -> None:
    """It is heard when more is wanted than may be, and also when that ends, which is no decision."""
    loop = rig.loop(max_replicas=1)
    await loop.run()
    assert rig.ears.runs == [(1, "pinned")]
    rig.busy = False
    for _ in range(70):
        rig.clock.advance(5.0)
        await loop.run()
        assert rig.ears.pinned[-1] == loop.view().pinned
    assert {direction for _, direction in rig.ears.runs[1:]} == {None}
    assert (rig.ears.pinned[:2], rig.ears.pinned[-1]) == ([True, True], False)


async def test_advice_is_recorded_and_not_delivered(rig: Rig, database: Database) -> None:
    """Mode advise touches nobody."""
    assert isinstance(await rig.loop("advise").run(), ScaleDecision)
    assert await states(database) == {}
    assert await outcome(database) == "recorded"


async def test_approval_sends_what_waited(rig: Rig, receiver: Receiver, database: Database) -> None:
    """Nothing leaves before approve(); afterwards it is delivered once, and a second approval is refused."""
    loop = rig.loop("approve")
    answer = await loop.run()
    assert isinstance(answer, ScaleDecision)
    assert await states(database) == {}
    assert loop.state.current_replicas == 1
    await loop.approve(answer.id, by="ops")
    assert loop.state.current_replicas == 2
    assert rig.courier is not None
    await rig.courier.deliver_due()
    assert receiver.sequences == [1]
    with pytest.raises(InvalidRequest, match="no longer open"):
        await loop.approve(answer.id)
    with pytest.raises(NotFound):
        await loop.approve("unknown")


async def test_an_approval_that_comes_too_late_is_refused_and_the_question_put_again(rig: Rig) -> None:
    """A decision is void after its expiry; while the cause lasts a new one is taken."""
    loop = rig.loop("approve")
    first = await loop.run()
    assert isinstance(first, ScaleDecision)
    rig.clock.advance(301.0)
    with pytest.raises(InvalidRequest, match="expired"):
        await loop.approve(first.id)
    loop.state = dataclasses.replace(loop.state, evaluated_at=rig.clock.monotonic())
    second = await loop.run()
    assert isinstance(second, ScaleDecision)
    assert (second.sequence, second.desired_replicas) == (2, 2)


async def test_a_restart_goes_on_with_the_numbers(rig: Rig) -> None:
    """Sequence and replicas come from SQL; history does not, so the policy holds until the window has filled."""
    assert isinstance(await rig.loop().run(), ScaleDecision)
    again = rig.loop(warm=False)
    held = await again.run()
    assert isinstance(held, Hold)
    assert held.kind == "warming_up"
    assert (again.state.sequence, again.state.current_replicas, again.state.desired_replicas) == (1, 2, 2)
    for _ in range(70):
        rig.clock.advance(5.0)
        answer = await again.run()
        if isinstance(answer, ScaleDecision):
            break
    assert isinstance(answer, ScaleDecision)
    assert (answer.sequence, answer.current_replicas) == (2, 2)


async def test_an_unheard_signal_is_repeated(rig: Rig, receiver: Receiver, database: Database) -> None:
    """The fleet does not stay at a number that nobody was told: after the expiry the state is sent anew."""
    assert rig.courier is not None
    receiver.answers = [(500, {})]
    loop = rig.loop(max_replicas=2)
    await loop.run()
    rig.busy = False
    for _ in range(62):
        await rig.courier.deliver_due()
        rig.clock.advance(5.0)
        await loop.run()
    await rig.courier.deliver_due()
    assert (await states(database))[1] == "dead"
    async with database.session() as session:
        second = (await session.execute(select(ScaleDecisionRow).where(ScaleDecisionRow.sequence == 2))).scalar_one()
    assert second.desired_replicas == 2
    assert second.reason.startswith("repeats sequence 1, which was not delivered: ")


async def test_the_loop_holds_while_the_database_is_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is announced that is not recorded; the decision is taken again when it can be."""
    assert rig.outbox is not None
    loop, record = rig.loop(), rig.outbox.record

    async def away(*_: Any, **__: Any) -> int:
        raise OperationalError("insert", {}, OSError("away"))

    monkeypatch.setattr(rig.outbox, "record", away)
    held = await loop.run()
    assert isinstance(held, Hold)
    assert held.kind == "no_store"
    assert loop.view().desired_replicas == 1
    monkeypatch.setattr(rig.outbox, "record", record)
    rig.clock.advance(5.0)
    answer = await loop.run()
    assert isinstance(answer, ScaleDecision)
    assert answer.sequence == 1


async def test_a_commit_whose_answer_was_lost_is_read_back(rig: Rig, monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    """The row is there although the client saw an error: its number is not used twice."""
    assert rig.outbox is not None
    loop, record = rig.loop(), rig.outbox.record

    async def lost(*arguments: Any, **options: Any) -> int:
        await record(*arguments, **options)
        raise OperationalError("commit", {}, OSError("connection lost"))

    monkeypatch.setattr(rig.outbox, "record", lost)
    assert isinstance(await loop.run(), Hold)
    monkeypatch.setattr(rig.outbox, "record", record)
    rig.clock.advance(5.0)
    await loop.run()
    assert (loop.state.sequence, loop.state.current_replicas) == (1, 2)
    assert await states(database) == {1: "pending"}


async def test_without_a_store_it_decides_in_memory(rig: Rig) -> None:
    """The gauge and the pollers still work."""
    rig.outbox = rig.courier = None
    loop = rig.loop()
    assert isinstance(await loop.run(), ScaleDecision)
    assert loop.view().desired_replicas == 2


async def test_the_scheduler_runs_it(rig: Rig) -> None:
    """APScheduler calls it; late runs are not dropped, missed ones merge, runs do not overlap."""
    scheduler = AsyncIOScheduler()
    rig.loop("advise").schedule(scheduler, 0.05)
    scheduler.start()
    for _ in range(100):
        if len(rig.ears.runs) >= 2:
            break
        await asyncio.sleep(0.02)
    job = scheduler.get_job("scaling-policy")
    assert job.max_instances == 1
    assert job.coalesce
    assert job.misfire_grace_time >= 60
    scheduler.shutdown(wait=False)
    await asyncio.sleep(0)
    assert len(rig.ears.runs) >= 2


# Pollers


async def test_every_autoscaler_finds_its_shape(rig: Rig) -> None:
    """One state in the words of each."""
    loop = rig.loop()
    await loop.run()
    view = loop.view()
    assert adapters.keda_metrics_api(view) == {"desired_replicas": 2}
    assert adapters.ray_serve_scale(view) == {"target_num_replicas": 2}
    assert "\nappliance_scaling_desired_replicas 2\n" in adapters.prometheus_gauge(view)
    state = adapters.state_json(view)
    assert json.loads(json.dumps(state))["last_decision"]["sequence"] == 1


async def test_the_state_is_served_and_decisions_are_approved_over_http(rig: Rig, receiver: Receiver) -> None:
    """GET tells, POST approves; wrong bodies and unknown ids get the OpenAI error shape."""
    loop = rig.loop("approve")
    server = TestServer(create_scaling_app(loop, caller=lambda _: "ops"))
    await server.start_server()
    async with aiohttp.ClientSession(base_url=str(server.make_url("/"))) as client:
        async with client.get("/v1/scale/keda") as response:
            assert (response.status, await response.json()) == (200, {"desired_replicas": 1})
        await loop.run()
        async with client.get("/v1/scale") as response:
            open_decision = (await response.json())["last_decision"]
        async with client.post(f"/v1/scale/decisions/{open_decision['id']}/approve") as response:
            assert (response.status, (await response.json())["desired_replicas"]) == (200, 2)
        async with client.post("/v1/scale/decisions/nope/approve") as response:
            assert (response.status, (await response.json())["error"]["type"]) == (404, "invalid_request_error")
        async with client.get("/v1/scale/metric") as response:
            assert "appliance_scaling_desired_replicas 2" in await response.text()
        async with client.get("/v1/scale/ray") as response:
            assert await response.json() == {"target_num_replicas": 2}
        async with client.post("/v1/scale/replicas", json={"replicas": 5}) as response:
            assert (await response.json())["current_replicas"] == 5
        for body in (b"[", b"[]", b'{"replicas": true}', b'{"replicas": -1}', b'{"replicas": "3"}'):
            async with client.post("/v1/scale/replicas", data=body, headers={"Content-Type": "application/json"}) as response:
                assert response.status == 400
        async with client.post("/v1/scale/replicas", data='{"replicas": 7}', headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 415
        for url in ("\ud800", "http://x/\n", 5):
            async with client.post("/v1/scale/endpoints/enable", json={"url": url}) as response:
                assert response.status == 400
        async with client.post("/v1/scale/endpoints/enable", json={"url": "http://x"}) as response:
            assert await response.json() == {"enabled": False}
    await server.close()
