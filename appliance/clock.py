"""Wall and monotonic time as a protocol, so that tests let minutes pass without sleeping."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Time as the appliance sees it. `monotonic` is CLOCK_MONOTONIC, which all processes of one machine share."""

    def wall(self) -> float:
        """Seconds since the Unix epoch, UTC."""

    def monotonic(self) -> float:
        """Seconds of the machine's monotonic clock."""


class SystemClock:
    """The machine's own clocks."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told. Mutated by `advance`; for tests and the simulator."""

    def __init__(self, wall: float = 1_700_000_000.0, monotonic: float = 1_000.0) -> None:
        self._wall = wall
        self._monotonic = monotonic

    def wall(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let `seconds` (>= 0) pass on both clocks."""
        if seconds < 0:
            raise ValueError(f"a clock does not run backwards: {seconds}")
        self._wall += seconds
        self._monotonic += seconds
