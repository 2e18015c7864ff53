"""The live windows: exact counts, quantiles within 2 %, time-weighted means, and None where there is no data."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.metrics.window import History

START = 1_000.25  # not on a bucket's boundary


def test_nothing_seen_is_none_not_zero() -> None:
    """A history without data has zero counts and no statistics."""
    stats = History(300, START).stats(30, START + 100)
    assert (stats.num_requests, stats.output_tokens_per_second) == (0, 0)
    missing = ("ttft_p50_seconds", "tpot_p95_seconds", "ttft_attainment", "goodput", "mean_running", "max_kv_utilisation", "max_waiting_age_seconds")
    assert [getattr(stats, name) for name in missing] == [None] * len(missing)


@settings(deadline=None)
@given(st.lists(st.floats(min_value=1e-4, max_value=600), min_size=1, max_size=200))
def test_quantiles_are_within_two_percent(values: list[float]) -> None:
    """p50 and p95 by nearest rank are off by 2 % at most, and attainment is exact."""
    history = History(300, START)
    for index, value in enumerate(values):
        history.on_ttft(START + index * 0.1, value, value <= 0.5)
    stats = history.stats(300, START + len(values) * 0.1)
    ordered = sorted(values)
    for share, got in ((0.5, stats.ttft_p50_seconds), (0.95, stats.ttft_p95_seconds)):
        assert got == pytest.approx(ordered[math.ceil(share * len(ordered)) - 1], rel=0.021)
    assert stats.ttft_attainment == sum(value <= 0.5 for value in values) / len(values)


def test_rates_are_over_the_time_that_was_seen() -> None:
    """Ten seconds after the start a window of 300 divides by ten seconds; later by its own length, to a bucket."""
    history = History(300, START)
    for second in range(10):
        history.on_output(START + second, 100)
    assert history.stats(300, START + 10).output_tokens_per_second == pytest.approx(100)
    assert history.stats(300, START + 10).seconds == pytest.approx(10)
    assert 299 <= history.stats(300, START + 1000).seconds <= 300
    assert history.stats(300, START + 1000).output_tokens_per_second == 0


def test_gauges_are_weighted_by_time() -> None:
    """Eight running for 9 s and none for 1 s is a mean of 7.2, however many steps there were; a gauge holds while nothing is reported."""
    history = History(300, START)
    for index in range(900):
        history.on_step(START + index * 0.01, 8, 2, 0.5, 0.8)
    history.on_step(START + 9, 0, 0, 0.0, 0.0)
    stats = history.stats(30, START + 10)
    assert stats.mean_running == pytest.approx(7.2)
    assert stats.mean_waiting == pytest.approx(1.8)
    assert stats.mean_kv_utilisation == pytest.approx(0.72)
    assert (stats.max_kv_utilisation, stats.max_waiting_age_seconds) == (0.8, 0.5)
    idle = history.stats(30, START + 100)
    assert (idle.mean_running, idle.max_kv_utilisation) == (0, 0)


def test_a_gone_engine_has_no_gauges() -> None:
    """After `release` nothing is held, so a window after it has no data, not zero."""
    history = History(300, START)
    history.on_step(START, 8, 0, 0.0, 0.5)
    history.release(START + 5)
    assert history.stats(30, START + 10).mean_running == pytest.approx(8)
    assert history.stats(3, START + 100).mean_running is None


def test_a_long_idle_time_costs_no_more_than_the_window() -> None:
    """A day without a step fills the window once, not a day of buckets."""
    history = History(300, START)
    history.on_step(START, 3, 0, 0.0, 0.5)
    assert history.stats(30, START + 86_400).mean_running == pytest.approx(3)
    assert len(history._buckets) <= 302


def test_memory_is_bounded() -> None:
    """Buckets are those of the longest window, coarser where that is a day."""
    history = History(86_400, START)
    for index in range(20_000):
        history.on_output(START + index * 10, 1)
    assert len(history._buckets) <= 3602
    assert history.stats(86_400, START + 200_000).output_tokens_per_second == pytest.approx(0.1, rel=0.01)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 9)), min_size=1, max_size=60))
def test_held_time_is_the_time_that_passed(steps: list[tuple[float, int]]) -> None:
    """Whatever the steps' distances, the gauge integral equals the plain sum."""
    history = History(1000, START)
    now, total, held = START, 0.0, 0
    for gap, running in steps:
        total += held * gap
        now += gap
        history.on_step(now, running, 0, 0.0, 0.0)
        held = running
    total += held * 2.0
    span = now + 2.0 - START - steps[0][0]
    mean = history.stats(1000, now + 2.0).mean_running
    assert mean == pytest.approx(total / span, abs=1e-6)
