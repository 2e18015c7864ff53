"""The policy: single looks, properties, and scenarios in which hours pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from appliance.errors import ConfigError
from appliance.events import ScaleDecision
from appliance.scaling.policy import Hold, Policy, PolicyConfig, PolicyState
from appliance.scaling.scale_in import Load
from appliance.settings import Settings

Make = Callable[..., Any]
NOW = 10_000.0


def settled(current: int = 2, **changes: Any) -> PolicyState:
    """A state with a long, quiet past."""
    base: dict[str, Any] = {"started_at": 0.0, "evaluated_at": NOW - 5, "current_replicas": current, "desired_replicas": current}
    return PolicyState(**base | changes)


def policy(**changes: Any) -> Policy:
    """A policy with a fixed queue limit of one second."""
    return Policy(PolicyConfig(**{"max_queue_age_seconds": 1.0} | changes))


def test_an_old_queue_asks_for_more_on_the_fast_window_alone(make_snapshot: Make, make_window: Make) -> None:
    """Queue age is a hard signal: the slow window may still look well."""
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=1.4, fast=make_window(mean_waiting=3.0))
    answer, state = policy().decide(view, settled(2), NOW)
    assert isinstance(answer, ScaleDecision)
    assert (answer.direction, answer.current_replicas, answer.desired_replicas) == ("up", 2, 3)
    assert "1.40 s old" in answer.reason
    assert answer.inputs["oldest_waiting_age_seconds"] == 1.4
    assert len(answer.alternatives) == 5
    assert (state.current_replicas, state.sequence) == (3, 1)
    assert answer.expires_wall - answer.at_wall == 300.0


def test_one_decision_at_most_doubles(make_snapshot: Make, make_window: Make) -> None:
    """However old the queue, the answer is bounded by twice the current number."""
    view = make_snapshot(NOW, num_waiting=900, oldest_waiting_age_seconds=500.0, fast=make_window(mean_waiting=600.0))
    answer, _ = policy(max_replicas=100).decide(view, settled(3), NOW)
    assert isinstance(answer, ScaleDecision)
    assert answer.desired_replicas == 6


@pytest.mark.parametrize(("num_shed", "desired"), [(1, 3), (40, 4), (60, 4)])
def test_requests_turned_away_for_want_of_capacity_ask_for_more(make_snapshot: Make, make_window: Make, num_shed: int, desired: int) -> None:
    """One is enough, though the queue is empty and latencies are well: those that were refused have none. The share refused sizes the step."""
    view = make_snapshot(NOW, fast=make_window(num_requests=60, num_shed=num_shed, num_rejected=num_shed))
    answer, _ = policy().decide(view, settled(2), NOW)
    assert isinstance(answer, ScaleDecision)
    assert (answer.direction, answer.desired_replicas) == ("up", desired)
    assert f"{num_shed} of 60 requests in 30 s were turned away for want of capacity" in answer.reason
    assert answer.inputs["fast_num_shed"] == num_shed


def test_quotas_are_no_want_of_capacity(make_snapshot: Make, make_window: Make) -> None:
    """A client over its quota is refused by every replica alike."""
    answer, _ = policy().decide(make_snapshot(NOW, fast=make_window(num_rejected=50)), settled(2), NOW)
    assert isinstance(answer, Hold)


def test_shed_requests_forbid_scale_in(make_snapshot: Make, make_window: Make) -> None:
    """They are in no measure of load, so the slow window that saw them looks lighter than it was."""
    light = {"max_kv_utilisation": 0.30, "ttft_p95_seconds": 0.4}
    answer, _ = policy().decide(make_snapshot(NOW, fast=make_window(**light), slow=make_window(**light, num_shed=1)), settled(2), NOW)
    assert isinstance(answer, Hold)
    assert "1 requests were turned away" in answer.reason


def test_a_passing_queue_is_no_reason(make_snapshot: Make, make_window: Make) -> None:
    """One long prompt makes a neighbour wait; a replica would not help."""
    view = make_snapshot(NOW, num_waiting=1, oldest_waiting_age_seconds=1.5, fast=make_window(mean_waiting=0.05))
    answer, _ = policy().decide(view, settled(), NOW)
    assert isinstance(answer, Hold)
    assert answer.kind == "steady"


def test_a_stalled_admission_asks_for_more(make_snapshot: Make, make_window: Make) -> None:
    """Requests wait and none runs: the fleet needs another node, whatever the mean of the window."""
    view = make_snapshot(NOW, num_waiting=2, num_running=0, oldest_waiting_age_seconds=1.5, fast=make_window(mean_waiting=0.1))
    answer, _ = policy().decide(view, settled(), NOW)
    assert isinstance(answer, ScaleDecision)
    assert "stalled" in answer.reason


@pytest.mark.parametrize(
    "bad",
    [
        {"ttft_p95_seconds": 3.0, "ttft_attainment": 0.9},
        {"tpot_p95_seconds": 0.2, "tpot_attainment": 0.8},
        {"ttft_p95_seconds": 1.9, "ttft_attainment": 0.96},
        {"mean_kv_utilisation": 0.95, "max_kv_utilisation": 1.0},
    ],
)
def test_soft_signals_need_both_windows(make_snapshot: Make, make_window: Make, bad: dict[str, float]) -> None:
    """TTFT, TPOT and KV over their limits ask for more only where the fast and the slow window agree."""
    poor, fine = make_window(**bad), make_window()
    both, _ = policy().decide(make_snapshot(NOW, fast=poor, slow=poor), settled(), NOW)
    assert isinstance(both, ScaleDecision)
    assert both.direction == "up"
    for fast, slow in ((poor, fine), (fine, poor)):
        answer, _ = policy().decide(make_snapshot(NOW, fast=fast, slow=slow), settled(), NOW)
        assert isinstance(answer, Hold)


def test_a_lone_slow_request_is_no_reason(make_snapshot: Make, make_window: Make) -> None:
    """Where requests are alone in the node, a bad TTFT is the model's or the prompt's, not the load's."""
    lone = make_window(mean_running=0.4, ttft_p95_seconds=9.0, ttft_attainment=0.1, mean_kv_utilisation=0.01, max_kv_utilisation=0.02)
    answer, _ = policy().decide(make_snapshot(NOW, fast=lone, slow=lone), settled(1), NOW)
    assert isinstance(answer, Hold)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"data_age_seconds": None}, "no_data", "not reported"),
        ({"data_age_seconds": 40.0}, "no_data", "40.0 s old"),
        ({"engine_ready": False}, "not_ready", "not ready"),
    ],
)
def test_no_data_means_hold(make_snapshot: Make, make_window: Make, changes: dict[str, Any], kind: str, words: str) -> None:
    """Without fresh data of a ready engine nothing is decided, though the queue looks terrible."""
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=90.0, fast=make_window(mean_waiting=9.0), **changes)
    answer, _ = policy().decide(view, settled(), NOW)
    assert isinstance(answer, Hold)
    assert answer.kind == kind
    assert words in answer.reason


def test_an_old_snapshot_is_stale_data(make_snapshot: Make) -> None:
    """The age of the snapshot itself counts too."""
    answer, _ = policy().decide(make_snapshot(NOW - 20), settled(), NOW)
    assert isinstance(answer, Hold)
    assert answer.kind == "no_data"


def test_an_empty_window_is_not_an_idle_one(make_snapshot: Make, make_window: Make) -> None:
    """Missing values never read as zero."""
    answer, _ = policy().decide(make_snapshot(NOW, slow=make_window(mean_running=None)), settled(), NOW)
    assert isinstance(answer, Hold)
    assert answer.kind == "no_data"


def test_it_holds_after_a_restart_until_the_slow_window_has_filled(make_snapshot: Make, make_window: Make) -> None:
    """History is lost with the process."""
    state = PolicyState.fresh(NOW)
    for second in range(5, 320, 5):
        at = NOW + second
        view = make_snapshot(at, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
        answer, state = policy().decide(view, state, at)
        assert isinstance(answer, Hold) == (second < 300), second
        if second >= 300:
            break


def test_a_sleep_of_the_loop_starts_history_anew(make_snapshot: Make, make_window: Make) -> None:
    """After a suspended hour the windows must fill again."""
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
    answer, _ = policy().decide(view, settled(evaluated_at=NOW - 3600), NOW)
    assert isinstance(answer, Hold)
    assert answer.kind == "warming_up"


def test_it_waits_for_a_replica_that_is_starting(make_snapshot: Make, make_window: Make) -> None:
    """The same overload is not answered twice."""
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
    for since, held in ((0.0, True), (149.0, True), (151.0, False)):
        answer, _ = policy().decide(view, settled(changed_at=NOW - since, grew=True), NOW)
        assert isinstance(answer, Hold) == held, since


def test_a_corrected_number_of_replicas_is_no_demand(make_snapshot: Make, make_window: Make) -> None:
    """Seven replicas reported by mistake and taken back a second later: an idle node asks for none of them, now or later."""
    idle = make_snapshot(NOW, fast=make_window(), slow=make_window())
    state = settled().with_current(7, NOW)
    answer, state = policy().decide(idle, state, NOW + 1)
    assert isinstance(answer, Hold)
    state = state.with_current(1, NOW + 2)
    for later in (2.5, 200.0, 400.0):
        answer, state = policy().decide(msgspec.structs.replace(idle, at=NOW + later), state, NOW + later)
        assert isinstance(answer, Hold) or answer.desired_replicas <= 1, answer


def test_scale_in_needs_room_on_the_rest(make_snapshot: Make, make_window: Make) -> None:
    """A replica goes only if the others would hold the slow window's load with a fifth to spare."""
    busy = make_window(max_kv_utilisation=0.50)  # of 2 on 1: 1.0
    answer, _ = policy().decide(make_snapshot(NOW, fast=busy, slow=busy), settled(2), NOW)
    assert isinstance(answer, Hold)
    assert "KV use would be 1" in answer.reason
    light = make_window(max_kv_utilisation=0.30, ttft_p95_seconds=0.4)
    answer, _ = policy().decide(make_snapshot(NOW, fast=light, slow=light), settled(2), NOW)
    assert isinstance(answer, ScaleDecision)
    assert (answer.direction, answer.desired_replicas) == ("down", 1)


def test_a_rising_fast_window_forbids_scale_in(make_snapshot: Make, make_window: Make) -> None:
    """The slow window alone would give a replica away just as load begins to rise."""
    light = make_window(max_kv_utilisation=0.30, ttft_p95_seconds=0.4)
    answer, _ = policy().decide(make_snapshot(NOW, fast=make_window(max_kv_utilisation=0.8), slow=light), settled(2), NOW)
    assert isinstance(answer, Hold)


def test_the_last_replica_goes_only_when_nothing_comes(make_snapshot: Make, make_window: Make) -> None:
    """With min_replicas = 0, zero is asked for on a measured zero alone."""
    idle = {"num_requests": 0, "mean_running": 0.0, "mean_waiting": 0.0, "prompt_tokens_per_second": 0.0, "ttft_p95_seconds": None}
    idle |= {"tpot_p95_seconds": None, "max_kv_utilisation": 0.0}
    nothing, little = make_window(**idle), make_window(**idle | {"num_requests": 1, "ttft_p95_seconds": 0.1})
    answer, _ = policy(min_replicas=0).decide(make_snapshot(NOW, fast=nothing, slow=nothing, num_running=0), settled(1), NOW)
    assert isinstance(answer, ScaleDecision)
    assert answer.desired_replicas == 0
    answer, _ = policy(min_replicas=0).decide(make_snapshot(NOW, fast=nothing, slow=little, num_running=0), settled(1), NOW)
    assert isinstance(answer, Hold)


def test_pinned_is_said_once(make_snapshot: Make, make_window: Make) -> None:
    """Wanting more than max_replicas is an event of its own, not a stream of them."""
    rules, state, kinds = policy(max_replicas=2, startup_seconds=10.0), settled(1), []
    for step in range(200):
        at = NOW + 5 * step
        view = make_snapshot(at, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
        answer, state = rules.decide(view, state, at)
        if isinstance(answer, ScaleDecision):
            kinds.append((answer.direction, answer.desired_replicas, answer.sequence))
    assert kinds == [("up", 2, 1), ("pinned", 2, 2)]
    assert state.pinned


def test_advice_is_not_taken_for_done(make_snapshot: Make, make_window: Make) -> None:
    """In advise mode nobody carries the decision out, so it is said once and does not compound."""
    rules, state, seen = policy(mode="advise"), settled(1), []
    for step in range(100):
        at = NOW + 5 * step
        view = make_snapshot(at, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
        answer, state = rules.decide(view, state, at)
        if isinstance(answer, ScaleDecision):
            seen.append((answer.current_replicas, answer.desired_replicas))
    assert seen == [(1, 2)]
    assert state.current_replicas == 1


def test_a_decision_that_could_not_be_stored_is_taken_again(make_snapshot: Make, make_window: Make) -> None:
    """`without_decision` keeps the history but takes the decision back."""
    before = settled(1)
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
    first, after = policy().decide(view, before, NOW)
    undone = after.without_decision(before)
    assert undone.wanted == after.wanted
    view = make_snapshot(NOW + 5, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
    again, _ = policy().decide(view, undone, NOW + 5)
    assert isinstance(first, ScaleDecision)
    assert isinstance(again, ScaleDecision)
    assert (again.sequence, again.desired_replicas) == (first.sequence, first.desired_replicas)


def test_ids_are_uuid7_and_repeatable(make_snapshot: Make, make_window: Make) -> None:
    """The policy is a pure function, its ids included; they sort by time."""
    view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=9.0, fast=make_window(mean_waiting=9.0))
    one, two = policy().decide(view, settled(), NOW)[0], policy().decide(view, settled(), NOW)[0]
    assert one == two
    assert isinstance(one, ScaleDecision)
    assert one.id[14] == "7"
    assert one.id[19] in "89ab"
    assert int(one.id.replace("-", "")[:12], 16) == int(one.at_wall * 1000)
    other = policy(instance_id="other").decide(view, settled(), NOW)[0]
    assert isinstance(other, ScaleDecision)
    assert other.id != one.id


def test_contradicting_bounds_are_a_config_error() -> None:
    """min over max is named with both values."""
    config = Settings.model_validate({"scaling": {"min_replicas": 9, "max_replicas": 3}})
    with pytest.raises(ConfigError, match="min_replicas = 9"):
        PolicyConfig.from_settings(config)


# Properties

load = st.floats(0.0, 6000.0)
phases = st.lists(st.tuples(st.integers(60, 900), load), min_size=1, max_size=5)


def shape(parts: list[tuple[int, float]]) -> Callable[[float], float]:
    """Load as a staircase of (seconds, tokens/s)."""

    def total(at: float) -> float:
        for seconds, level in parts:
            if at < seconds:
                return level
            at -= seconds
        return parts[-1][1]

    return total


@settings(max_examples=25, deadline=None)
@given(parts=phases, low=st.integers(0, 3), extra=st.integers(0, 6), slots_only=st.booleans())
def test_desired_stays_within_the_bounds(make_fleet: Make, parts: list[tuple[int, float]], low: int, extra: int, slots_only: bool) -> None:
    """Whatever comes, min <= desired <= max, and sequences grow by one."""
    fleet = make_fleet(policy(min_replicas=low, max_replicas=max(1, low + extra)), shape(parts), slots_only=slots_only).run(2400)
    assert all(low <= d.desired_replicas <= max(1, low + extra) for d in fleet.decisions)
    assert [d.sequence for d in fleet.decisions] == list(range(1, len(fleet.decisions) + 1))


@settings(max_examples=25, deadline=None)
@given(parts=phases, delay=st.sampled_from([0.0, 60.0, 300.0, 900.0]), slots_only=st.booleans())
def test_no_scale_in_within_the_delay_after_a_scale_out(make_fleet: Make, parts: list[tuple[int, float]], delay: float, slots_only: bool) -> None:
    """A replica that was asked for stays at least the scale-in delay (and its own start-up)."""
    fleet = make_fleet(policy(scale_in_delay_seconds=delay, max_replicas=20), shape(parts), slots_only=slots_only).run(3000)
    for earlier, later in zip(fleet.decisions, fleet.decisions[1:], strict=False):
        if earlier.direction == "up" and later.direction == "down":
            assert later.at_wall - earlier.at_wall >= max(delay, 120.0)


@settings(max_examples=12, deadline=None)
@given(level=load, slots_only=st.booleans(), delay=st.sampled_from([0.0, 300.0]))
@example(level=1050.0, slots_only=True, delay=0.0)
@example(level=2500.0, slots_only=False, delay=300.0)
def test_constant_load_does_not_flap(make_fleet: Make, level: float, slots_only: bool, delay: float) -> None:
    """Two hours of one load: out until the backlog is gone, trimmed once, never back."""
    fleet = make_fleet(policy(max_replicas=20, scale_in_delay_seconds=delay), lambda _: level, slots_only=slots_only).run(7200)
    directions = [d.direction for d in fleet.decisions if d.direction != "pinned"]
    assert directions == sorted(directions, reverse=True)
    assert directions.count("down") <= 2
    assert all(d.at_wall - 1_700_000_000 < 3600 for d in fleet.decisions)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_more_load_never_asks_for_less(make_snapshot: Make, make_window: Make, data: st.DataObject) -> None:
    """For one state, a snapshot that is worse in every measure wants at least as many replicas."""
    current = data.draw(st.integers(1, 8))
    state = settled(current, wanted=((NOW - 100, data.draw(st.integers(1, 8))),))
    config = policy(max_replicas=16, scale_in_delay_seconds=data.draw(st.sampled_from([0.0, 300.0])))
    pair = lambda low, high: sorted(data.draw(st.tuples(st.floats(low, high), st.floats(low, high))))  # noqa: E731
    names = {"ttft_p95_seconds": 6.0, "tpot_p95_seconds": 0.3, "mean_running": 16.0, "mean_waiting": 8.0, "mean_kv_utilisation": 1.0}
    names |= {"max_kv_utilisation": 1.0, "max_waiting_age_seconds": 4.0, "prompt_tokens_per_second": 900.0}
    shed = st.just(0) | st.integers(0, 90)
    lows: list[dict[str, float]] = [{}, {}]
    highs: list[dict[str, float]] = [{}, {}]
    for index in (0, 1):
        for name, top in names.items():
            lows[index][name], highs[index][name] = pair(0.0, top)
        for name in ("ttft_attainment", "tpot_attainment"):
            highs[index][name], lows[index][name] = pair(0.5, 1.0)
        lows[index]["num_shed"], highs[index]["num_shed"] = sorted(data.draw(st.tuples(shed, shed)))
    waiting, age = pair(0, 50), pair(0.0, 5.0)
    answers = []
    for which, values in ((0, lows), (1, highs)):
        num_waiting = math.ceil(waiting[which])
        view = make_snapshot(
            NOW,
            fast=make_window(**values[0]),
            slow=make_window(**values[1]),
            num_waiting=num_waiting,
            oldest_waiting_age_seconds=age[which] if num_waiting else 0.0,
        )
        answers.append(config.decide(view, state, NOW)[1].desired_replicas)
    assert answers[0] <= answers[1]


# Scenarios


def test_a_day_of_load_is_followed_up_and_down(make_fleet: Make) -> None:
    """A sine of a day between 0.5 and 5 replicas' worth of load: few actions, little overload, all replicas returned."""
    day = 86400
    fleet = make_fleet(policy(max_replicas=10), lambda t: 2750 - 2250 * math.cos(2 * math.pi * t / day)).run(day)
    ups = sum(d.direction == "up" for d in fleet.decisions)
    downs = sum(d.direction == "down" for d in fleet.decisions)
    assert 3 <= ups <= 10
    assert 2 <= downs <= 10
    assert fleet.state.current_replicas <= 2
    late = sum(1 for s in fleet.history if s.ttft is not None and s.ttft > 2.0)
    assert late / len(fleet.history) < 0.01


def test_a_burst_of_a_minute_is_answered_once_and_let_go(make_fleet: Make) -> None:
    """One burst: one scale-out (the backlog that drains by itself asks for no second), and after the delay one scale-in."""
    fleet = make_fleet(policy(), lambda t: 3000.0 if 1000 <= t < 1060 else 300.0).run(4000)
    assert [d.direction for d in fleet.decisions] == ["up", "down"]


def test_an_outage_of_the_data_is_no_scale_in(make_fleet: Make) -> None:
    """While nothing is known the number stays, and the delay runs anew afterwards."""
    fleet = make_fleet(policy(), lambda t: 1700.0 if t < 2000 else 0.0, blind=lambda t: 2000 <= t < 4000)
    fleet.state, fleet.serving = PolicyState.fresh(fleet.begin, current_replicas=2), 2
    fleet.run(6000)
    assert [(d.direction, d.desired_replicas) for d in fleet.decisions] == [("down", 1)]
    assert fleet.decisions[0].at_wall - 1_700_000_000 >= 4000 + 300
    assert {hold.kind for hold in fleet.holds} == {"warming_up", "no_data", "steady"}


def test_zero_traffic_scales_in(make_fleet: Make) -> None:
    """No requests is data: a fleet of four falls to one."""
    fleet = make_fleet(policy(), lambda t: 0.0)
    fleet.state = PolicyState.fresh(fleet.begin, current_replicas=4)
    fleet.serving = 4
    fleet.run(1000)
    assert [(d.direction, d.desired_replicas) for d in fleet.decisions] == [("down", 1)]


def test_a_slot_bound_overload_does_not_flap(make_fleet: Make) -> None:
    """Where only the queue shows the overload, the remembered ceiling keeps the replica that ended it, until the load falls."""
    fleet = make_fleet(policy(), lambda _: 1050.0, slots_only=True).run(4 * 3600)
    assert [d.direction for d in fleet.decisions] == ["up"]
    fell = make_fleet(policy(), lambda t: 1050.0 if t < 7200 else 300.0, slots_only=True).run(4 * 3600)
    assert [d.direction for d in fell.decisions] == ["up", "down"]


def test_a_ceiling_that_the_mix_has_outgrown_is_raised(make_snapshot: Make, make_window: Make) -> None:
    """A node that carries more than what was once too much has proven the old ceiling wrong."""
    carried = make_window(prompt_tokens_per_second=10.0, output_tokens_per_second=900.0, max_kv_utilisation=0.6)
    state = settled(2, ceiling=Load(1000.0, 100.0))
    _, after = policy().decide(make_snapshot(NOW, fast=carried, slow=carried), state, NOW)
    assert after.ceiling == Load(1000.0, 900.0)


def test_a_backlog_that_drains_is_no_reason(make_snapshot: Make, make_window: Make) -> None:
    """The replicas at hand will be done with it before another could help; one that drains too slowly is a reason."""
    for then, helped in ((20.0, False), (8.2, True)):
        state = settled(2, queue_ages=((NOW - 25, then),))
        view = make_snapshot(NOW, num_waiting=9, oldest_waiting_age_seconds=8.0, fast=make_window(mean_waiting=9.0))
        answer, _ = policy().decide(view, state, NOW)
        assert isinstance(answer, ScaleDecision) == helped
