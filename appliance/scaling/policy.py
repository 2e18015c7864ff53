"""How many replicas the fleet should have, decided from what one of them measures. Pure: time and history are arguments.

Up: a hard signal on the fast window (requests turned away, an old queue), or a soft one on both, asks for current * ratio replicas, at most doubling.
Down: a sliding maximum of what was wanted over the scale-in delay (Knative's), itself lowered only to what would hold the slow window's load with
headroom. No data, stale data, a history shorter than the slow window and a replica that is still starting all mean Hold.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from dataclasses import dataclass, replace

from appliance.errors import ConfigError, ConfigProblem
from appliance.events import ScaleDecision, Snapshot
from appliance.scaling.pressure import Limits, pressures
from appliance.scaling.scale_in import Load, fewest_replicas
from appliance.settings import Settings

MAX_GROWTH = 2.0
"""One decision at most doubles the replicas: what a start-up time of waiting then shows is worth more than a larger guess."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The policy's slice of the settings. `follows`: what is decided is carried out (mode act), so it becomes the current number."""

    instance_id: str = "instance"
    fleet: str = "default"
    mode: str = "act"
    min_replicas: int = 1
    max_replicas: int = 8
    scale_in_delay_seconds: float = 300.0
    startup_seconds: float = 120.0
    fast_window_seconds: float = 30.0
    slow_window_seconds: float = 300.0
    max_queue_age_seconds: float | None = None
    max_kv_utilisation: float = 0.9
    slo_target: float = 0.99
    signal_ttl_seconds: float = 300.0
    headroom: float = 0.8
    max_data_age_seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            allowed = f"at most scaling.max_replicas ({self.max_replicas})"
            raise ConfigError([ConfigProblem("scaling.min_replicas", str(self.min_replicas), allowed, "settings")])

    @classmethod
    def from_settings(cls, settings: Settings) -> PolicyConfig:
        """The config that `settings` ask for. Raises ConfigError where the bounds contradict each other."""
        scaling = settings.scaling
        return cls(
            instance_id=settings.instance_id,
            fleet=settings.fleet,
            mode=scaling.mode,
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            scale_in_delay_seconds=scaling.scale_in_delay_seconds,
            startup_seconds=scaling.startup_seconds,
            fast_window_seconds=settings.metrics.fast_window_seconds,
            slow_window_seconds=settings.metrics.slow_window_seconds,
            max_queue_age_seconds=scaling.max_queue_age_seconds,
            max_kv_utilisation=scaling.max_kv_utilisation,
            slo_target=settings.slo.target,
            signal_ttl_seconds=scaling.signal_ttl_seconds,
            max_data_age_seconds=max(15.0, 2 * scaling.interval_seconds),
        )

    @property
    def follows(self) -> bool:
        """Whether a decision is carried out as soon as it is taken."""
        return self.mode == "act"


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy remembers between two looks. Times are CLOCK_MONOTONIC seconds, and so die with the machine.

    `wanted` is the history behind the sliding maximum: (when, replicas before the bounds), falling in replicas, oldest first.
    """

    started_at: float
    evaluated_at: float
    current_replicas: int = 1
    desired_replicas: int = 1
    sequence: int = 0
    wanted: tuple[tuple[float, int], ...] = ()
    changed_at: float | None = None  # when current_replicas last changed
    grew: bool = False  # whether that change was an increase, so that a replica may still be starting
    ceiling: Load | None = None  # load of one replica when scale-out was last needed
    pinned: bool = False
    queue_ages: tuple[tuple[float, float], ...] = ()  # (when, age of the oldest waiting request) over the fast window

    @classmethod
    def fresh(cls, now: float, *, current_replicas: int = 1, desired_replicas: int | None = None, sequence: int = 0) -> PolicyState:
        """The state at a start: no history, so the policy holds until the slow window has filled."""
        desired = current_replicas if desired_replicas is None else desired_replicas
        return cls(now, now, current_replicas, desired, sequence, ((now, max(current_replicas, desired)),))

    def with_current(self, replicas: int, now: float) -> PolicyState:
        """The fleet is now known to have (or to be starting) `replicas`."""
        if replicas == self.current_replicas:
            return self
        # A fleet that is smaller than was thought: what was remembered as wanted only because it was there was never wanted. What the load wants is
        # judged anew at once.
        wanted = tuple((at, min(number, replicas)) for at, number in self.wanted) if replicas < self.current_replicas else self.wanted
        return replace(self, current_replicas=replicas, changed_at=now, grew=replicas > self.current_replicas, wanted=wanted)

    def without_decision(self, before: PolicyState) -> PolicyState:
        """This state as if its decision had not been taken (it could not be stored), with the history kept."""
        return replace(
            self,
            current_replicas=before.current_replicas,
            desired_replicas=before.desired_replicas,
            sequence=before.sequence,
            changed_at=before.changed_at,
            grew=before.grew,
            pinned=before.pinned,
        )


@dataclass(frozen=True, slots=True)
class Hold:
    """No change. `kind` is no_data, not_ready, warming_up, starting or steady; `reason` says it in words with its numbers."""

    kind: str
    reason: str


class Policy:
    """Decides. Stateless: the same config, snapshot, state and time give the same answer, its id included."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    def decide(self, snapshot: Snapshot, state: PolicyState, now: float) -> tuple[ScaleDecision | Hold, PolicyState]:
        """What to do at `now` (CLOCK_MONOTONIC, not before `snapshot.at`), and the state to hand in next time."""
        if now - state.evaluated_at > max(self.config.slow_window_seconds, self.config.scale_in_delay_seconds):
            # The loop slept (a suspended machine): what lies before is no longer history.
            state = replace(state, started_at=now)
        ages = tuple((at, age) for at, age in state.queue_ages if at >= now - self.config.fast_window_seconds)
        state = replace(state, evaluated_at=now, queue_ages=(*ages, (now, snapshot.oldest_waiting_age_seconds)))
        if hold := self._hold(snapshot, state, now):
            # What is wanted is unknown, so it counts as no less than what is there: a gap in the data must not age into a scale-in.
            return hold, replace(state, wanted=self._remember(state, now, max(state.current_replicas, state.desired_replicas)))
        return self._judge(snapshot, state, now)

    def limits(self, snapshot: Snapshot) -> Limits:
        """The limits in force: the SLO that `snapshot` carries and this config."""
        return Limits(
            queue_age_seconds=self.config.max_queue_age_seconds or snapshot.ttft_slo_seconds / 2,
            ttft_seconds=snapshot.ttft_slo_seconds,
            tpot_seconds=snapshot.tpot_slo_seconds,
            kv_utilisation=self.config.max_kv_utilisation,
            slo_target=self.config.slo_target,
        )

    def _hold(self, snapshot: Snapshot, state: PolicyState, now: float) -> Hold | None:
        """Why nothing can be judged now, or None."""
        if snapshot.data_age_seconds is None:
            return Hold("no_data", "the engine has not reported yet")
        age = snapshot.data_age_seconds + (now - snapshot.at)
        if age > self.config.max_data_age_seconds:
            return Hold("no_data", f"the engine's newest report is {age:.1f} s old, over {self.config.max_data_age_seconds:.1f} s")
        if not snapshot.engine_ready:
            return Hold("not_ready", "the engine is not ready, so what waits now says nothing about replicas")
        if (filled := now - state.started_at) < self.config.slow_window_seconds:
            return Hold("warming_up", f"{filled:.0f} s of history, {self.config.slow_window_seconds:.0f} s are needed to judge")
        if snapshot.slow.mean_running is None or snapshot.fast.mean_running is None:
            return Hold("no_data", "a window has no data, which is not the same as no load")
        if state.changed_at is not None and state.grew:
            # The fast window must have forgotten the time before the replica served, or the same overload would be answered twice.
            wait = self.config.startup_seconds + self.config.fast_window_seconds - (now - state.changed_at)
            if wait > 0:
                return Hold("starting", f"replicas asked for {now - state.changed_at:.0f} s ago may still be starting; {wait:.0f} s to go")
        return None

    def _judge(self, snapshot: Snapshot, state: PolicyState, now: float) -> tuple[ScaleDecision | Hold, PolicyState]:
        """The strongest signal decides upwards; without one, the slow window's load decides downwards."""
        limits = self.limits(snapshot)
        signals = pressures(snapshot, limits, self._relief(snapshot, state))
        strongest = max(signals, key=lambda signal: signal.ratio)
        current = max(state.current_replicas, 1)
        alternatives = [signal.text for signal in signals if signal is not strongest]
        if strongest.ratio > 1:
            wanted = max(current + 1, math.ceil(current * min(strongest.ratio, MAX_GROWTH)))
            why = f"{strongest.text}; {current} replicas, {wanted} wanted"
            alternatives.append(f"stay at {current}: {strongest.name} is {strongest.ratio:.2f}x its limit")
            state = replace(state, ceiling=Load.of(snapshot.fast))
        else:
            wanted, blocked = self._wanted_in(snapshot, state, limits, now)
            why = f"{wanted} of {state.current_replicas} replicas hold the load of the last {snapshot.slow.seconds:.0f} s with headroom ({blocked})"
            if state.ceiling and Load.of(snapshot.slow).share_of(state.ceiling) > 1:
                # The node carries more than what was once too much: the mix has changed, and the old ceiling is no longer true.
                state = replace(state, ceiling=state.ceiling.or_more(Load.of(snapshot.slow)))
        state = replace(state, wanted=self._remember(state, now, wanted))
        peak = max(number for _, number in state.wanted)
        if peak > wanted:
            why = f"{why}; the most wanted in {self.config.scale_in_delay_seconds:.0f} s is {peak}"
        return self._conclude(snapshot, state, now, peak, why, tuple(alternatives))

    def _relief(self, snapshot: Snapshot, state: PolicyState) -> str:
        """Says that the backlog shrinks fast enough to be gone before a replica asked for now would serve; empty if it does not."""
        (then, age_then), (now, age_now) = state.queue_ages[0], state.queue_ages[-1]
        if age_now >= age_then or (snapshot.num_waiting and snapshot.num_running == 0):
            return ""
        drained_in = age_now * (now - then) / (age_then - age_now)
        if drained_in > self.config.startup_seconds:
            return ""
        fall = f"the queue's age fell from {age_then:.1f} s to {age_now:.1f} s in {now - then:.0f} s"
        return f"{fall} and is gone in {drained_in:.0f} s, before a new replica would serve"

    def _wanted_in(self, snapshot: Snapshot, state: PolicyState, limits: Limits, now: float) -> tuple[int, str]:
        """Replicas that would do, and what speaks against fewer."""
        current = state.current_replicas
        if state.changed_at is not None and now - state.changed_at < self.config.slow_window_seconds:
            return current, f"the slow window still holds the time before the change {now - state.changed_at:.0f} s ago"
        floor = min(self.config.min_replicas, current)
        answers = [
            fewest_replicas(window, limits, current=current, floor=floor, headroom=self.config.headroom, ceiling=state.ceiling)
            for window in (snapshot.slow, snapshot.fast)  # the fast one, lest a load that has just begun to rise loses a replica
        ]
        return max(answers, key=lambda answer: answer[0])

    def _conclude(
        self, snapshot: Snapshot, state: PolicyState, now: float, peak: int, why: str, alternatives: tuple[str, ...]
    ) -> tuple[ScaleDecision | Hold, PolicyState]:
        """Bound `peak`, compare it with what was last asked for, and word the outcome."""
        config = self.config
        desired = min(max(peak, config.min_replicas), config.max_replicas)
        pinned = peak > config.max_replicas
        if desired == state.desired_replicas and (not pinned or state.pinned):
            return Hold("steady", f"{desired} replicas: {why}"), replace(state, pinned=pinned)
        moved = desired != state.desired_replicas
        direction = ("up" if desired > state.desired_replicas else "down") if moved else "pinned"
        if pinned:
            why = f"{why}; max_replicas is {config.max_replicas}"
        elif desired > peak:
            why = f"{why}; min_replicas is {config.min_replicas}"
        at_wall = snapshot.at_wall + (now - snapshot.at)
        decision = ScaleDecision(
            id=decision_id(config, state.sequence + 1, at_wall),
            sequence=state.sequence + 1,
            at_wall=at_wall,
            expires_wall=at_wall + config.signal_ttl_seconds,
            instance_id=config.instance_id,
            fleet=config.fleet,
            direction=direction,
            current_replicas=state.current_replicas,
            desired_replicas=desired,
            reason=why,
            inputs=inputs(snapshot),
            alternatives=alternatives,
            mode=config.mode,
        )
        state = replace(state, sequence=decision.sequence, desired_replicas=desired, pinned=pinned and not moved)
        if config.follows:
            state = state.with_current(desired, now)
        return decision, state

    def _remember(self, state: PolicyState, now: float, wanted: int) -> tuple[tuple[float, int], ...]:
        """The history with `wanted` added, without entries older than the delay and without those that a later, larger one outlives."""
        kept = [(at, number) for at, number in state.wanted if at >= now - self.config.scale_in_delay_seconds and number > wanted]
        return (*kept, (now, wanted))


def inputs(snapshot: Snapshot) -> dict[str, float | None]:
    """The numbers a decision was made of, flat, for SQL and the webhook."""
    values: dict[str, float | None] = {
        "num_running": snapshot.num_running,
        "num_waiting": snapshot.num_waiting,
        "oldest_waiting_age_seconds": snapshot.oldest_waiting_age_seconds,
        "kv_utilisation": snapshot.kv_utilisation,
        "ttft_slo_seconds": snapshot.ttft_slo_seconds,
        "tpot_slo_seconds": snapshot.tpot_slo_seconds,
        "data_age_seconds": snapshot.data_age_seconds,
    }
    for name, window in (("fast", snapshot.fast), ("slow", snapshot.slow)):
        values |= {f"{name}_{field}": getattr(window, field) for field in window.__struct_fields__}
    return values


def decision_id(config: PolicyConfig, sequence: int, at_wall: float) -> str:
    """A UUIDv7 (RFC 9562) whose random bits are a hash of who decides and which decision it is, so that a policy stays a pure function."""
    digest = hashlib.sha256(f"{config.fleet}\0{config.instance_id}\0{sequence}\0{at_wall!r}".encode()).digest()
    bits = int.from_bytes(digest[:10], "big")
    value = (int(at_wall * 1000) & ((1 << 48) - 1)) << 80 | bits
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
