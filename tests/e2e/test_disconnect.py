"""A client that leaves: its sequence leaves the batch by the second step, its blocks come back, and the ledger says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from appliance_server import Stream, check_ledger, run_stream, until
from sqlalchemy import select

from appliance.app import Appliance, running
from appliance.events import StepStats
from appliance.settings import EngineSettings, MetricsSettings, ModelSettings, ServerSettings, Settings, StoreSettings
from appliance.store.database import Database, database_url
from appliance.store.tables import RequestRow

NUM_BLOCKS = 640


@pytest.fixture
async def appliance(dummy_model: str, state_folder: Callable[[], Path]) -> AsyncIterator[Appliance]:
    """A tiny model in this process (its engine in another), so that every step can be watched."""
    settings = Settings(
        state_dir=state_folder(),
        server=ServerSettings(port=0),
        model=ModelSettings(path=dummy_model, dtype="float32", context_length=8192),
        engine=EngineSettings(max_num_seqs=8, num_blocks=NUM_BLOCKS, num_threads=1),
        metrics=MetricsSettings(sample_seconds=1),
        store=StoreSettings(flush_seconds=0.1),
    )
    async with running(settings) as appliance:
        await appliance.engine.wait_ready(90)
        yield appliance


async def test_a_client_that_leaves_frees_its_place_by_the_second_step(appliance: Appliance) -> None:
    """Of a stream, a stream in the queue's shadow and a whole reply that are cut, none is computed in the second step behind the cut."""
    steps: list[StepStats] = []
    observer = appliance.engine._observer
    on_step = observer.on_step
    observer.on_step = lambda stats, gaps: (steps.append(stats), on_step(stats, gaps))[1]  # type: ignore[method-assign]
    aborted_at: list[float] = []
    abort = appliance.engine._table.abort
    appliance.engine._table.abort = lambda sequence: (aborted_at.append(time.monotonic()), abort(sequence))[1]  # type: ignore[method-assign]
    ask = {"max_tokens": 4000, "ignore_eos": True, "seed": 1}
    staying, leaving = Stream(request_id="stays"), Stream(request_id="leaves")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:

        async def whole() -> None:
            async with session.post(
                appliance.url + "/v1/completions", json={**ask, "prompt": "whole", "n": 2}, headers={"X-Request-Id": "whole"}
            ) as reply:
                await reply.read()

        stays = asyncio.create_task(run_stream(session, appliance.url, {**ask, "prompt": "stays"}, staying))
        leaves = asyncio.create_task(run_stream(session, appliance.url, {**ask, "prompt": "leaves", "n": 2}, leaving))
        waits = asyncio.create_task(whole())
        await asyncio.gather(staying.wait_tokens(20), leaving.wait_tokens(20))
        await until(lambda: steps[-1].num_running == 5, "five sequences in the batch")
        leaves.cancel()
        waits.cancel()
        await asyncio.gather(leaves, waits, return_exceptions=True)
        left_at = time.monotonic()
        await until(lambda: len(aborted_at) == 4, "four aborts")
        await until(lambda: len([step for step in steps if step.started_at > max(aborted_at)]) > 2, "steps behind them")
        assert max(aborted_at) - left_at < 0.5, "the server noticed late"
        behind = [step for step in steps if step.started_at > max(aborted_at)]
        assert [step.num_sequences for step in behind[1:]] == [1] * (len(behind) - 1)
        assert behind[1].num_running == 1
        num_left = len(staying.token_ids)
        assert behind[1].num_used_blocks <= (num_left + 400) // 16 + 3, "blocks of those that left are still in use"
        await stays
    assert staying.done
    assert len(staying.token_ids) == 4000
    metrics = appliance.recorder.exposition()[0].decode()
    assert "appliance_kv_used_blocks 0.0" in metrics
    assert "appliance_aborts_total 4.0" in metrics
    assert "appliance_requests_in_flight 0.0" in metrics
    assert appliance.engine.num_in_flight == 0

    database = Database(database_url(appliance.settings))
    try:
        await until(lambda: appliance.recorder.instruments.total("appliance_requests_total") == 3, "three records")
        await asyncio.sleep(2 * appliance.settings.store.flush_seconds)  # the writer's batch
        async with database.session() as session_:
            rows = {row["client_request_id"]: dict(row) for row in (await session_.execute(select(RequestRow.__table__))).mappings()}
    finally:
        await database.close()
    assert {name: (row["status"], row["finish_reason"], row["error_code"]) for name, row in rows.items()} == {
        "stays": (200, "length", None),
        "leaves": (499, "abort", "client_disconnected"),
        "whole": (499, "abort", "client_disconnected"),
    }
    for row in rows.values():
        check_ledger(row)
    assert rows["leaves"]["num_written_tokens"] >= len(leaving.token_ids) - 2
    assert rows["whole"]["num_written_tokens"] == 0
    assert rows["whole"]["num_generated_tokens"] > 0


async def test_clients_that_leave_while_waiting_leave_the_queue(appliance: Appliance) -> None:
    """Forty clients that come and go at any moment leave nothing behind: no sequence, no block, no handler."""
    ask = {"max_tokens": 300, "ignore_eos": True}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
        streams = [Stream() for _ in range(40)]
        tasks = [
            asyncio.create_task(run_stream(session, appliance.url, {**ask, "prompt": f"{index}" * 30, "seed": index}, stream))
            for index, stream in enumerate(streams)
        ]
        for index, task in enumerate(tasks):
            if index % 4:
                await asyncio.sleep(0.02)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    kept = [stream for index, stream in enumerate(streams) if index % 4 == 0]
    assert all(stream.done and len(stream.token_ids) == 300 for stream in kept)
    await until(lambda: not (appliance.drain.num_open or appliance.engine.num_in_flight), "nothing is open")
    await until(lambda: appliance.recorder.stats is not None and appliance.recorder.stats.num_used_blocks == 0, "every block is back")
