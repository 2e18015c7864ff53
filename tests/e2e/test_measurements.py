"""What was measured is told the same way three times: to the client, to Prometheus and to SQL."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
from appliance_server import EXACT, STATE_COLUMNS, ApplianceServer, Stream, check_ledger, run_stream, serving


@pytest.fixture(scope="module")
def server(dummy_model: str, state_folder: Callable[[], Any]) -> Iterator[ApplianceServer]:
    """A tiny model whose pool is too small for its load, sampled ten times a second."""
    settings = {
        **EXACT,
        "model.path": dummy_model,
        "model.served_name": "tiny",
        "model.context_length": 512,
        "engine.max_num_seqs": 6,
        "engine.num_blocks": 34,
        "metrics.sample_seconds": 0.1,
        "store.flush_seconds": 0.1,
        "instance_id": "node-7",
        "fleet": "blue",
    }
    with serving(state_folder(), settings) as server:
        yield server


async def test_usage_metrics_and_sql_agree(server: ApplianceServer) -> None:
    """Prompt and output tokens of streams, whole replies, several choices, stop strings and errors are the same in all three accounts."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(100)) as session:

        async def whole(body: dict[str, Any]) -> dict[str, Any]:
            async with session.post(server.url + "/v1/completions", json=body) as response:
                return {"status": response.status, "usage": {}, **(await response.json())}

        prompts = [f"{index:02d} " + "abcdefgh" * (index % 7) for index in range(24)]
        streams = [
            run_stream(session, server.url, {"prompt": prompt, "max_tokens": 40 + 8 * index, "seed": index, "ignore_eos": True}, Stream())
            for index, prompt in enumerate(prompts)
        ]
        wholes = [whole({"prompt": [prompts[0], prompts[1]], "n": 3, "max_tokens": 30, "seed": 3, "logprobs": 2}) for _ in range(3)]
        stops = [whole({"prompt": prompts[2], "max_tokens": 200, "stop": ["a", "e"], "seed": seed}) for seed in range(4)]
        bad = [whole({"prompt": prompts[2], "max_tokens": 0})]
        streamed = await asyncio.gather(*streams)
        replies = await asyncio.gather(*wholes, *stops, *bad)
    assert all(stream.status == 200 and stream.done for stream in streamed)
    assert [reply["status"] for reply in replies] == [200] * 7 + [400]
    usages = [stream.usage or {} for stream in streamed] + [reply["usage"] for reply in replies[:-1]]
    num_prompt = sum(usage["prompt_tokens"] for usage in usages)
    num_output = sum(usage["completion_tokens"] for usage in usages)

    rows = server.wait_rows("select * from requests", count=len(streamed) + len(replies))
    assert len(rows) == len(streamed) + len(replies)
    assert sum(row["num_prompt_tokens"] for row in rows) == num_prompt
    assert sum(row["num_written_tokens"] for row in rows) == num_output
    metrics = server.metrics()
    assert metrics.value("prompt_tokens_total") == num_prompt
    assert metrics.value("written_tokens_total") == num_output
    num_generated = sum(row["num_generated_tokens"] for row in rows)
    assert metrics.value("generated_tokens_total") == num_generated
    assert num_output <= num_generated <= metrics.value("output_tokens_total")
    # Of what the engine sent, only what came behind a stop string reached no request.
    assert metrics.value("output_tokens_total") - num_generated <= metrics.value("surplus_tokens_total") + len(stops)
    assert metrics.value("requests_total", status="200") == len(usages)
    assert metrics.value("requests_total", status="400") == 1
    assert metrics.value("requests_received_total") == len(rows)
    assert metrics.value("request_generated_tokens_sum") == num_generated
    assert metrics.value("time_to_first_token_seconds_count") == len(usages)
    assert metrics.value("request_duration_seconds_count") == len(usages)
    choices = len(streamed) + 3 * 6 + len(stops)
    assert metrics.value("inter_token_latency_seconds_count") == metrics.value("output_tokens_total") - choices
    assert metrics.value("preemptions_total") > 0, "the pool was to be too small"
    assert metrics.value("preemptions_total") >= sum(row["num_preemptions"] for row in rows)
    assert metrics.value("kv_used_blocks") == metrics.value("requests_running") == metrics.value("requests_waiting") == 0


async def test_ledger_states_sum_to_the_duration(server: ApplianceServer) -> None:
    """In every row the exclusive states sum to the duration within 1 ms, and all rows together to the exported counter."""
    rows = server.wait_rows("select * from requests", count=30)
    for row in rows:
        check_ledger(row)
        assert (row["instance_id"], row["fleet"]) == ("node-7", "blue")
        if row["status"] == 200:
            assert row["ttft_seconds"] <= row["duration_seconds"]
            assert row["decode_seconds"] > 0
    metrics = server.metrics()
    for column in STATE_COLUMNS:
        state = column.removesuffix("_seconds")
        assert metrics.value("request_state_seconds_total", state=state) == pytest.approx(sum(row[column] for row in rows), abs=1e-6)
    assert sum(row["preempted_seconds"] for row in rows) > 0
    assert sum(row["queued_seconds"] for row in rows) > 0


async def test_samples_add_up_to_the_counters(server: ApplianceServer) -> None:
    """The samples' counts sum to the totals that Prometheus sees, and their times follow one another."""
    total = server.metrics().value("output_tokens_total")
    server.wait_until(lambda: sum(row["num_generated_tokens"] for row in server.sql("select * from samples")) >= total, 20, "samples caught up")
    metrics = server.metrics()
    samples = server.sql("select * from samples order by at_wall")
    assert sum(row["num_generated_tokens"] for row in samples) == total
    assert sum(row["num_requests"] for row in samples) == metrics.value("requests_total")
    assert sum(row["num_preemptions"] for row in samples) == metrics.value("preemptions_total")
    assert sum(row["num_steps"] for row in samples) <= metrics.value("engine_steps_total")
    for before, after in itertools.pairwise(samples):
        assert after["at_wall"] - before["at_wall"] == pytest.approx(after["period_seconds"], abs=0.05)
    assert samples[-1]["engine_state"] == "ready"
    assert samples[-1]["engine_resident_bytes"] > 50e6
    assert max(row["kv_utilisation"] or 0 for row in samples) > 0.5


async def test_a_scrape_tells_process_host_and_build(server: ApplianceServer) -> None:
    """Both processes and the host are in the exposition, as text and as OpenMetrics."""
    metrics = server.metrics()
    for process in ("server", "engine"):
        assert metrics.value("process_resident_bytes", process=process) > 30e6
        assert metrics.value("process_cpu_seconds_total", process=process) > 0.1
    assert metrics.value("host_memory_bytes") > 1e9
    assert metrics.value("build_info", model="tiny", instance_id="node-7", fleet="blue") == 1
    assert metrics.value("engine_info", device="cpu", dtype="float32") == 1
    assert metrics.value("engine_events_total", kind="ready") == 1
    status, text = server.get("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert status == 200
    assert text.endswith("# EOF\n")
    assert 'request_id="' in text, "no exemplar leads from a bucket to a ledger row"
    (event,) = server.sql("select * from engine_events where kind = 'ready'")
    assert event["pid"] == server.engine_pid()
