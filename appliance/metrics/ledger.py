"""The latency ledger of one request: how long it was in each state, so that the parts sum to its wall time."""

from __future__ import annotations

from appliance.clock import Clock
from appliance.events import LedgerState

_STATES = tuple(LedgerState)
_RANK = {state: rank for rank, state in enumerate(_STATES)}
_LEFT = len(_STATES)  # the rank of a choice that has ended: behind every state
_SETTLE_ABOVE = 256  # pending changes; a stream of thousands of tokens must not keep them all


def _nanoseconds(at: float) -> int:
    return round(at * 1e9)


class Ledger:
    """Accumulates the states of one request. Owned by its handler; every time is CLOCK_MONOTONIC seconds.

    It starts as RECEIVED at `received_at`, in choice 0. A choice is in the state it entered last; the request is in the first of its choices'
    states in LedgerState's order. Once every choice has left, the request stays in the state it was in.

    Changes may arrive late (the engine's events carry their own, earlier time): they are ordered by time, equal times by arrival, and count from
    their own time. Only a change older than the settled past, which trails by at least 128 changes, counts from the end of that past.
    Time is kept in whole nanoseconds, so the parts sum to the duration without a rest.
    """

    __slots__ = ("_choices", "_clock", "_closed", "_current", "_intervals", "_pending", "_settled_at", "_spent", "_start")

    def __init__(self, clock: Clock, received_at: float, *, keep_intervals: bool = False) -> None:
        self._clock = clock
        self._intervals: list[list[int]] | None = [] if keep_intervals else None  # [rank, from, to], for `intervals`
        self._start = self._settled_at = _nanoseconds(received_at)
        self._spent = [0] * len(_STATES)  # nanoseconds by rank, up to _settled_at
        self._choices = {0: _RANK[LedgerState.RECEIVED]}  # choice -> rank, at _settled_at
        self._current = _RANK[LedgerState.RECEIVED]
        self._pending: list[tuple[int, int, int]] = []  # (nanoseconds, choice, rank) in order of arrival
        self._closed: dict[str, float] | None = None

    def enter(self, state: LedgerState, at: float | None = None, choice: int = 0) -> None:
        """`choice` is in `state` from `at` (default: now) on. Ignored after `close`."""
        self._change(_RANK[state], at, choice)

    def leave(self, at: float | None = None, choice: int = 0) -> None:
        """`choice` has ended: from `at` on the others decide what the request is doing. Ignored after `close`."""
        self._change(_LEFT, at, choice)

    def close(self, at: float | None = None) -> dict[str, float]:
        """Seconds in every state, from receipt to `at` (default: now; an `at` before receipt counts as receipt). Idempotent.

        What was reported for later than `at` counts for nothing.
        """
        if self._closed is None:
            end = max(self._start, _nanoseconds(self._clock.monotonic() if at is None else at))
            if self._settled_at > end:  # closed in the settled past: cannot be told apart any more, so the newest end wins
                end = self._settled_at
            self._pending.sort(key=lambda change: change[0])
            self._sweep([change for change in self._pending if change[0] <= end])
            self._spend(end)
            self._pending.clear()
            self._closed = {state.value: self._spent[rank] / 1e9 for rank, state in enumerate(_STATES)}
        return dict(self._closed)

    @property
    def duration_seconds(self) -> float:
        """Receipt to `close`; before that, to the newest settled change."""
        return (self._settled_at - self._start) / 1e9

    @property
    def state(self) -> LedgerState:
        """What the request is doing after every change reported so far."""
        choices = dict(self._choices)
        current = self._current
        for _, choice, rank in sorted(self._pending, key=lambda change: change[0]):
            choices[choice] = rank
            current = _first(choices, current)
        return _STATES[current]

    @property
    def intervals(self) -> list[tuple[str, float, float]]:
        """Each state with the times at which it began and ended, in order, without gaps up to the newest settled change. Empty unless kept."""
        return [(_STATES[rank].value, began / 1e9, ended / 1e9) for rank, began, ended in self._intervals or ()]

    def _change(self, rank: int, at: float | None, choice: int) -> None:
        if self._closed is not None:
            return
        self._pending.append((_nanoseconds(self._clock.monotonic() if at is None else at), choice, rank))
        if len(self._pending) > _SETTLE_ABOVE:
            self._pending.sort(key=lambda change: change[0])
            half = len(self._pending) // 2
            self._sweep(self._pending[:half])
            del self._pending[:half]

    def _sweep(self, changes: list[tuple[int, int, int]]) -> None:
        """Account for `changes`, sorted by time."""
        choices = self._choices
        for at, choice, rank in changes:
            if at > self._settled_at:
                self._spend(at)
            choices[choice] = rank
            self._current = _first(choices, self._current)

    def _spend(self, until: int) -> None:
        """The time up to `until` went to the current state."""
        self._spent[self._current] += until - self._settled_at
        if self._intervals is not None and until > self._settled_at:
            if self._intervals and self._intervals[-1][0] == self._current:
                self._intervals[-1][2] = until
            else:
                self._intervals.append([self._current, self._settled_at, until])
        self._settled_at = until


def _first(choices: dict[int, int], current: int) -> int:
    """The rank of the request: the least of its choices', or `current` once all have left."""
    rank = min(choices.values())
    return current if rank == _LEFT else rank
