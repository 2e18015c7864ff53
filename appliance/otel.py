"""OpenTelemetry spans of requests, in the GenAI semantic conventions. Needs the extra `otel`; imported only where it is switched on.

One SERVER span a request, and below it one span for every interval of its ledger, with the times at which the states began and ended.
Attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/; what that has no name for is `appliance.*`. No text of a user.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, set_span_in_context
from opentelemetry.util.types import AttributeValue

from appliance.events import RequestRecord
from appliance.tracing import Interval, TraceContext, joined_tracestate, parse_traceparent

logger = logging.getLogger(__name__)

MAX_PHASES = 64  # child spans of one request: a sequence that waits for others' chunks changes its state with every step
_CLOSE_MILLISECONDS = 5_000
_PROVIDER = "appliance"
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_SERVER_ERROR = 500


def otlp_processor(environ: Mapping[str, str]) -> SpanProcessor:
    """Batches spans and sends them on a thread of its own, as OTLP over HTTP with the settings of OTEL_EXPORTER_OTLP_*. Raises ImportError."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        logger.warning("traces are sent as http/protobuf; OTEL_EXPORTER_OTLP_PROTOCOL=%s is not supported", protocol)
    return BatchSpanProcessor(OTLPSpanExporter())


class OtelTracing:
    """Tracing switched on. One thread (the event loop's) calls `begin` and `end`; the processor sends on its own."""

    on = True

    def __init__(self, processor: SpanProcessor, *, instance_id: str, fleet: str, version: str) -> None:
        ours = {"service.name": "appliance", "service.instance.id": instance_id, "service.version": version, "appliance.fleet": fleet}
        named = OTELResourceDetector().detect()  # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME, which go before ours
        self._provider = TracerProvider(resource=Resource.create(ours).merge(named), shutdown_on_exit=False)  # reads OTEL_TRACES_SAMPLER itself
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("appliance", version)

    def begin(self, traceparent: Sequence[str], tracestate: Sequence[str], request_id: str, received_at: float, received_wall: float) -> OtelTrace:
        """A SERVER span below the caller's, or the root of a trace."""
        parent = parse_traceparent(traceparent) if traceparent else None
        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(_remote(parent, tracestate)), Context())
        started = _nanoseconds(received_wall)
        span = self._tracer.start_span("request", context, SpanKind.SERVER, {"appliance.request_id": request_id}, start_time=started)
        return OtelTrace(self, span, received_at, received_wall)

    def phases(self, span: Span, intervals: Sequence[Interval], offset: float) -> None:
        """Child spans of `span`; `offset` seconds lead from CLOCK_MONOTONIC to Unix time."""
        context = set_span_in_context(span, Context())
        for state, began, ended in intervals[:MAX_PHASES]:
            child = self._tracer.start_span(state, context, SpanKind.INTERNAL, start_time=_nanoseconds(began + offset))
            child.end(_nanoseconds(ended + offset))

    def close(self) -> None:
        """Send what is left and end the processor's thread."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)
        self._provider.shutdown()


class OtelTrace:
    """The span of one request."""

    __slots__ = ("_offset", "_received_wall", "_span", "_tracing", "context")

    def __init__(self, tracing: OtelTracing, span: Span, received_at: float, received_wall: float) -> None:
        self._tracing = tracing
        self._span = span
        self._offset = received_wall - received_at
        self._received_wall = received_wall
        ids = span.get_span_context()
        self.context: TraceContext | None = TraceContext(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", ids.trace_flags.sampled)

    def end(self, record: RequestRecord, intervals: Sequence[Interval]) -> None:
        """Give the span its attributes and children, and end it with the record's last byte."""
        span = self._span
        if span.is_recording():
            span.update_name(f"{_operation(record)} {record.model}")
            span.set_attributes(attributes_of(record))
            if len(intervals) > MAX_PHASES:
                span.set_attribute("appliance.num_phases_left_out", len(intervals) - MAX_PHASES)
            if record.status >= _SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR, record.error_code))
            self._tracing.phases(span, intervals, self._offset)
        span.end(_nanoseconds(self._received_wall + record.duration_seconds))


def attributes_of(record: RequestRecord) -> dict[str, AttributeValue]:
    """What the conventions ask of a server's span, and the ledger's sums."""
    known: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": _operation(record),
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.id,
        "gen_ai.request.stream": record.stream,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.seed": record.seed,
        "gen_ai.request.choice.count": record.num_choices if record.num_choices != 1 else None,
        "gen_ai.response.finish_reasons": None if record.finish_reason is None else (record.finish_reason,),
        "gen_ai.response.time_to_first_chunk": record.ttft_seconds,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "http.request.method": "POST",
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "error.type": record.error_code,
        "appliance.key_id": record.key_id or None,
        "appliance.client_request_id": record.client_request_id,
        "appliance.num_written_tokens": record.num_written_tokens,
        "appliance.num_preemptions": record.num_preemptions,
        "appliance.num_engine_restarts": record.num_engine_restarts,
        "appliance.tpot_seconds": record.tpot_seconds,
        "appliance.max_itl_seconds": record.max_itl_seconds,
        "appliance.joules": record.joules,
    }
    states: dict[str, AttributeValue] = {f"appliance.state.{state}_seconds": seconds for state, seconds in record.states.items() if seconds}
    attributes = {name: value for name, value in known.items() if value is not None}
    return attributes | states


def _operation(record: RequestRecord) -> str:
    return _OPERATIONS.get(record.endpoint, "request")


def _remote(parent: TraceContext, tracestate: Sequence[str]) -> SpanContext:
    state = TraceState.from_header([joined_tracestate(tracestate)]) if tracestate else None
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags, trace_state=state)


def _nanoseconds(wall: float) -> int:
    return round(wall * 1e9)
