"""The latency ledger: exclusive states that sum to the wall time, whatever order the changes arrive in."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.clock import ManualClock
from appliance.events import LedgerState
from appliance.metrics.ledger import Ledger

START = 1_000.0
changes = st.lists(
    st.tuples(
        st.one_of(st.none(), st.sampled_from(list(LedgerState))),  # None: the choice leaves
        st.integers(min_value=-(10**9), max_value=60 * 10**9),  # nanoseconds after receipt; also before it
        st.integers(min_value=0, max_value=3),
    ),
    max_size=60,
)


def _apply(ledger: Ledger, events: list[tuple[LedgerState | None, int, int]]) -> None:
    for state, after, choice in events:
        if state is None:
            ledger.leave(START + after / 1e9, choice)
        else:
            ledger.enter(state, START + after / 1e9, choice)


def _whole(states: dict[str, float]) -> dict[str, int]:
    return {state: round(seconds * 1e9) for state, seconds in states.items()}


def _reference(events: list[tuple[LedgerState | None, int, int]], end: int) -> dict[str, int]:
    """The definition, instant by instant: between two neighbouring times, the first of the choices' states."""
    order = list(LedgerState)
    base = round(START * 1e9)
    ordered = sorted(((round((START + after / 1e9) * 1e9) - base, state, choice) for state, after, choice in events), key=lambda event: event[0])
    times = sorted({0, end, *(min(max(at, 0), end) for at, _, _ in ordered)})
    spent = dict.fromkeys((state.value for state in order), 0)
    for left, right in itertools.pairwise(times):
        choices: dict[int, LedgerState | None] = {0: LedgerState.RECEIVED}
        current = LedgerState.RECEIVED
        for at, state, choice in ordered:
            if at <= left:
                choices[choice] = state
                present = [other for other in choices.values() if other is not None]
                current = min(present, key=order.index) if present else current
        spent[current.value] += right - left
    return spent


@settings(deadline=None)  # the machine that runs the tests is shared
@given(changes, st.integers(min_value=0, max_value=60 * 10**9))
def test_states_partition_the_wall_time(events: list[tuple[LedgerState | None, int, int]], end: int) -> None:
    """For any changes in any order, no part is negative, the parts sum to the duration to the nanosecond, and each is what the definition says."""
    ledger = Ledger(ManualClock(), START)
    _apply(ledger, events)
    states = ledger.close(START + end / 1e9)
    assert set(states) == {state.value for state in LedgerState}
    assert min(states.values()) >= 0
    assert sum(_whole(states).values()) == round(ledger.duration_seconds * 1e9) == end
    assert abs(sum(states.values()) - ledger.duration_seconds) < 1e-9
    assert _whole(states) == _reference(events, end)


@settings(deadline=None)  # the machine that runs the tests is shared
@given(changes, st.randoms(use_true_random=False))
def test_arrival_order_does_not_matter_for_distinct_times(events: list[tuple[LedgerState | None, int, int]], random: object) -> None:
    """Changes at distinct times give the same ledger in whatever order they arrive."""
    distinct = list({round(after / 1e6): (state, round(after / 1e6) * 10**6, choice) for state, after, choice in events}.values())
    shuffled = list(distinct)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = Ledger(ManualClock(), START), Ledger(ManualClock(), START)
    _apply(first, distinct)
    _apply(second, shuffled)
    assert first.state == second.state
    assert first.close(START + 60) == second.close(START + 60)


@settings(deadline=None, max_examples=15)  # the machine that runs the tests is shared
@given(st.lists(st.sampled_from(list(LedgerState)), min_size=600, max_size=600), st.integers(min_value=0, max_value=100))
def test_thousands_of_changes_settle_in_bounded_memory(states: list[LedgerState], late: int) -> None:
    """A long stream settles its past, and events up to a hundred changes late still count from their own time."""
    ledger = Ledger(ManualClock(), START)
    events: list[tuple[LedgerState | None, int, int]] = [(state, index * 10**6, 0) for index, state in enumerate(states)]
    for index in range(0, len(events), late + 1):
        _apply(ledger, list(reversed(events[index : index + late + 1])))
    assert len(ledger._pending) <= 256
    assert _whole(ledger.close(START + 0.6)) == _reference(events, 600 * 10**6)


def test_a_plain_request() -> None:
    """A request that is queued, prefilled and decoded spends what it spent."""
    clock = ManualClock(monotonic=START)
    ledger = Ledger(clock, START)
    clock.advance(0.25)
    ledger.enter(LedgerState.ADMITTED)
    clock.advance(0.25)
    ledger.enter(LedgerState.QUEUED)
    assert ledger.state is LedgerState.QUEUED
    clock.advance(10)
    ledger.enter(LedgerState.PREFILL, START + 1.5)  # told late
    ledger.enter(LedgerState.DECODE, START + 2.5)
    states = ledger.close(START + 8.5)
    spent = {state: seconds for state, seconds in states.items() if seconds}
    assert spent == {
        "received": 0.25,
        "admitted": 0.25,
        "queued": 1.0,
        "prefill": 1.0,
        "decode": 6.0,
    }
    ledger.enter(LedgerState.PREEMPTED, START + 3)
    assert ledger.close(START + 99) == states
    assert ledger.duration_seconds == 8.5


def test_the_first_state_in_priority_wins_among_choices() -> None:
    """While one choice decodes the request decodes, though another waits; once it leaves, the waiting shows."""
    ledger = Ledger(ManualClock(), START)
    ledger.enter(LedgerState.DECODE, START + 1, choice=0)
    ledger.enter(LedgerState.PREEMPTED, START + 2, choice=1)
    assert ledger.state is LedgerState.DECODE
    ledger.leave(START + 3, choice=0)
    assert ledger.state is LedgerState.PREEMPTED
    ledger.leave(START + 5, choice=1)
    assert ledger.state is LedgerState.PREEMPTED
    states = ledger.close(START + 6)
    assert (states["received"], states["decode"], states["preempted"]) == (1.0, 2.0, 3.0)


def test_close_before_receipt_is_empty() -> None:
    """A close that is stamped before receipt makes no negative time."""
    ledger = Ledger(ManualClock(), START)
    assert set(ledger.close(START - 5).values()) == {0.0}
