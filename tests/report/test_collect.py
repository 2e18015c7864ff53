"""What a report reads from SQL, and what it makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.report.findings import capacity, findings
from appliance.report.options import time_range
from appliance.report.timeline import timeline_of
from appliance.store import queries
from appliance.store.rollup import roll_up

MIDNIGHT = 1_700_006_400.0


async def test_totals_are_those_of_the_ledger(collected: Any) -> None:
    """Requests, tokens, errors and cost of the range; its start is a whole hour."""
    data = await collected()
    assert data.since_wall == MIDNIGHT
    assert data.total.num_requests == 240 + 20 + 10 + 1
    assert data.total.num_errors == 10
    assert data.total.num_generated_tokens == 261 * 50
    assert [hour.usage.num_requests for hour in data.hours] == [60, 61, 60, 60, 30]
    web = next(key for key in data.keys if key.key_id == "web")
    assert web.cost == pytest.approx((web.usage.num_prompt_tokens - web.usage.num_cached_tokens) / 1e6 * 1 + web.usage.num_cached_tokens / 1e6 * 0.5
                                     + web.usage.num_generated_tokens / 1e6 * 4)  # fmt: skip
    assert data.slowest[0].record.client_request_id == "order-4711"
    assert len(data.slowest) == 15
    assert [stored.event.kind for stored in data.events] == ["ready", "crashed"]
    assert [stored.decision.sequence for stored in data.decisions] == [2, 1]


async def test_the_timeline_follows_the_samples(collected: Any, sample_of: Any) -> None:
    """Rates, gaps and energy, whatever the width of a bucket."""
    data = await collected()
    timeline = data.timeline
    assert timeline.num_buckets * timeline.width_seconds >= 6 * 3600
    assert timeline.num_buckets <= 240
    minutes = 299
    assert timeline.joules == 24_000 * minutes
    known = [value for value in timeline.requests_per_second if value is not None]
    assert known == pytest.approx([0.1] * len(known))
    hour = int(3600 / timeline.width_seconds)
    assert all(value is None for value in timeline.output_tokens_per_second[5 * hour :]), "the last hour had no server"
    assert all(value is not None for value in timeline.output_tokens_per_second[1 : 5 * hour - 1])
    assert timeline.covered_seconds == pytest.approx(5 * 3600, abs=timeline.width_seconds)
    assert min(share for share in timeline.ready_share if share is not None) == 0
    tokens = sum(value * timeline.width_seconds for value in timeline.output_tokens_per_second if value is not None)
    assert tokens == pytest.approx(sum(sample_of(MIDNIGHT + 60 * minute).num_generated_tokens for minute in range(1, 300)), rel=0.02)


async def test_rollups_tell_the_same(day: Any, collected: Any) -> None:
    """Over a range that is charted from rollups, the rates are those of the samples."""
    fine = (await collected()).timeline
    await roll_up(day)
    async with day.session() as session:
        history = await queries.sample_history(session, since_wall=MIDNIGHT, until_wall=MIDNIGHT + 6 * 3600, resolution_seconds=60)
        hourly = await queries.sample_history(session, since_wall=MIDNIGHT, until_wall=MIDNIGHT + 6 * 3600, resolution_seconds=3600)
    minutes, hours = (timeline_of(h, MIDNIGHT, MIDNIGHT + 6 * 3600) for h in (history, hourly))
    assert (minutes.width_seconds, hours.width_seconds) == (fine.width_seconds, 3600)
    assert minutes.joules == hours.joules == fine.joules
    tokens = [sum(v * t.width_seconds for v in t.output_tokens_per_second if v is not None) for t in (fine, minutes, hours)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.02)
    assert tokens[2] == pytest.approx(tokens[0], rel=0.02)
    assert 0 < (hours.ready_share[4] or 0) < 1


async def test_instances_are_added_up(day: Any, fill: Any, collected: Any, sample_of: Any) -> None:
    """Rates and watts are the fleet's; shares are means; one that stands still does not halve the rate of the other."""
    before = (await collected()).timeline
    quiet = {"num_requests": 0, "num_generated_tokens": 0, "num_prompt_tokens": 0, "num_running": 0, "gpu_power_watts": 100.0}
    await fill([], [sample_of(MIDNIGHT + 60 * minute, **quiet) for minute in range(1, 300)], [], instance_id="node-2")
    after = (await collected()).timeline
    for name in ("output_tokens_per_second", "requests_per_second"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), nan_ok=True)
    assert {value for value in after.gpu_power_watts if value is not None} == {500.0}
    assert (await collected(fleet="green")).timeline.joules is None
    assert (await collected(fleet="blue")).total.num_requests == 271


async def test_findings_say_what_went_wrong(collected: Any) -> None:
    """The SLO, the worst hour, errors, the crash, the wish for more, the gap; each with its numbers."""
    sentences = findings(await collected())
    text = "\n".join(sentence.text for sentence in sentences)
    assert "88.9 % of 271 judged requests were within the SLO; the target is 95.0 %: missed." in text
    assert "missed in 1 of 5 hours with requests; the worst began 15 Nov 04:00 UTC with 0.0 %" in text
    assert "10 of 271 requests (3.7 %) ended with 5xx" in text
    assert "The engine crashed, hung or failed once at 15 Nov 04:30 UTC: exit code -9" in text
    assert "an engine was not ready for about 10 min" in text
    assert "2 scale decisions; the last asked for 3 replicas" in text
    assert "More than max_replicas was wanted." in text
    assert "The GPUs took 1.99 kWh, 550 J per output token" in text
    assert "For 1 h of the range there are no samples" in text or "For 60" in text
    assert "The busiest hour began 15 Nov 01:00 UTC: 61 requests" in text
    assert [sentence.bad for sentence in sentences][:2] == [True, True]


async def test_capacity_left_is_the_room_to_the_nearest_limit(collected: Any) -> None:
    """Latencies over the SLO and KV use over the policy's limit, and the most tokens a second of the minutes that kept the SLO."""
    data = await collected()
    found = capacity(data)
    assert [(limit.name, limit.greatest) for limit in found.limits] == [
        ("TTFT p95", pytest.approx(0.25 / 0.5)),
        ("TPOT p95", pytest.approx(0.25 / 0.05)),
        ("KV cache", pytest.approx(0.25 / 0.9)),
    ]
    assert found.nearest is not None
    assert found.nearest.name == "TPOT p95"
    timeline = data.timeline
    rates = [
        (output or 0) + (prompt or 0)
        for output, prompt, good in zip(timeline.output_tokens_per_second, timeline.prompt_tokens_per_second, timeline.goodput, strict=True)
        if good == 1.0
    ]
    assert found.tokens_per_second == pytest.approx(max(rates))
    assert found.mean_load is not None
    assert 0 < found.mean_load < 1
    text = "\n".join(sentence.text for sentence in findings(data))
    assert "The nearest limit was TPOT p95, at 500.0 % of what is allowed" in text
    assert "nothing was left" in text


async def test_what_was_never_good_has_shown_no_capacity(collected: Any, fill: Any, sample_of: Any) -> None:
    """Where no interval kept the SLO, nothing is said about tokens a second."""
    data = await collected(since_wall=MIDNIGHT + 4.6 * 3600, until_wall=MIDNIGHT + 6 * 3600, fleet="green")
    assert capacity(data).tokens_per_second is None
    assert capacity(data).nearest is None
    assert any("Too little was measured" in sentence.text for sentence in findings(data))


async def test_an_empty_database_has_findings_too(database: Any) -> None:
    """Nothing was recorded: said, not raised."""
    from appliance.report.collect import collect
    from appliance.settings import Settings

    data = await collect(database, since_wall=MIDNIGHT, until_wall=MIDNIGHT + 3600, made_wall=MIDNIGHT, settings=Settings())
    text = "\n".join(sentence.text for sentence in findings(data))
    assert "No request was judged by the SLO." in text
    assert "For 1 h of the range there are no samples" in text or "For 60" in text


@pytest.mark.parametrize(("since", "seconds"), [("90m", 5400), ("24h", 86400), ("1.5d", 129_600), ("2w", 1_209_600), ("30min", 1800)])
def test_spans_are_counted_back_from_now(since: str, seconds: float) -> None:
    """Minutes to weeks."""
    assert time_range(since, None, MIDNIGHT) == (MIDNIGHT - seconds, MIDNIGHT)


def test_times_are_iso_8601() -> None:
    """With an offset, or taken as UTC."""
    assert time_range("2023-11-15T00:00", "2023-11-15T03:00+01:00", 0.0) == (MIDNIGHT, MIDNIGHT + 2 * 3600)


@pytest.mark.parametrize(
    ("since", "until"), [("yesterday", None), ("0h", None), ("24", None), ("500d", None), ("2024-01-01", "2023-01-01"), ("1h", "x")]
)
def test_other_ranges_are_refused(since: str, until: str | None) -> None:
    """With what is allowed."""
    with pytest.raises(ValueError, match=r"ISO 8601|400 days"):
        time_range(since, until, MIDNIGHT)
