"""The engine process dies or hangs under open streams: each goes on to the very text that it would have had."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from appliance_server import EXACT, ApplianceServer, Stream, check_ledger, run_stream, serving

# Whole, streamed, greedy, sampled, with penalties: every kind of state that a replay must restore.
ASKS: list[dict[str, Any]] = [
    {"prompt": "The history of the city of Rome begins", "temperature": 0},
    {"prompt": "Once upon a time there was a king who", "temperature": 1.0, "seed": 11},
    {"prompt": "List of animals: dog, cat,", "temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 12},
    {"prompt": "The weather today is", "temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"prompt": "A recipe for soup:", "temperature": 1.0, "min_p": 0.05, "seed": -13, "logit_bias": {"30": 2}},
]


@pytest.fixture(scope="module")
def small_server(dummy_model: str, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """A tiny random model in float32 whose engine counts as hung after a step of 2 s."""
    settings = {**EXACT, "model.path": dummy_model, "engine.step_timeout_seconds": 2, "model.context_length": 4096, "engine.max_num_seqs": 8}
    with serving(state_folder(), settings) as server:
        yield server


async def run_all(
    server: ApplianceServer, asks: list[dict[str, Any]], name: str, trouble: Callable[[list[Stream]], Any] | None = None
) -> list[Stream]:
    """All of `asks` as streams at once, with `trouble` beside them; each must end well."""
    streams = [Stream(request_id=f"{name}-{index}") for index in range(len(asks))]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(110)) as session:
        tasks = [asyncio.create_task(run_stream(session, server.url, ask, stream)) for ask, stream in zip(asks, streams, strict=True)]
        if trouble is not None:
            await trouble(streams)
        await asyncio.gather(*tasks)
    for stream in streams:
        assert stream.error is None, stream
        assert stream.done
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] == len(stream.token_ids)
    return streams


def assert_same(disturbed: list[Stream], undisturbed: list[Stream]) -> None:
    """No token lost, none doubled, none other."""
    for got, want in zip(disturbed, undisturbed, strict=True):
        assert got.token_ids == want.token_ids
        assert got.text == want.text
        assert got.finish_reason == want.finish_reason


async def test_sigkill_of_the_engine_loses_no_token(embedded_server: ApplianceServer) -> None:
    """Killed in mid-stream, and again during the replay, the engine is restarted and every stream ends with the text of a quiet run."""
    server, began = embedded_server, time.time()
    asks = [{**ask, "max_tokens": 24, "ignore_eos": True} for ask in ASKS]
    quiet = await run_all(server, asks, "quiet")

    async def kill_twice(streams: list[Stream]) -> None:
        await asyncio.gather(*(stream.wait_tokens(6) for stream in streams))
        assert not any(stream.done for stream in streams)
        os.kill(server.engine_pid(), signal.SIGKILL)
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 503, 10, "not ready while the engine restarts")
        assert server.status("/health") == 200
        seen = [len(stream.token_ids) for stream in streams]
        await asyncio.gather(*(stream.wait_tokens(num + 4) for num, stream in zip(seen, streams, strict=True)))
        assert server.status("/ready") == 200
        os.kill(server.engine_pid(), signal.SIGKILL)

    disturbed = await run_all(server, asks, "killed", kill_twice)
    assert_same(disturbed, quiet)

    rows = server.wait_rows("select * from requests where client_request_id like 'killed-%'", count=len(asks))
    for row in rows:
        check_ledger(row)
        assert row["status"] == 200
        assert row["num_engine_restarts"] == 2
        assert row["engine_restart_seconds"] > 0.1
        assert row["num_generated_tokens"] == row["num_written_tokens"] == 24
    events = server.wait_rows("select * from engine_events where at_wall > ? order by at_wall", began, count=8)
    assert [event["kind"] for event in events] == ["crashed", "restarting", "started", "ready"] * 2
    assert [event["num_in_flight"] for event in events if event["kind"] == "crashed"] == [len(asks)] * 2
    metrics = server.metrics()
    assert metrics.value("engine_restarts_total") == 2
    assert metrics.value("engine_state", state="ready") == 1
    assert metrics.value("kv_used_blocks") == 0


async def test_a_stopped_engine_counts_as_hung_and_loses_no_token(small_server: ApplianceServer) -> None:
    """SIGSTOP in mid-step: past the step's deadline the engine is replaced, and streams go on to the text of a quiet run."""
    asks: list[dict[str, Any]] = [{"prompt": f"{index}: abc", "max_tokens": 1500, "seed": index, "ignore_eos": True} for index in range(4)]
    asks[0]["temperature"] = 0
    quiet = await run_all(small_server, asks, "quiet")

    async def stop(streams: list[Stream]) -> None:
        await asyncio.gather(*(stream.wait_tokens(20) for stream in streams))
        os.kill(small_server.engine_pid(), signal.SIGSTOP)

    assert_same(await run_all(small_server, asks, "stopped", stop), quiet)
    events = small_server.wait_rows("select kind, detail from engine_events order by at_wall", count=6)
    assert [row["kind"] for row in events] == ["started", "ready", "hung", "restarting", "started", "ready"]
    assert "deadline is 2 s" in events[2]["detail"]
    rows = small_server.wait_rows("select * from requests where client_request_id like 'stopped-%'", count=len(asks))
    for row in rows:
        check_ledger(row)
        assert row["num_engine_restarts"] == 1


async def test_requests_that_come_during_a_restart_wait_and_are_served(small_server: ApplianceServer) -> None:
    """A request sent while the engine is down is answered once it is back; its wait is in the ledger as the engine's restart."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:
        os.kill(small_server.engine_pid(), signal.SIGKILL)
        await asyncio.to_thread(small_server.wait_until, lambda: small_server.status("/ready") == 503, 10, "not ready")
        late = await run_stream(session, small_server.url, {"prompt": "late", "max_tokens": 5, "ignore_eos": True}, Stream(request_id="late"))
    assert late.status == 200
    assert len(late.token_ids) == 5
    (row,) = small_server.wait_rows("select * from requests where client_request_id = 'late'")
    check_ledger(row)
    assert row["engine_restart_seconds"] > 0.5 * row["duration_seconds"]
