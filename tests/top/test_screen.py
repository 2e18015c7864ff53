"""The screen at every size: nothing wraps, nothing overflows, and what matters most stays."""

from __future__ import annotations

import io
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from appliance.top.figures import Figures, Gpu
from appliance.top.screen import screen, spark

GPU = Gpu(
    index="0",
    name="NVIDIA H100 80GB HBM3",
    utilisation=0.87,
    memory_used_bytes=70 * 2.0**30,
    memory_bytes=80 * 2.0**30,
    power_watts=612.3,
    temperature_celsius=71.0,
    throttled=("hw_thermal", "sw_power_cap"),
)


def _figures(**changes: Any) -> Figures:
    known: dict[str, Any] = dict.fromkeys(Figures.__struct_fields__, 0.5)
    text = {"url": "http://127.0.0.1:8000", "model": "SmolLM2-135M-Instruct", "instance_id": "node-7", "version": "0.1.0", "device": "cuda"}
    known |= text | {"engine_state": "ready", "gpus": (), "scaling_pinned": False, "store_available": True, "uptime_seconds": 93_784.0}
    return msgspec.convert(known | changes, Figures)


def _unknown() -> Figures:
    """A server that has just been looked at once, and exports little."""
    nothing: dict[str, Any] = {
        name: None for name, kind in Figures.__annotations__.items() if "None" in str(kind) and name not in ("url", "at_wall", "gpus")
    }
    return _figures(**nothing)


REQUESTS = [
    {
        "record": {
            "id": f"01900000-0000-7000-8000-{index:012d}",
            "received_wall": 1_700_000_000.0,
            "status": 200 if index else 500,
            "num_prompt_tokens": 12345,
            "num_generated_tokens": 678,
            "ttft_seconds": 0.123,
            "duration_seconds": 4.56,
            "finish_reason": "stop",
            "key_id": "web\nx",
        },
        "good": True,
    }
    for index in range(8)
]
DECISIONS = [{"decision": {"at_wall": 1.0, "direction": "up", "current_replicas": 1, "desired_replicas": 2, "reason": "the queue\nis long " * 20}}]


def draw(figures: Figures | None, width: int, height: int, **more: Any) -> list[str]:
    """The lines that a terminal of this size shows."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, color_system=None)
    console.print(screen(figures, width=width, height=height, url="http://127.0.0.1:8000", **more))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    return list(output.removesuffix("\n").split("\n"))


@given(width=st.integers(1, 300), height=st.integers(1, 100), away=st.sampled_from([None, "Connection refused"]), gpus=st.integers(0, 9))
def test_it_fits_every_terminal(width: int, height: int, away: str | None, gpus: int) -> None:
    """No line is too long, there are no more than there is room for, and the first says what this is."""
    lines = draw(_figures(gpus=(GPU,) * gpus), width, height, away=away, requests=REQUESTS, decisions=DECISIONS, rates=[1.0, 2.0])
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert lines[0][:3] == "SmolLM2"[: min(3, width - 1)] or width < 4


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (36, 12), (200, 10)])
def test_the_most_important_comes_first(width: int, height: int) -> None:
    """Traffic and latency are there where anything is."""
    text = "\n".join(draw(_figures(), width, height))
    assert "Traffic" in text
    assert "output" in text
    assert "TTFT p50, p95" in text


def test_a_large_screen_shows_everything() -> None:
    """Every card, the requests and the decisions."""
    lines = draw(_figures(gpus=(GPU,)), 150, 50, requests=REQUESTS, decisions=DECISIONS, rates=[5.0])
    text = "\n".join(lines)
    for part in (
        "Traffic",
        "Latency",
        "Queue",
        "Goodput",
        "KV cache",
        "GPU 0 H100 80GB HBM3",
        "Engine",
        "Scale and store",
        "Last requests",
        "1 -> 2",
    ):
        assert part in text, part
    assert "throttled: hw_thermal, sw_power_cap" in text
    assert "up 1 d 2 h" in text
    assert sum("stop" in line for line in lines) == 8


def test_without_a_gpu_there_is_the_cpu() -> None:
    """And no GPU card."""
    text = "\n".join(draw(_figures(), 120, 40))
    assert "CPU" in text
    assert "GPU" not in text


def test_what_is_not_known_is_a_dash() -> None:
    """No zero is made up, nothing is raised."""
    text = "\n".join(draw(_unknown(), 120, 40))
    assert "None" not in text
    assert re.search(r"TTFT p50, p95 +-, -", text)
    assert "off" in text


def test_a_server_that_is_away_is_said_so() -> None:
    """Without figures from before, and over those that are old."""
    lines = draw(None, 80, 24, away="Connection refused")
    assert lines == ["http://127.0.0.1:8000", "no answer: Connection refused (trying again)"]
    lines = draw(_figures(), 80, 24, away="Connection refused")
    assert lines[1].startswith("no answer: Connection refused")
    assert "Traffic" in "\n".join(lines)


def test_sparks_are_scaled_to_their_highest() -> None:
    """The newest that fit; zero is empty; ASCII where the terminal knows no more."""
    assert spark([], 5) == ""
    assert spark([0.0, 0.0], 5) == "  "
    assert spark([9.0, 0.0, 1.0, 4.0, 8.0], 4) == " ▁▄█"
    assert spark([0.0, 4.0, 8.0], 4, unicode=False) == " =@"
