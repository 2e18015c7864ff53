"""The queue's live signals: predicted time to first token, and demand in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from appliance.clock import ManualClock
from appliance.events import EngineEvent, RequestRecord, StepStats
from appliance.metrics.forecast import QueueForecast
from appliance.metrics.recorder import Recorder
from appliance.metrics.window import History

MakeStats = Callable[..., StepStats]


def _prefill(make_stats: MakeStats, **changes: object) -> StepStats:
    plain: dict[str, object] = {"num_prefill_tokens": 500, "busy_seconds": 0.1, "prefix_query_tokens": 500, "prefix_hit_tokens": 0, "num_waiting": 0}
    return make_stats(**(plain | changes))


def _predict(forecast: QueueForecast, stats: StepStats, *, ends_per_second: float = 0.0, max_num_seqs: int = 64, age: float = 0.0) -> float:
    ends = msgspec.structs.replace(History(30.0, 0.0).stats(30.0, 100.0), seconds=30.0, num_requests=round(30 * ends_per_second))
    return forecast.ttft_seconds(stats, age, max_num_seqs, ends)


def test_the_backlog_over_the_measured_rate(make_stats: MakeStats) -> None:
    """At 5,000 tokens/s a backlog of 10,000 tokens and a usual prompt of 500 are 2.1 s."""
    forecast = QueueForecast()
    forecast.on_request(500, 20, 2.0)
    for _ in range(20):
        forecast.on_step(_prefill(make_stats))
    assert forecast.prefill_tokens_per_second == pytest.approx(5000)
    assert _predict(forecast, _prefill(make_stats, num_backlog_tokens=10_000)) == pytest.approx(2.1)


def test_what_the_prefix_cache_holds_is_not_computed(make_stats: MakeStats) -> None:
    """Where three of four prompt tokens are found, the backlog weighs a quarter."""
    forecast = QueueForecast()
    for _ in range(20):
        forecast.on_step(_prefill(make_stats, prefix_query_tokens=2000, prefix_hit_tokens=1500))
    assert _predict(forecast, _prefill(make_stats, num_backlog_tokens=10_000)) == pytest.approx(0.5)


def test_a_full_batch_is_left_at_the_rate_of_ends(make_stats: MakeStats) -> None:
    """Nine waiting for places that fall free twice a second: the tenth waits 5 s, however fast prompts are computed."""
    forecast = QueueForecast()
    forecast.on_step(_prefill(make_stats))
    full = _prefill(make_stats, num_running=64, num_waiting=9, num_backlog_tokens=100)
    assert _predict(forecast, full, ends_per_second=2.0) == pytest.approx(5.0)
    between = _prefill(make_stats, num_running=62, num_waiting=11, num_backlog_tokens=100)  # two have just ended and two are about to be let in
    assert _predict(forecast, between, ends_per_second=2.0) == pytest.approx(5.0)
    roomy = _prefill(make_stats, num_running=30, num_waiting=9, num_backlog_tokens=100)
    assert _predict(forecast, roomy, ends_per_second=2.0) == pytest.approx(100 / 5000)
    blocked = _prefill(make_stats, num_running=10, num_waiting=9, num_backlog_tokens=100, num_prefill_tokens=0)  # no room in the KV pool
    assert _predict(forecast, blocked, ends_per_second=2.0) == pytest.approx(5.0)
    assert _predict(forecast, blocked, age=7.0) == pytest.approx(7.0)  # nothing has ended yet


def test_a_few_ends_are_no_rate(make_stats: MakeStats) -> None:
    """Before enough have ended, 64 that each take 8 s free eight places a second: the tenth in the queue waits 1.25 s."""
    forecast = QueueForecast()
    forecast.on_step(_prefill(make_stats))
    forecast.on_request(0, 20, 8.0)
    full = _prefill(make_stats, num_running=64, num_waiting=9, num_backlog_tokens=100)
    assert _predict(forecast, full, ends_per_second=0.1) == pytest.approx(1.25)


def test_what_the_engine_has_not_heard_of_counts(make_stats: MakeStats) -> None:
    """Requests let in while a step runs are ahead of the next one, until the engine's report has them."""
    forecast = QueueForecast()
    forecast.on_step(_prefill(make_stats))
    for _ in range(10):
        forecast.on_admitted(500)
    idle = _prefill(make_stats, num_backlog_tokens=0, num_running=0)
    assert _predict(forecast, idle) == pytest.approx(1.0)
    forecast.on_report()
    assert _predict(forecast, idle) == 0


def test_the_rate_follows_the_recent_past(make_stats: MakeStats) -> None:
    """After a minute of slower steps the old rate is forgotten."""
    forecast = QueueForecast()
    for _ in range(100):
        forecast.on_step(_prefill(make_stats))
    for _ in range(300):
        forecast.on_step(_prefill(make_stats, busy_seconds=0.2))
    assert forecast.prefill_tokens_per_second == pytest.approx(2500, rel=0.02)


def test_before_anything_was_measured_the_queue_speaks(recorder: Recorder, engine: Any, clock: ManualClock, make_stats: MakeStats) -> None:
    """An idle server that never served predicts nothing; one whose engine is down, the age of the oldest waiting request at least."""
    assert recorder.predicted_ttft_seconds(clock.monotonic()) == 0
    engine.state, engine.num_in_flight = "restarting", 3
    recorder.on_engine_event(EngineEvent("crashed", 0.0, "", 1, 3))
    clock.advance(4.0)
    assert recorder.predicted_ttft_seconds(clock.monotonic()) == pytest.approx(4.0)


def test_a_simulated_queue_waits_as_predicted(make_stats: MakeStats) -> None:
    """First come, first served at 4,000 tokens/s: what is predicted at arrival is within a step of what the request then waits."""
    forecast, step_tokens, rate = QueueForecast(), 400, 4000.0
    forecast.on_request(300, 20, 2.0)
    arrivals = [(0.02 * number, 300) for number in range(100)]
    predicted: list[float] = []
    actual: list[float] = []
    now, queue, stats = 0.0, list[list[float]](), _prefill(make_stats, num_prefill_tokens=400, num_backlog_tokens=0)
    forecast.on_step(stats)
    while arrivals or queue:
        while arrivals and arrivals[0][0] <= now:
            at, tokens = arrivals.pop(0)
            backlog = sum(left for _, left in queue)
            predicted.append(_predict(forecast, _prefill(make_stats, num_backlog_tokens=int(backlog))))
            queue.append([at, float(tokens)])
        if not queue:
            now = arrivals[0][0]
            continue
        budget = float(step_tokens)
        now += step_tokens / rate
        while queue and budget > 0:
            taken = min(budget, queue[0][1])
            budget -= taken
            queue[0][1] -= taken
            if queue[0][1] == 0:
                actual.append(now - queue.pop(0)[0])
        forecast.on_step(_prefill(make_stats, num_prefill_tokens=int(step_tokens - budget), busy_seconds=step_tokens / rate))
    late = [a - p for a, p in zip(actual, predicted, strict=True)]
    assert max(actual) > 3.0
    assert all(abs(error) <= 2 * step_tokens / rate + 0.1 * a for error, a in zip(late, actual, strict=True))


def test_demand_is_what_was_let_in(recorder: Recorder, engine: Any, clock: ManualClock, make_record: Callable[..., RequestRecord]) -> None:
    """Prompt tokens as they are; output tokens at most what requests usually have, not the limit that clients name."""
    for _ in range(200):
        recorder.on_request(make_record(num_generated_tokens=50))
    clock.advance(60)
    for _ in range(10):
        recorder.on_admitted(100, 4000)
        recorder.on_admitted(100, 20)
    text = recorder.exposition()[0].decode()
    seconds = recorder.snapshot().fast.seconds
    values = dict(line.split(" ") for line in text.splitlines() if line.startswith("appliance_demand"))
    assert float(values["appliance_demand_prompt_tokens_per_second"]) == pytest.approx(2000 / seconds)
    assert float(values["appliance_demand_output_tokens_per_second"]) == pytest.approx((10 * 50 + 10 * 20) / seconds)
