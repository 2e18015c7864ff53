"""OpenTelemetry spans of requests, as the SDK's in-memory exporter gets them, and once over real OTLP."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from appliance.clock import SystemClock
from appliance.engine.wire import SequenceEvent
from appliance.otel import MAX_PHASES, OtelTracing
from appliance.tracing import open_tracing

CHAT = "/v1/chat/completions"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ASK = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 50, "seed": 3}


class Spans:
    """Tracing into memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = OtelTracing(SimpleSpanProcessor(self._exporter), instance_id="node", fleet="blue", version="1.2")

    def all(self) -> list[ReadableSpan]:
        """In the order of their ends: children first."""
        return list(self._exporter.get_finished_spans())

    def servers(self) -> list[ReadableSpan]:
        """One a request."""
        return [span for span in self.all() if span.kind is SpanKind.SERVER]

    def phases(self, server: ReadableSpan) -> list[ReadableSpan]:
        """The children of a request's span."""
        return [span for span in self.all() if span.parent is not None and span.parent.span_id == server.context.span_id]


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Closed at the end."""
    spans = Spans()
    yield spans
    spans.tracing.close()


async def test_a_request_is_one_server_span_with_its_phases(start_server: Any, spans: Spans) -> None:
    """Conventions' attributes on the span; its children follow one another without gaps from receipt to the last byte, as the ledger sums them."""
    server = await start_server(tracing=spans.tracing, keys={"web": "sk-1"})
    server.engine.script = None
    asking = asyncio.create_task(server.post(CHAT, ASK, Authorization="Bearer sk-1"))
    generation = await server.generation()
    for kind, ids in (("scheduled", None), ("prefilled", [65, 66]), (None, [67])):
        events = [SequenceEvent(generation.sequence_id, kind, SystemClock().monotonic())] if kind else None
        generation.put(ids, events=events)
        await asyncio.sleep(0.005)
    generation.put([0], finish="stop")
    status, _, headers = await asking
    assert status == 200
    record = await server.record()
    (span,) = spans.servers()
    assert span.name == "chat tiny"
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert headers["traceresponse"] == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    attributes = dict(span.attributes or {})
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "appliance",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.time_to_first_chunk": record.ttft_seconds,
        "http.response.status_code": 200,
        "http.route": CHAT,
        "appliance.key_id": "web",
        "appliance.request_id": record.id,
    }
    assert {name: attributes.get(name) for name in expected} == expected
    assert "secret" not in str(attributes)
    assert not any(value is None for value in attributes.values())
    resource = span.resource.attributes
    assert (resource["service.name"], resource["service.instance.id"], resource["service.version"]) == ("appliance", "node", "1.2")

    phases = spans.phases(span)
    assert [phase.name for phase in phases] == [name for name, _ in itertools.groupby(phase.name for phase in phases)]
    names = [phase.name for phase in phases]
    assert names[:2] == ["received", "admitted"]
    assert names.index("queued") < names.index("prefill") < names.index("decode")
    for before, after in itertools.pairwise(phases):
        assert abs((after.start_time or 0) - (before.end_time or 0)) < 1_000
    assert abs((phases[0].start_time or 0) - (span.start_time or 0)) < 1_000
    assert abs((phases[-1].end_time or 0) - (span.end_time or 0)) < 1_000
    seconds = sum((phase.end_time or 0) - (phase.start_time or 0) for phase in phases) / 1e9
    assert seconds == pytest.approx(record.duration_seconds, abs=1e-5)
    decoded = sum((phase.end_time or 0) - (phase.start_time or 0) for phase in phases if phase.name == "decode") / 1e9
    assert decoded >= record.states["decode"] - 1e-6 > 0.004


async def test_the_callers_span_is_the_parent(start_server: Any, spans: Spans) -> None:
    """Trace id, parent and tracestate go on; the header that comes back names our span."""
    server = await start_server(tracing=spans.tracing)
    _, _, headers = await server.post(CHAT, ASK, traceparent=PARENT, tracestate="vendor=x")
    await server.record()
    (span,) = spans.servers()
    _, trace_id, parent_id, _ = PARENT.split("-")
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == parent_id
    assert span.parent.is_remote
    assert span.context.trace_state.get("vendor") == "x"
    assert headers["traceresponse"] == f"00-{trace_id}-{span.context.span_id:016x}-01"


async def test_a_caller_that_does_not_sample_is_heeded(start_server: Any, spans: Spans, log_lines: Any) -> None:
    """No span is kept, the trace id is in the log all the same."""
    lines = log_lines()
    server = await start_server(tracing=spans.tracing)
    _, _, headers = await server.post(CHAT, ASK, traceparent=PARENT[:-2] + "00")
    assert spans.all() == []
    assert headers["traceresponse"].endswith("-00")
    assert lines.requests()[0]["trace_id"] == PARENT.split("-")[1]


async def test_malformed_headers_begin_a_trace_of_ours(start_server: Any, spans: Spans) -> None:
    """Garbage in traceparent or tracestate costs no request."""
    server = await start_server(tracing=spans.tracing)
    for headers in ({"traceparent": "nonsense"}, {"traceparent": PARENT, "tracestate": "=,;" * 50}, {"tracestate": "a=1"}):
        assert (await server.post(CHAT, ASK, **headers))[0] == 200
    await server.record(3)
    first, second, third = spans.servers()
    assert first.parent is None
    assert second.parent is not None
    assert third.parent is None
    assert len({span.context.trace_id for span in (first, second, third)}) == 3


async def test_faults_and_departures_are_told_apart(start_server: Any, spans: Spans) -> None:
    """A fault of ours is an error; a mistake of the client and its leaving are not, but have their type."""
    server = await start_server(tracing=spans.tracing)
    await server.post(CHAT, {**ASK, "temperature": 99})
    server.engine.refusal = ZeroDivisionError("boom")
    await server.post(CHAT, ASK)
    server.engine.refusal, server.engine.script = None, None
    asking = asyncio.create_task(server.post(CHAT, {**ASK, "stream": True}))
    (await server.generation()).put([65])
    await server.until(lambda: any(call[0] == "first_token" for call in server.observer.calls))
    asking.cancel()
    await server.record(3)
    await server.until(lambda: len(spans.servers()) == 3)
    found = [(span.attributes or {}).get("http.response.status_code") for span in spans.servers()]
    codes = [span.status.status_code for span in spans.servers()]
    assert found == [400, 500, 499]
    assert codes == [StatusCode.UNSET, StatusCode.ERROR, StatusCode.UNSET]
    assert all((span.attributes or {})["error.type"] for span in spans.servers())


async def test_phases_are_bounded(start_server: Any, spans: Spans) -> None:
    """A sequence that alternates between its own and others' chunks does not make a thousand spans."""
    server = await start_server(tracing=spans.tracing)
    server.engine.script = None
    asking = asyncio.create_task(server.post(CHAT, ASK))
    generation = await server.generation()
    for index in range(300):
        kind = "prefill" if index % 2 else "prefill_wait"
        generation.put(events=[SequenceEvent(generation.sequence_id, kind, SystemClock().monotonic())])
    generation.put([65, 0], finish="stop")
    await asking
    record = await server.record()
    (span,) = spans.servers()
    assert len(spans.phases(span)) == MAX_PHASES
    assert (span.attributes or {})["appliance.num_phases_left_out"] > 200
    assert sum(record.states.values()) == pytest.approx(record.duration_seconds, abs=1e-6)


class _Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP endpoint."""

    bodies: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


async def test_an_endpoint_in_the_environment_gets_the_spans(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With OTEL_EXPORTER_OTLP_ENDPOINT set, closing sends what is left to a real HTTP collector."""
    bodies: list[tuple[str, bytes]] = []
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Collector", (_Collector,), {"bodies": bodies}))
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
        tracing = open_tracing("node", "blue", "1.2")
        server = await start_server(tracing=tracing)
        await server.post(CHAT, ASK)
        await server.record()
        await asyncio.to_thread(tracing.close)
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    assert [path for path, _ in bodies] == ["/v1/traces"]
    (resource,) = ExportTraceServiceRequest.FromString(bodies[0][1]).resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "ours"
    assert names["service.instance.id"] == "node"
    sent = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in sent if span.kind == span.SPAN_KIND_SERVER] == ["chat tiny"]
    assert len(sent) > 3


async def test_a_collector_that_is_away_costs_no_request(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: requests are served, and closing gives up within its limit."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing = open_tracing("node", "blue", "1.2")
    server = await start_server(tracing=tracing)
    assert (await server.post(CHAT, ASK))[0] == 200
    await server.record()
    async with asyncio.timeout(15):
        await asyncio.to_thread(tracing.close)
