"""What counts as good, what as bad, and what is not judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from appliance.events import RequestRecord
from appliance.metrics.goodput import Judgement, Slo, choose_slo, judge
from appliance.settings import SloSettings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Judgement(True, True)),
        ({"ttft_seconds": 0.444, "tpot_seconds": 0.0333}, Judgement(True, True)),  # on the threshold
        ({"ttft_seconds": 0.5}, Judgement(False, True)),
        ({"tpot_seconds": 0.05}, Judgement(True, False)),
        ({"tpot_seconds": None}, Judgement(True, None)),  # one token
        ({"status": 500}, Judgement(False, False)),
        ({"status": 503, "ttft_seconds": None, "tpot_seconds": None}, Judgement(False, False)),
        ({"status": 504}, Judgement(False, False)),
        ({"status": 400}, Judgement(None, None)),
        ({"status": 429, "ttft_seconds": None}, Judgement(None, None)),
        ({"status": 499, "ttft_seconds": None, "tpot_seconds": None, "duration_seconds": 0.1}, Judgement(None, None)),  # left at once
        ({"status": 499, "ttft_seconds": None, "tpot_seconds": None, "duration_seconds": 5.0}, Judgement(False, None)),  # waited in vain
        ({"status": 499}, Judgement(True, True)),  # left in mid-stream, well served until then
        ({"endpoint": "/tokenize"}, Judgement(None, None)),
    ],
)
def test_judgement(changes: dict[str, object], expected: Judgement, slo: Slo, make_record: Callable[..., RequestRecord]) -> None:
    """Each end of a request is good, bad or not judged, as `judge` says."""
    assert judge(make_record(**changes), slo) == expected


@pytest.mark.parametrize(
    ("ttft", "tpot", "both"),
    [(True, True, True), (True, False, False), (False, True, False), (True, None, True), (False, None, False), (None, None, None)],
)
def test_both(ttft: bool | None, tpot: bool | None, both: bool | None) -> None:
    """Good on both, as far as judged."""
    assert Judgement(ttft, tpot).both is both


def test_defaults_depend_on_the_hardware() -> None:
    """A GPU promises more than a CPU; what is configured wins, one by one."""
    gpu, cpu = choose_slo(SloSettings(), "cuda"), choose_slo(SloSettings(), "cpu")
    assert gpu.ttft_seconds < cpu.ttft_seconds
    assert gpu.tpot_seconds < cpu.tpot_seconds
    assert "default of cpu" in cpu.reason
    mixed = choose_slo(SloSettings(ttft_seconds=7.0, target=0.9), "cpu")
    assert (mixed.ttft_seconds, mixed.tpot_seconds, mixed.target) == (7.0, cpu.tpot_seconds, 0.9)
