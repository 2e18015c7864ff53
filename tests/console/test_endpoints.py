"""The console's JSON: the live frame, history, the ledger page by page, decisions and events."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession
from console_server import INSTANCE, ConsoleServer, FakeEngine, console_server, work
from sqlalchemy import text

from appliance.clock import ManualClock
from appliance.console import live
from appliance.engine.wire import Heartbeat
from appliance.errors import Unavailable
from appliance.events import Sample
from appliance.metrics.goodput import Slo
from appliance.metrics.sampler import Sampler
from appliance.metrics.silent import SilentRecorder
from appliance.store.database import Database


async def _get(server: ConsoleServer, path: str, status: int = 200) -> Any:
    async with ClientSession() as session, session.get(server.url + path) as response:
        assert response.status == status, await response.text()
        assert response.content_type == "application/json"
        if status == 200:
            assert response.headers["Cache-Control"] == "no-store"
        return await response.json()


async def test_about_tells_what_does_not_change(server: ConsoleServer) -> None:
    """The page learns model, SLO and whether there are history and a login."""
    about = await _get(server, "/console/api/about")
    assert about["model"] == "Qwen3-0.6B"
    assert about["instance_id"] == INSTANCE
    assert (about["ttft_slo_seconds"], about["tpot_slo_seconds"], about["slo_target"]) == (0.5, 0.03, 0.99)
    assert (about["login"], about["store"]) == (False, True)


async def test_a_frame_holds_the_machine_now(server: ConsoleServer) -> None:
    """Windows, queue, engine, hardware and scaling are the recorder's own; there is no sample without a period to measure over."""
    frame = await _get(server, "/console/api/snapshot")
    assert (frame["num_running"], frame["num_waiting"]) == (96, 3)
    assert frame["fast"]["num_requests"] == 40
    assert frame["fast"]["goodput"] == 1.0
    assert frame["engine"]["state"] == "ready"
    assert frame["engine"]["ready"]["device"].startswith("NVIDIA")
    assert frame["hardware"]["gpus"][0]["name"].startswith("NVIDIA")
    assert frame["scaling"]["desired_replicas"] == 2
    assert frame["sample"] is None
    assert frame["predicted_ttft_seconds"] >= 0.0


async def test_the_live_stream_measures_each_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame comes at once; those that follow hold what happened since the one before, in the form of a sample."""
    async with console_server(tmp_path) as server, ClientSession() as session:
        monkeypatch.setattr(server.console._feed, "_period", 0.05)
        async with session.get(server.url + "/console/api/live") as response:
            assert response.content_type == "text/event-stream"
            first = await _frame(response)
            assert first["sample"] is None
            work(server.recorder)
            samples = [(await _frame(response))["sample"] for _ in range(3)]
        generated = [sample["num_generated_tokens"] for sample in samples]
        assert sum(generated) == 20 * 96 + 40
        assert generated[-1] == 0
        assert samples[0]["period_seconds"] > 0
        assert set(samples[0]) >= {"at_wall", "ttft_p95_seconds", "kv_utilisation", "gpu_power_watts"}
        while server.console._feed._task is not None:  # noqa: ASYNC110 - the server hears of the closed connection in its own time
            await asyncio.sleep(0.01)


async def _frame(response: Any) -> Any:
    line = await response.content.readline()
    assert line.startswith(b"data: "), line
    assert await response.content.readline() == b"\n"
    return json.loads(line[6:])


async def test_nobody_looks_nothing_runs(server: ConsoleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All viewers share one task, which ends with the last of them; a viewer that does not read costs two frames of memory."""
    feed = server.console._feed
    monkeypatch.setattr(feed, "_period", 0.001)
    taken: list[float] = []
    take = Sampler.take
    monkeypatch.setattr(Sampler, "take", lambda self, hardware=None: taken.append(1.0) or take(self, hardware))
    assert feed._task is None
    async with feed.watch() as one, feed.watch() as two:
        task = feed._task
        while len(taken) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert feed._task is task
        assert one.qsize() <= 2
        assert two.qsize() <= 2
    assert feed._task is None
    await asyncio.sleep(0)
    assert task is not None
    assert task.done()


async def test_a_feed_that_fails_lets_its_viewers_go(server: ConsoleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that cannot be made ends the stream, so that the page connects again instead of showing an old number for ever."""
    feed = server.console._feed
    monkeypatch.setattr(feed, "_period", 0.001)
    async with feed.watch() as frames:
        assert await frames.get() is not None
        monkeypatch.setattr(Sampler, "take", lambda self, hardware=None: 1 / 0)
        assert await frames.get() is None
        monkeypatch.undo()
        async with feed.watch() as again:
            assert await again.get() is not None


async def test_viewers_are_bounded(server: ConsoleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than there may be gets 503, and one who leaves makes room."""
    monkeypatch.setattr(live, "MAX_VIEWERS", 1)
    feed = server.console._feed
    async with feed.watch():
        await _get(server, "/console/api/live", status=503)
    async with feed.watch():
        pass
    await feed.close()
    with pytest.raises(Unavailable):
        async with feed.watch():
            pass


async def test_stopping_the_server_ends_the_streams(tmp_path: Path) -> None:
    """An open console does not hold a stop up until its time limit."""
    async with ClientSession() as session:
        async with console_server(tmp_path) as server:
            response = await session.get(server.url + "/console/api/live")
            await _frame(response)
            began = time.monotonic()
        assert time.monotonic() - began < 0.9
        response.close()


async def test_history_is_this_instances_samples_by_column(server: ConsoleServer) -> None:
    """Columns of equal length, oldest first, within the time asked for."""
    for seconds, least in ((300, 25), (3600, 300)):
        history = await _get(server, f"/console/api/history?seconds={seconds}")
        (series,) = history["series"]
        assert series["instance_id"] == INSTANCE
        at = series["at_wall"]
        assert at == sorted(at)
        assert least <= len(at) <= seconds / 10 + 2
        assert time.time() - at[0] <= seconds + 5
        assert all(len(column) == len(at) for column in series["columns"].values())
        assert {"num_generated_tokens", "period_seconds", "gpu_power_watts", "goodput"} <= set(series["columns"])


async def test_history_of_a_long_range_is_thinned(database: Database, server: ConsoleServer) -> None:
    """A range of a month answers with few points however many samples there are, and no coarser than it must."""
    history = await _get(server, "/console/api/history?seconds=2592000")
    assert history["resolution_seconds"] in (10, 60, 3600)
    assert max(len(series["at_wall"]) for series in history["series"]) > 1
    assert all(len(series["at_wall"]) <= 721 for series in history["series"])


async def test_history_holds_the_columns_that_were_asked_for(server: ConsoleServer) -> None:
    """The page asks for what it draws, and every column that it reads is one of a sample's."""
    (series,) = (await _get(server, "/console/api/history?seconds=300&columns=goodput,num_running,nonsense"))["series"]
    assert set(series["columns"]) == {"goodput", "num_running"}
    source = (Path(live.__file__).parent / "static" / "series.js").read_text()
    listed = source[source.index("export const COLUMNS") : source.index("export class Points")]
    columns = set(re.findall(r'"(\w+)"', listed))
    assert columns <= set(Sample.__struct_fields__)
    read = set(re.findall(r'(?:rate|plain|percentOf)\("(\w+)"\)', source)) | set(re.findall(r"sample\.(\w+)", source))
    assert read == columns


async def test_the_ledger_is_paged_without_gaps_or_repeats(server: ConsoleServer) -> None:
    """Following the cursor shows each request once, newest first, though new ones arrive meanwhile."""
    seen: list[str] = []
    path = "/console/api/requests?limit=40"
    pages = 0
    while path:
        page = await _get(server, path)
        pages += 1
        seen += [found["record"]["id"] for found in page["requests"]]
        path = f"/console/api/requests?limit=40&cursor={page['cursor']}" if page["cursor"] else ""
    assert pages == 4
    assert len(seen) == len(set(seen)) == 130
    assert seen == sorted(seen)  # the harness numbers them from the newest on


async def test_the_ledger_is_filtered_by_failure_and_key(server: ConsoleServer) -> None:
    """Failures only, and one key's requests only."""
    failed = (await _get(server, "/console/api/requests?limit=200&failed=1"))["requests"]
    assert len(failed) == 10
    assert {found["record"]["status"] for found in failed} == {503}
    bobs = (await _get(server, "/console/api/requests?limit=200&key=bob"))["requests"]
    assert {found["record"]["key_id"] for found in bobs} == {"bob"}
    assert len(bobs) == 43


async def test_one_request_is_found_by_either_id(server: ConsoleServer) -> None:
    """The server's id or the client's own; the states of its ledger sum to its duration."""
    (found,) = (await _get(server, "/console/api/requests/01900000-0000-7000-8000-000000000004"))["requests"]
    record = found["record"]
    assert sum(record["states"].values()) == pytest.approx(record["duration_seconds"])
    assert record["states"]["preempted"] == 0.35
    (same,) = (await _get(server, "/console/api/requests/job-4"))["requests"]
    assert same["record"]["id"] == record["id"]
    error = await _get(server, "/console/api/requests/nothing", status=404)
    assert "finished" in error["error"]["message"]


async def test_decisions_carry_their_reasons(server: ConsoleServer) -> None:
    """Newest first, each with reason, inputs, alternatives and what came of it."""
    decisions = (await _get(server, "/console/api/decisions"))["decisions"]
    assert [stored["decision"]["sequence"] for stored in decisions] == [3, 2, 1]
    assert "first tokens" in decisions[0]["decision"]["reason"]
    assert decisions[0]["decision"]["inputs"]["num_waiting"] == 12.0
    assert len(decisions[0]["decision"]["alternatives"]) == 2
    assert [stored["outcome"] for stored in decisions] == [None, "delivered", "delivered"]


async def test_engine_events_are_listed(server: ConsoleServer) -> None:
    """What happened to the engine process, newest first."""
    events = (await _get(server, "/console/api/events"))["events"]
    assert [found["event"]["kind"] for found in events] == ["ready", "started"]


@pytest.mark.parametrize(
    "path",
    [
        "/console/api/history?seconds=0",
        "/console/api/history?seconds=nan",
        "/console/api/history?seconds=1e12",
        "/console/api/history?seconds=abc",
        "/console/api/requests?limit=0",
        "/console/api/requests?limit=100000",
        "/console/api/requests?cursor=nonsense",
        "/console/api/decisions?limit=-1",
        "/console/api/events?limit=x",
    ],
)
async def test_bad_parameters_are_named(server: ConsoleServer, path: str) -> None:
    """400 in the API's own shape, with the value that was given."""
    error = (await _get(server, path, status=400))["error"]
    assert error["type"] == "invalid_request_error"
    assert path.partition("?")[2].partition("=")[0] in error["message"]


async def test_without_a_store_the_rest_works(tmp_path: Path) -> None:
    """What is kept in SQL says that the store is off; the live numbers do not need it."""
    async with console_server(tmp_path) as server:
        assert (await _get(server, "/console/api/about"))["store"] is False
        assert (await _get(server, "/console/api/snapshot"))["engine"]["state"] == "ready"
        for path in ("history", "requests", "requests/x", "decisions", "events"):
            error = (await _get(server, f"/console/api/{path}", status=404))["error"]
            assert error["code"] == "store_off"


async def test_while_the_database_is_away_the_page_is_told(database: Database, server: ConsoleServer) -> None:
    """503 with Retry-After and no traceback; live numbers go on."""
    async with database.begin() as connection:
        for table in ("requests", "samples", "engine_events"):
            await connection.execute(text(f"ALTER TABLE {table} RENAME TO {table}_away"))
    for path in ("history", "requests", "requests/x", "events"):
        error = (await _get(server, f"/console/api/{path}", status=503))["error"]
        assert error["code"] == "store_away"
    await _get(server, "/console/api/snapshot")


async def test_a_starting_engine_tells_its_phase(tmp_path: Path) -> None:
    """The page shows what is being loaded, how far it is and since when."""
    engine = FakeEngine()
    engine.state, engine.ready = "starting", None
    engine.heartbeat = Heartbeat("load", time.monotonic() - 5.0, 900.0, 0.42, "model.safetensors")
    async with console_server(tmp_path, engine=engine) as server:
        told = (await _get(server, "/console/api/snapshot"))["engine"]
    assert told["state"] == "starting"
    assert told["ready"] is None
    assert told["heartbeat"]["phase"] == "load"
    assert told["heartbeat"]["progress"] == 0.42
    assert 5.0 <= told["heartbeat"]["phase_seconds"] < 60.0


def test_with_metrics_off_a_frame_still_comes() -> None:
    """A recorder that measures nothing gives frames without data, not errors."""
    clock = ManualClock()
    recorder = SilentRecorder(clock=clock, slo=Slo(0.5, 0.03))
    feed = live.LiveFeed(recorder, FakeEngine(), clock=clock)
    sampler = Sampler(recorder)
    clock.advance(1.0)
    frame = json.loads(msgspec.json.encode(feed.frame(sampler)))
    assert frame["engine"]["state"] == "ready"
    assert frame["fast"]["goodput"] is None
    assert frame["sample"]["num_generated_tokens"] == 0


async def test_head_of_the_live_stream_ends_with_its_headers(server: ConsoleServer) -> None:
    """A body would be no answer to HEAD, and this one has no end."""
    async with ClientSession() as session, session.head(server.url + "/console/api/live") as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert await response.read() == b""
    async with ClientSession() as session, session.get(server.url + "/console/api/snapshot") as response:
        assert response.status == 200
