"""The trace that a request belongs to: W3C Trace Context in, the ids of our own span out. Spans themselves are made in `otel`, an extra.

Source: https://www.w3.org/TR/trace-context-2/. A header that is malformed counts as none, and starts no fault of its own.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.events import RequestRecord

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACEPARENT = 512  # a future version may append fields; none needs more
_MAX_TRACESTATE = 8192
_SAMPLED = 0x01
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Interval = tuple[str, float, float]  # a ledger state, and from when to when (CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A position in a trace: 32 and 16 lowercase hexadecimal digits, neither all zeros. `sampled`: whoever set it records the trace."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def header(self) -> str:
        """As `traceparent` and `traceresponse` carry it."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


class RequestTrace(Protocol):
    """The trace of one request, owned by its handler."""

    @property
    def context(self) -> TraceContext | None:
        """The ids of the server's own span; None where the request belongs to no trace."""

    def end(self, record: RequestRecord, intervals: Sequence[Interval]) -> None:
        """The request is over. Never raises on what a request held."""


class Tracing(Protocol):
    """Makes the traces of requests."""

    on: bool  # spans are recorded, and want the ledger's intervals

    def begin(self, traceparent: Sequence[str], tracestate: Sequence[str], request_id: str, received_at: float, received_wall: float) -> RequestTrace:
        """The trace of a request whose headers are read, from every header of these two names."""

    def close(self) -> None:
        """Send what is left, in a few seconds at most. Blocks: not for the event loop."""


@dataclass(frozen=True, slots=True)
class PassedTrace:
    """Nothing is recorded here; the caller's trace id still reaches the log and goes back."""

    context: TraceContext | None

    def end(self, record: RequestRecord, intervals: Sequence[Interval]) -> None:
        """Nothing to do."""


class NoTracing:
    """Tracing switched off."""

    on = False

    def begin(self, traceparent: Sequence[str], tracestate: Sequence[str], request_id: str, received_at: float, received_wall: float) -> PassedTrace:
        """The caller's trace with a span id of ours, or none."""
        parent = parse_traceparent(traceparent) if traceparent else None
        return _NO_TRACE if parent is None else PassedTrace(TraceContext(parent.trace_id, mint_span_id(), sampled=False))

    def close(self) -> None:
        """Nothing to send."""


_NO_TRACE = PassedTrace(None)
NO_TRACING = NoTracing()


def parse_traceparent(headers: Sequence[str]) -> TraceContext | None:
    """The caller's context; None unless there is exactly one well-formed header."""
    if len(headers) != 1 or len(headers[0]) > _MAX_TRACEPARENT:
        return None
    match = _TRACEPARENT.fullmatch(headers[0].strip(" \t"))
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def joined_tracestate(headers: Sequence[str]) -> str:
    """What vendors pass along, "" for none or too much of it."""
    joined = ",".join(headers)
    return joined if len(joined) <= _MAX_TRACESTATE else ""


def mint_span_id() -> str:
    """A random span id."""
    return f"{secrets.randbits(64) or 1:016x}"


def open_tracing(instance_id: str, fleet: str, version: str, environ: Mapping[str, str] = os.environ) -> Tracing:
    """Tracing as OpenTelemetry's own variables ask for it: on where an OTLP endpoint is set and the extra is installed, else off.

    Nothing of OpenTelemetry is imported where it is off.
    """
    endpoint = next((name for name in ENDPOINT_VARIABLES if environ.get(name)), None)
    if endpoint is None or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return NO_TRACING
    try:
        from appliance.otel import OtelTracing, otlp_processor
    except ImportError as error:
        logger.warning("%s is set, but traces need `pip install 'inference-appliance[otel]'` (%s): serving on without them", endpoint, error)
        return NO_TRACING
    logger.info("sending traces to %s", environ[endpoint].rpartition("@")[2])
    return OtelTracing(otlp_processor(environ), instance_id=instance_id, fleet=fleet, version=version)
