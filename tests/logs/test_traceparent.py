"""W3C Trace Context: what is taken from a caller, what is not, and when spans are made at all."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.tracing import NO_TRACING, TraceContext, joined_tracestate, mint_span_id, open_tracing, parse_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # the random-trace-id flag of level 2
        (f" 00-{TRACE}-{SPAN}-02\t", False),
        (f"cc-{TRACE}-{SPAN}-01", True),  # a version of the future, with and without more fields
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
    ],
)
def test_well_formed_headers_are_taken(header: str, sampled: bool) -> None:
    """Ids and the sampled flag, whatever other flags say."""
    assert parse_traceparent([header]) == TraceContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-zz",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 1000}",
        f"00-{'٣' * 32}-{SPAN}-01",  # digits, but not ASCII
    ],
)
def test_malformed_headers_count_as_none(header: str) -> None:
    """Each rule of the format, broken."""
    assert parse_traceparent([header]) is None


def test_two_headers_count_as_none() -> None:
    """Nobody can tell which is meant."""
    assert parse_traceparent([f"00-{TRACE}-{SPAN}-01"] * 2) is None
    assert parse_traceparent([]) is None


@given(st.text(max_size=200))
def test_no_header_raises(text: str) -> None:
    """Whatever a stranger sends."""
    context = parse_traceparent([text])
    assert context is None or parse_traceparent([context.header]) == context


def test_a_header_goes_round() -> None:
    """What is written can be read."""
    context = TraceContext(TRACE, mint_span_id(), sampled=True)
    assert parse_traceparent([context.header]) == context


def test_a_tracestate_out_of_bounds_is_dropped() -> None:
    """Several headers are one list; eight thousand characters are enough."""
    assert joined_tracestate(["a=1", "b=2"]) == "a=1,b=2"
    assert joined_tracestate(["a=" + "x" * 9000]) == ""


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off_unless_an_endpoint_is_set(environ: dict[str, str]) -> None:
    """Off is the default, and the SDK's own switches turn it off too."""
    assert open_tracing("node", "fleet", "1", environ) is NO_TRACING


def test_a_missing_extra_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The endpoint is set, the packages are not there: said once, and the server serves."""
    monkeypatch.setitem(sys.modules, "appliance.otel", None)
    with caplog.at_level(logging.WARNING):
        assert open_tracing("node", "fleet", "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:pw@127.0.0.1:1"}) is NO_TRACING
    assert "inference-appliance[otel]" in caplog.text
    assert "pw" not in caplog.text


def test_nothing_of_opentelemetry_is_imported_where_it_is_off() -> None:
    """A fresh interpreter that has loaded the server's side and opened tracing knows no opentelemetry."""
    code = (
        "import sys, appliance.app, appliance.api.app, appliance.tracing as t; assert t.open_tracing('n', 'f', '1', {}) is t.NO_TRACING;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
