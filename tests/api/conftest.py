"""A server over an in-memory engine: real aiohttp on loopback, nothing behind it."""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web

from appliance.api.app import create_app
from appliance.api.keys import ApiKeys
from appliance.api.services import Drain, Services
from appliance.clock import SystemClock
from appliance.engine.client import Delta, SequenceRequest
from appliance.engine.costs import Bill
from appliance.engine.wire import Heartbeat, Ready, SequenceEvent, TokenLogprobs
from appliance.events import RequestRecord, RequestUse
from appliance.settings import Settings
from appliance.text.chat_template import ChatTemplate
from appliance.text.load import TextModel
from appliance.text.tokenizer import ByteTokenizer
from appliance.tracing import NO_TRACING, Tracing

EOS = 0
READY = Ready(
    device="cpu",
    dtype="float32",
    quantization="none",
    vocab_size=300,
    context_length=1000,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=100,
    num_parameters=1,
    weight_bytes=4,
    kv_bytes_per_token=1,
    load_seconds=0.1,
    reasons=(),
)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class FakeGeneration:
    """One sequence whose deltas a test scripts. Keeps what its handler did with it."""

    def __init__(self, request: SequenceRequest, sequence_id: int) -> None:
        self.request = request
        self.sequence_id = sequence_id
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_restarts = 0
        self.bill = Bill()
        self.aborted = False
        self.finished_at: int | None = None
        self.ended = False
        self._deltas: collections.deque[Delta] = collections.deque()
        self._listener: Callable[[], None] | None = None

    def put(
        self,
        ids: list[int] | None = None,
        finish: str | None = None,
        error: Exception | None = None,
        events: list[SequenceEvent] | None = None,
    ) -> None:
        """Make a delta ready. Logprobs are made up where the request asked for them."""
        token_ids = ids or []
        now = SystemClock().monotonic()
        logprobs = None
        if (num := self.request.sampling.num_logprobs) is not None:
            logprobs = [TokenLogprobs(-0.5, 1, tuple(range(65, 65 + num)), tuple(-0.5 - i for i in range(num))) for _ in token_ids]
        self._deltas.append(Delta(token_ids, [now] * len(token_ids), logprobs, events or [], finish, error))
        self._wake()

    def take(self) -> Delta:
        """One scripted delta a wake-up, so that a test decides what comes together."""
        if not self._deltas:
            return Delta([], [], None, [], None, None)
        delta = self._deltas.popleft()
        self.ended = delta.finish_reason is not None or delta.error is not None
        if self._deltas:
            self._wake()
        return delta

    def listen(self, listener: Callable[[], None], *, every_token: bool) -> None:
        self._listener = listener
        if self._deltas:
            self._wake()

    def _wake(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().call_soon(self._listener)

    async def next(self) -> Delta:
        raise NotImplementedError("the API listens")

    def abort(self) -> None:
        self.aborted = True

    def finish(self, num_tokens: int) -> None:
        self.finished_at = num_tokens


class FakeEngine:
    """An EngineClient in memory. `script` answers each submission; None leaves the sequence open for the test to feed."""

    def __init__(self) -> None:
        self.state = "ready"
        self.ready: Ready | None = READY
        self.heartbeat: Heartbeat | None = None
        self.pid: int | None = 1
        self.num_in_flight = 0
        self.generations: list[FakeGeneration] = []
        self.script: Callable[[FakeGeneration], None] | None = say("Hello!")
        self.refusal: Exception | None = None

    async def start(self) -> None:
        pass

    async def wait_ready(self, timeout_seconds: float | None = None) -> Ready:
        return READY

    def submit(self, request: SequenceRequest) -> FakeGeneration:
        if self.refusal is not None:
            raise self.refusal
        generation = FakeGeneration(request, len(self.generations))
        self.generations.append(generation)
        if self.script is not None:
            self.script(generation)
        return generation

    async def close(self) -> None:
        pass


def say(text: str, *, group: int = 1, finish: str = "stop") -> Callable[[FakeGeneration], None]:
    """A script: the bytes of `text` as tokens, `group` in a delta, cut at max_tokens, ended by EOS."""

    def script(generation: FakeGeneration) -> None:
        ids = [*text.encode(), EOS] if finish == "stop" else list(text.encode())
        limit = generation.request.sampling.max_tokens
        reason = finish if len(ids) <= limit else "length"
        ids = ids[:limit]
        for start in range(0, len(ids), group):
            last = start + group >= len(ids)
            generation.put(ids[start : start + group], finish=reason if last else None)

    return script


class Observer:
    """Counts what the API reports."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.records: list[RequestRecord] = []
        self.uses: list[RequestUse] = []

    def on_received(self, endpoint: str) -> None:
        self.calls.append(("received", endpoint))

    def on_admitted(self, num_prompt_tokens: int, max_tokens: int) -> None:
        self.calls.append(("admitted", num_prompt_tokens, max_tokens))

    def on_rejected(self, code: str) -> None:
        self.calls.append(("rejected", code))

    def on_first_token(self, seconds: float, endpoint: str, request_id: str) -> None:
        self.calls.append(("first_token",))

    def on_other_first_token(self) -> None:
        self.calls.append(("other_first_token",))

    def on_request(self, record: RequestRecord, use: RequestUse) -> None:
        self.uses.append(use)
        self.records.append(record)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` holds; the test's own timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - conditions of fakes that have no event
        await asyncio.sleep(0.001)


class Server:
    """The running server, its fakes and a client session."""

    say = staticmethod(say)
    until = staticmethod(until)

    def __init__(self, services: Services, session: ClientSession, url: str, records: list[RequestRecord]) -> None:
        self.services = services
        self.engine: FakeEngine = services.engine  # type: ignore[assignment]
        self.observer: Observer = services.observer  # type: ignore[assignment]
        self.session = session
        self.url = url
        self.records = records

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """(status, parsed body, headers) of a POST; bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, headers={"Content-Type": "application/json", **headers}) as response:
            return response.status, await response.json(), response.headers

    async def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        """(status, parsed body, headers) of a GET."""
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, await response.json(), response.headers

    async def generation(self, index: int = 0) -> FakeGeneration:
        """The sequence of the index-th submission, as soon as it was made."""
        await until(lambda: len(self.engine.generations) > index)
        return self.engine.generations[index]

    async def record(self, number: int = 1) -> RequestRecord:
        """The newest of `number` records, as soon as there are so many."""
        await until(lambda: len(self.records) >= number)
        assert len(self.records) == number
        return self.records[-1]

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; the last is the string [DONE] if it was sent."""
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            text = await response.text()
        assert text.endswith("\n\n")
        blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
        assert all(block.startswith("data: ") for block in blocks)
        payloads = [block.removeprefix("data: ") for block in blocks]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


StartServer = Callable[..., Any]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Starts servers: `await start_server(keys={...}, server={...settings...})`."""
    runners: list[web.AppRunner] = []
    sessions: list[ClientSession] = []

    async def start(
        keys: dict[str, str] | None = None,
        text: TextModel | None = None,
        tracing: Tracing = NO_TRACING,
        log: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        **server: Any,
    ) -> Server:
        settings = Settings.model_validate({"state_dir": "/nonexistent", "server": server, "log": log or {}, "metrics": metrics or {}})
        records: list[RequestRecord] = []
        services = Services(
            settings=settings,
            engine=FakeEngine(),
            text=text or TextModel(ByteTokenizer(), ChatTemplate(TEMPLATE, {}), (EOS,)),
            clock=SystemClock(),
            model_name="tiny",
            keys=ApiKeys(keys),
            drain=Drain(),
            observer=Observer(),
            metrics_text=lambda _: (b"appliance_up 1\n", "text/plain; version=0.0.4; charset=utf-8"),
            on_record=records.append,
            tracing=tracing,
        )
        runner = web.AppRunner(create_app(services), handler_cancellation=True, access_log=None)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        session = ClientSession()
        sessions.append(session)
        return Server(services, session, url, records)

    yield start
    for session in sessions:
        await session.close()
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    """A server with default settings and no keys."""
    return await start_server()
