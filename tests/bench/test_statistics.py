"""The definitions of the figures."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.records import Outcome
from appliance.bench.statistics import percentile, summarise


def outcome(start: float, *times: float, tokens: int | None = None, error: str | None = None) -> Outcome:
    """A request sent at `start` whose chunks came at `times`."""
    gaps = [b - a for a, b in itertools.pairwise(times)]
    first, last = (times[0], times[-1]) if times else (0.0, 0.0)
    return Outcome(
        0, start, first_at=first, last_at=last, gaps=gaps, num_chunks=len(times), num_prompt_tokens=10, num_output_tokens=tokens, error=error
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    """Linear interpolation, as numpy.percentile does by default."""
    import numpy as np

    assert percentile(sorted(values), share) == pytest.approx(float(np.percentile(values, share * 100)), rel=1e-9, abs=1e-6)


def test_latencies_follow_vllms_definitions() -> None:
    """TTFT, each gap, (e2e - TTFT) / (n - 1) with n by usage, and throughput over the wall time of the level."""
    report = summarise([outcome(100.0, 100.5, 100.7, 101.5, tokens=5), outcome(101.0, 102.0, 104.0, tokens=2)], concurrency=2, request_rate=None)
    assert report.ttft is not None
    assert report.ttft.mean == pytest.approx(0.75)
    assert report.tpot is not None
    assert report.tpot.mean == pytest.approx(((101.5 - 100.5) / 4 + 2.0) / 2)
    assert report.itl is not None
    assert (report.itl.num_samples, report.itl.max) == (3, pytest.approx(2.0))
    assert report.e2e is not None
    assert report.e2e.max == pytest.approx(3.0)
    assert report.duration_seconds == pytest.approx(4.0)
    assert report.output_tokens_per_second == pytest.approx(7 / 4)
    assert report.total_tokens_per_second == pytest.approx(27 / 4)
    assert report.requests_per_second == pytest.approx(0.5)


def test_failed_requests_count_but_give_no_latency() -> None:
    """A failure is in the counts and its reason in the report; no figure is made of it."""
    report = summarise(
        [outcome(1.0, 2.0, tokens=1), outcome(1.0, error="HTTP 503"), outcome(1.0, error="HTTP 503")], concurrency=1, request_rate=None
    )
    assert (report.num_requests, report.num_failed, report.errors) == (3, 2, {"HTTP 503": 2})
    assert report.ttft is not None
    assert report.ttft.num_samples == 1
    assert report.tpot is None


def test_nothing_gives_no_figures() -> None:
    """With every request failed there is nothing to measure, and no division by zero."""
    report = summarise([outcome(1.0, error="x")], concurrency=1, request_rate=None, ceiling_events_per_second=100.0)
    assert (report.ttft, report.e2e, report.output_tokens_per_second) == (None, None, 0.0)


def test_chunks_stand_in_for_a_missing_usage() -> None:
    """A server without usage is measured by its chunks, and the report says so."""
    report = summarise([outcome(0.0, 1.0, 2.0, 3.0)], concurrency=1, request_rate=None)
    assert (report.num_output_tokens, report.usage_missing) == (3, True)


@pytest.mark.parametrize(("ceiling", "claimable"), [(6.1, True), (5.9, False), (None, None)])
def test_what_is_above_half_of_the_ceiling_is_not_claimable(ceiling: float | None, claimable: bool | None) -> None:
    """Three events a second need a client that can see six."""
    report = summarise([outcome(0.0, 0.5, 0.7, 1.0, tokens=3)], concurrency=1, request_rate=None, ceiling_events_per_second=ceiling)
    assert report.claimable is claimable


def test_an_open_loop_tells_how_late_it_sent() -> None:
    """The lag is reported for arrivals by rate only."""
    late = outcome(0.0, 1.0, tokens=1)
    late.lag_seconds = 0.3
    assert summarise([late], concurrency=None, request_rate=2.0).send_lag_p99_seconds == pytest.approx(0.3)
    assert summarise([late], concurrency=4, request_rate=None).send_lag_p99_seconds is None
