"""Ten minutes of everything at once: load, clients that leave, bad requests, kills and stops of the engine. At the end every account agrees."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from appliance_server import ApplianceServer, Stream, check_ledger, run_stream, serving

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]
SECONDS = float(os.environ.get("APPLIANCE_TEST_SOAK_SECONDS", "600"))
NUM_CLIENTS = 12
BAD = (
    b"{",
    b'{"prompt": 5.5}',
    b'{"prompt": "x", "n": 1000000}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": [99999999]}',
    b'{"prompt": "x", "model": "other"}',
    b'{"prompt": "\\ud800"}',
)


@dataclass
class Asked:
    """One request as its client saw it."""

    ask: dict[str, Any]
    stream: Stream
    left: bool


async def _client(server: ApplianceServer, seed: int, until: float, asked: list[Asked]) -> None:
    """One user: asks, reads, sometimes leaves in the middle, until time is up."""
    generator = random.Random(seed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
        while time.monotonic() < until:
            prompt = [generator.randrange(100, 49_000) for _ in range(generator.choice((3, 20, 100, 400)))]
            ask = {"prompt": prompt, "max_tokens": generator.randint(1, 60), "ignore_eos": True, "seed": generator.getrandbits(40)}
            ask["temperature"] = generator.choice((0, 0.7, 1.0))
            record = Asked(ask, Stream(request_id=f"soak-{seed}-{len(asked)}"), left=False)
            asked.append(record)
            running = asyncio.create_task(run_stream(session, server.url, ask, record.stream))
            if generator.random() < 0.25:
                await asyncio.wait({running}, timeout=generator.uniform(0, 2))
                record.left = not running.done()
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await asyncio.sleep(generator.uniform(0, 0.1))


async def _send_bad_ones(server: ApplianceServer, until: float) -> int:
    generator, count = random.Random(1), 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        while time.monotonic() < until:
            body = generator.choice(BAD)
            async with session.post(server.url + "/v1/completions", data=body, headers={"Content-Type": "application/json"}) as response:
                assert response.status in (400, 404), (body, await response.text())
            count += 1
            await asyncio.sleep(generator.uniform(0, 0.5))
    return count


async def _harm_the_engine(server: ApplianceServer, until: float) -> int:
    """A SIGKILL or SIGSTOP about every half minute, each once the engine serves again."""
    generator, count = random.Random(2), 0
    while time.monotonic() < until - 25:
        await asyncio.sleep(generator.uniform(10, 40))
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 200, 120, "ready again")
        os.kill(server.engine_pid(), generator.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
        count += 1
        await asyncio.to_thread(server.wait_until, lambda: server.status("/ready") == 503, 30, "the harm was noticed")
    return count


async def test_a_soak_ends_with_equal_accounts(embedded_model: Path, state_folder: Callable[[], Path]) -> None:
    """No request is lost or answered twice, and counters, SQL and the clients' own counts are the same; the block pool is whole."""
    settings = {
        "model.context_length": 1024,
        "engine.max_num_seqs": 8,
        "engine.num_blocks": 72,
        "engine.step_timeout_seconds": 10,
        "engine.max_restarts": 1000,
        "metrics.sample_seconds": 1,
    }
    with serving(state_folder(), settings) as server:
        until = time.monotonic() + SECONDS
        asked: list[Asked] = []
        clients = [_client(server, seed, until, asked) for seed in range(NUM_CLIENTS)]
        *_, num_bad, num_harms = await asyncio.gather(*clients, _send_bad_ones(server, until), _harm_the_engine(server, until))
        await asyncio.to_thread(server.wait_until, lambda: server.metrics().value("requests_in_flight") == 0, 30, "nothing in flight")

        for record in asked:
            if not record.left:
                assert record.stream.error is None, record
                assert record.stream.done, record
                assert len(record.stream.token_ids) == record.ask["max_tokens"], record
        # A client that left before its request was read whole leaves no row; every other one leaves exactly one.
        metrics = server.metrics()
        num_requests = int(metrics.value("requests_total"))
        rows = server.wait_rows("select * from requests", count=num_requests)
        assert len(rows) == num_requests == metrics.value("requests_received_total")
        by_name = {row["client_request_id"]: row for row in rows if row["client_request_id"]}
        assert len(by_name) == sum(1 for row in rows if row["client_request_id"]), "a request has two rows"
        for record in asked:
            row = by_name.get(record.stream.request_id)
            if row is None:
                assert record.left, record
                assert not record.stream.token_ids
            elif record.left:
                assert row["status"] in (200, 499), row
                assert row["num_written_tokens"] >= len(record.stream.token_ids)
            else:
                assert row["status"] == 200, row
                assert row["num_written_tokens"] == row["num_generated_tokens"] == len(record.stream.token_ids)
                assert row["num_prompt_tokens"] == len(record.ask["prompt"])
        for row in rows:
            check_ledger(row)
        assert sum(1 for row in rows if row["status"] in (400, 404)) == num_bad
        for status in {row["status"] for row in rows}:
            assert metrics.value("requests_total", status=str(status)) == sum(1 for row in rows if row["status"] == status)
        for column in ("prompt", "cached", "generated", "written"):
            assert metrics.value(f"{column}_tokens_total") == sum(row[f"num_{column}_tokens"] for row in rows), column

        events = [row["kind"] for row in server.wait_rows("select kind from engine_events", count=2 + 4 * num_harms)]
        assert events.count("crashed") + events.count("hung") == num_harms == metrics.value("engine_restarts_total")
        assert metrics.value("kv_used_blocks") == metrics.value("requests_running") == metrics.value("requests_waiting") == 0
        assert metrics.value("store_dropped_rows_total") == metrics.value("store_refused_rows_total") == 0
        assert sum(row["num_engine_restarts"] > 0 for row in rows) > 0
        assert metrics.value("preemptions_total") > 0, "the pool was to be too small for its load"
        num_left, num_preemptions = sum(record.left for record in asked), metrics.value("preemptions_total")
        print(f"{len(rows)} requests, {num_left} left, {num_bad} bad, {num_harms} harms, {num_preemptions:.0f} preemptions")
