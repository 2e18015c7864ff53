"""Snapshots and a fluid model of a fleet, for tests of the policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from appliance.clock import ManualClock
from appliance.events import ScaleDecision, Snapshot, WindowStats
from appliance.scaling.policy import Hold, Policy, PolicyState

QUIET = WindowStats(
    seconds=30.0,
    num_requests=60,
    num_errors=0,
    num_rejected=0,
    num_shed=0,
    prompt_tokens_per_second=200.0,
    max_output_tokens_per_second=400.0,
    output_tokens_per_second=200.0,
    ttft_p50_seconds=0.2,
    ttft_p95_seconds=0.5,
    tpot_p50_seconds=0.02,
    tpot_p95_seconds=0.03,
    ttft_attainment=1.0,
    tpot_attainment=1.0,
    goodput=1.0,
    mean_running=4.0,
    mean_waiting=0.0,
    mean_kv_utilisation=0.5,
    max_kv_utilisation=0.6,
    max_waiting_age_seconds=0.0,
)


def window(**changes: object) -> WindowStats:
    """A window in which all is well on a node that is about half used, changed by `changes`."""
    return msgspec.structs.replace(QUIET, **changes)


def snapshot(at: float, *, fast: WindowStats | None = None, slow: WindowStats | None = None, **changes: object) -> Snapshot:
    """A healthy snapshot at monotonic `at`, changed by `changes`."""
    base = Snapshot(
        at=at,
        at_wall=1_700_000_000.0 + at,
        engine_ready=True,
        data_age_seconds=0.5,
        num_running=4,
        num_waiting=0,
        oldest_waiting_age_seconds=0.0,
        kv_utilisation=0.5,
        ttft_slo_seconds=2.0,
        tpot_slo_seconds=0.1,
        fast=fast or window(),
        slow=msgspec.structs.replace(slow or window(), seconds=300.0),
    )
    return msgspec.structs.replace(base, **changes)


@dataclass
class Second:
    """What one node saw in one second."""

    load: float
    served: float
    queue: float
    age: float
    running: float
    kv: float
    ttft: float | None
    tpot: float | None


@dataclass
class Fleet:
    """`total(t)` tokens/s spread over the replicas that serve; each serves at most `capacity`. Mutated by `run`.

    With `slots_only`, nothing but the queue shows an overload: KV stays low and TPOT good up to the last slot.
    """

    policy: Policy
    total: Callable[[float], float]
    capacity: float = 1000.0
    slots_only: bool = False
    clock: ManualClock = field(default_factory=ManualClock)
    startup_seconds: float = 120.0
    history: list[Second] = field(default_factory=list)
    starting: list[tuple[float, int]] = field(default_factory=list)
    serving: int = 1
    queue: float = 0.0
    decisions: list[ScaleDecision] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    blind: Callable[[float], bool] = lambda _: False

    def __post_init__(self) -> None:
        self.begin = self.clock.monotonic()
        self.state = PolicyState.fresh(self.begin)

    def run(self, seconds: float) -> Fleet:
        """Let `seconds` pass, with a look of the policy every five."""
        for second in range(int(seconds)):
            self.clock.advance(1.0)
            self._serve()
            if second % 5 == 4:
                self._decide()
        return self

    def _serve(self) -> None:
        now = self.clock.monotonic()
        for at, replicas in self.starting:
            if at <= now:
                self.queue *= self.serving / replicas if replicas else 1.0
                self.serving = replicas
        self.starting = [entry for entry in self.starting if entry[0] > now]
        load = self.total(now - self.begin) / max(self.serving, 1)
        served = min(load + self.queue, self.capacity)
        self.queue = max(0.0, self.queue + load - served)
        used = served / self.capacity
        age = self.queue / self.capacity
        kv = 0.2 if self.slots_only and served else used * 0.95
        ttft = 0.1 + age + (0.0 if self.slots_only else 0.5 * used**4)
        some = load > 0 or self.queue > 0
        self.history.append(Second(load, served, self.queue / 100, age, used * 16, kv, ttft if some else None, 0.03 if some else None))

    def _window(self, seconds: int) -> WindowStats:
        seen = self.history[-seconds:]
        ttft = sorted(s.ttft for s in seen if s.ttft is not None)
        tpot = [s.tpot for s in seen if s.tpot is not None]
        mean = lambda name: sum(getattr(s, name) for s in seen) / len(seen)  # noqa: E731
        return window(
            seconds=float(seconds),
            num_requests=sum(1 for s in seen if s.served > 0) * 5,
            prompt_tokens_per_second=mean("load") / 2,
            output_tokens_per_second=mean("served") / 2,
            ttft_p95_seconds=ttft[int(len(ttft) * 0.95)] if ttft else None,
            ttft_attainment=sum(t <= 2.0 for t in ttft) / len(ttft) if ttft else None,
            tpot_p95_seconds=max(tpot) if tpot else None,
            tpot_attainment=1.0 if tpot else None,
            mean_running=mean("running"),
            mean_waiting=mean("queue"),
            mean_kv_utilisation=mean("kv"),
            max_kv_utilisation=max(s.kv for s in seen),
            max_waiting_age_seconds=max(s.age for s in seen),
        )

    def _decide(self) -> None:
        now = self.clock.monotonic()
        last = self.history[-1]
        view = snapshot(
            now,
            fast=self._window(30),
            slow=self._window(300),
            at_wall=self.clock.wall(),
            num_running=int(last.running),
            num_waiting=int(last.queue + 0.999),
            oldest_waiting_age_seconds=last.age,
            data_age_seconds=60.0 if self.blind(now - self.begin) else 0.2,
        )
        answer, self.state = self.policy.decide(view, self.state, now)
        if isinstance(answer, Hold):
            self.holds.append(answer)
            return
        self.decisions.append(answer)
        delay = self.startup_seconds if answer.desired_replicas > self.serving else 0.0
        self.starting.append((now + delay, answer.desired_replicas))


@pytest.fixture(scope="session")
def make_window() -> Callable[..., WindowStats]:
    """`window`."""
    return window


@pytest.fixture(scope="session")
def make_snapshot() -> Callable[..., Snapshot]:
    """`snapshot`."""
    return snapshot


@pytest.fixture(scope="session")
def make_fleet() -> Callable[..., Fleet]:
    """`Fleet`."""
    return Fleet
