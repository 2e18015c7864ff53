"""One line a request, with what is needed to find it again, and no text of a user."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SECRET = "the launch code is 0000"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def _ask(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 50, **more}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request_leaves_one_line(start_server: Any, log_lines: Any, stream: bool) -> None:
    """Id, key, model, status, tokens, times and end are in it, as the ledger has them."""
    lines = log_lines()
    server = await start_server(keys={"web": "sk-1"})
    headers = {"Authorization": "Bearer sk-1", "X-Request-Id": "mine-7"}
    async with server.session.post(server.url + CHAT, json=_ask(stream=stream), headers=headers) as response:
        assert response.status == 200
        await response.read()
    record = await server.record()
    (line,) = lines.requests()
    assert line["level"] == "info"
    assert line["request_id"] == record.id
    assert line["client_request_id"] == "mine-7"
    assert (line["key_id"], line["model"], line["endpoint"], line["stream"]) == ("web", "tiny", CHAT, stream)
    assert (line["status"], line["finish_reason"]) == (200, "stop")
    assert line["num_prompt_tokens"] == record.num_prompt_tokens > 0
    assert line["num_generated_tokens"] == line["num_written_tokens"] == len("Hello!") + 1
    assert line["ttft_seconds"] == pytest.approx(record.ttft_seconds, abs=1e-6)
    assert line["duration_seconds"] == pytest.approx(record.duration_seconds, abs=1e-6)
    assert "error_code" not in line
    assert "trace_id" not in line


async def test_no_text_of_a_user_reaches_the_log(server: Any, log_lines: Any) -> None:
    """Neither prompt nor output is in any line, at the most talkative level, of good and bad requests."""
    lines = log_lines(level="debug")
    await server.post(CHAT, _ask())
    await server.post(CHAT, _ask(temperature=99))
    await server.post(COMPLETIONS, {"prompt": SECRET, "max_tokens": 20, "n": 2})
    await server.record(3)
    assert len(lines.requests()) == 3
    assert "launch" not in lines.stream.getvalue()
    assert "Hello!" not in lines.stream.getvalue()


async def test_prompts_are_logged_where_a_setting_asks_for_it(start_server: Any, log_lines: Any) -> None:
    """The prompt as the model saw it, and every choice's text."""
    lines = log_lines(prompts=True)
    server = await start_server(log={"prompts": True})
    await server.post(COMPLETIONS, {"prompt": [SECRET, "b"], "max_tokens": 20, "n": 2})
    (line,) = lines.requests()
    assert line["prompts"] == [SECRET, "b"]
    assert line["outputs"] == ["Hello!"] * 4


async def test_refused_and_broken_requests_leave_one_line_each(start_server: Any, log_lines: Any) -> None:
    """A wrong key, a bad body, an unknown path and a fault of ours: one line each, with the code."""
    lines = log_lines()
    server = await start_server(keys={"web": "sk-1"})
    good = {"Authorization": "Bearer sk-1"}
    await server.post(CHAT, _ask())
    await server.post(CHAT, b"{nonsense", **good)
    await server.get("/nowhere%0Aforged", **good)
    server.engine.refusal = ZeroDivisionError("boom")
    await server.post(CHAT, _ask(), **good)
    refused, bad, unknown, fault = lines.requests()
    assert (refused["status"], refused["message"]) == (401, f"POST {CHAT} 401")
    assert (bad["status"], bad["finish_reason"], bad["key_id"]) == (400, "error", "web")
    assert (unknown["status"], unknown["message"]) == (404, "GET /nowhere%0Aforged 404")
    assert (fault["status"], fault["error_code"]) == (500, "internal_error")
    assert len({line["request_id"] for line in (refused, bad, unknown, fault)}) == 4


async def test_a_client_that_leaves_leaves_a_line(server: Any, log_lines: Any) -> None:
    """Status 499 and what had been generated."""
    lines = log_lines()
    server.engine.script = None
    asking = asyncio.create_task(server.post(CHAT, _ask(stream=True)))
    (await server.generation()).put([65, 66])
    await server.until(lambda: any(call[0] == "first_token" for call in server.observer.calls))
    asking.cancel()
    await server.record()
    await server.until(lambda: lines.requests())
    (line,) = lines.requests()
    assert (line["status"], line["finish_reason"], line["error_code"]) == (499, "abort", "client_disconnected")
    assert line["num_generated_tokens"] == 2


async def test_probes_and_scrapes_are_lines_at_debug_only(server: Any, log_lines: Any) -> None:
    """A probe every second must not drown the rest, a refused one included."""
    lines = log_lines()
    server.engine.state = "restarting"
    async with server.session.get(server.url + "/metrics") as response:
        assert response.status == 200
    assert [(await server.get(path))[0] for path in ("/ready", "/v1/models")] == [503, 200]
    assert lines.requests() == []
    lines = log_lines(level="debug")
    await server.get("/ready")
    assert [line["status"] for line in lines.requests()] == [503]


async def test_above_info_no_line_is_built(server: Any, log_lines: Any) -> None:
    """Who wants warnings gets no line for each request."""
    lines = log_lines(level="warning")
    await server.post(CHAT, _ask())
    assert lines.all() == []


async def test_the_callers_trace_is_in_the_line_and_goes_back(server: Any, log_lines: Any) -> None:
    """traceparent's trace id is kept; the span id is ours, and the flag says that nothing is recorded here."""
    lines = log_lines()
    _, _, headers = await server.post(CHAT, _ask(), traceparent=PARENT)
    (line,) = lines.requests()
    assert line["trace_id"] == PARENT.split("-")[1]
    assert headers["traceresponse"] == f"00-{line['trace_id']}-{line['span_id']}-00"
    assert line["span_id"] != PARENT.split("-")[2]
    assert headers["X-Request-Id"] == line["request_id"]


async def test_a_malformed_traceparent_is_ignored(server: Any, log_lines: Any) -> None:
    """The request is served, without a trace."""
    lines = log_lines()
    for bad in ("nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", PARENT + "-more"):
        status, _, headers = await server.post(CHAT, _ask(), traceparent=bad)
        assert status == 200
        assert "traceresponse" not in headers
    assert all("trace_id" not in line for line in lines.requests())


async def test_console_lines_are_one_line_each(server: Any, log_lines: Any) -> None:
    """For people: what, status and end first, the rest as key=value."""
    lines = log_lines(format="console")
    await server.post(CHAT, _ask())
    (text,) = lines.stream.getvalue().splitlines()
    assert re.match(rf"\d\d:\d\d:\d\d {CHAT} 200 stop  request_id=[0-9a-f-]{{36}}  model=tiny", text)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
