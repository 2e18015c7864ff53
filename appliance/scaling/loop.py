"""The policy loop: takes a snapshot every few seconds, lets the policy judge it, and writes what it decides down together with the signals to send.

A decision counts once it is stored. While the database is away it is taken again at every run, so nothing is announced that no one could account for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import SQLAlchemyError

from appliance.clock import Clock
from appliance.errors import InvalidRequest
from appliance.events import ScaleDecision, Snapshot
from appliance.scaling.policy import Hold, Policy, PolicyState, decision_id
from appliance.scaling.webhook import Courier, cloud_event
from appliance.store.outbox import Message, Outbox

_log = logging.getLogger(__name__)


class LoopObserver(Protocol):
    """Hears of every run, on the event loop. The metrics recorder implements it."""

    def on_policy(self, desired_replicas: int, direction: str | None = None, *, pinned: bool) -> None:
        """The loop ran; `direction` where it decided on a change. `pinned`: it wants more than max_replicas, decided on or not."""


@dataclass(frozen=True, slots=True)
class ScaleView:
    """What the loop last found, for whoever polls. `age_seconds` is None before the first run."""

    instance_id: str
    fleet: str
    mode: str
    desired_replicas: int
    current_replicas: int
    pinned: bool
    sequence: int
    age_seconds: float | None
    hold: Hold | None
    last_decision: ScaleDecision | None
    disabled_endpoints: tuple[str, ...]


class ScalingLoop:
    """Owns the policy's state. Lives on the event loop; runs never overlap.

    Without an `outbox` (the store is off) decisions stay in memory and nothing is delivered. Without a `courier` (no endpoints) they are recorded.
    """

    def __init__(
        self,
        policy: Policy,
        snapshot: Callable[[], Snapshot],
        *,
        clock: Clock,
        outbox: Outbox | None = None,
        courier: Courier | None = None,
        endpoints: tuple[str, ...] = (),
        observer: LoopObserver | None = None,
    ) -> None:
        self.policy = policy
        self.state = PolicyState.fresh(clock.monotonic())
        self.last_decision: ScaleDecision | None = None
        self.hold: Hold | None = None
        self._snapshot = snapshot
        self._clock = clock
        self._outbox = outbox
        self._courier = courier
        self._endpoints = endpoints
        self._observer = observer
        self._restored = outbox is None
        self._settled = True  # whether the last decision needs no second look: delivered, or nothing to deliver
        self._ran_at: float | None = None
        self._disabled: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def schedule(self, scheduler: AsyncIOScheduler, interval_seconds: float) -> None:
        """Run every `interval_seconds`. A late run still counts (APScheduler's own grace of 1 s would drop it); missed ones are made up for once."""
        scheduler.add_job(
            self.run,
            "interval",
            seconds=interval_seconds,
            id="scaling-policy",
            coalesce=True,
            max_instances=1,
            misfire_grace_time=max(60, int(10 * interval_seconds)),
            replace_existing=True,
        )

    async def run(self) -> ScaleDecision | Hold:
        """One look at the machine. Never raises for a database that is away; says so as a Hold of kind no_store."""
        async with self._lock:
            try:
                answer = await self._run()
            except (SQLAlchemyError, OSError) as error:
                _log.warning("the policy loop cannot reach the database (%s): it holds", type(error).__name__)
                answer = Hold("no_store", f"the database is away ({type(error).__name__}), so no decision can be recorded")
            decision = answer if isinstance(answer, ScaleDecision) else None
            self.hold = answer if isinstance(answer, Hold) else None
            self._ran_at = self._clock.monotonic()
            if self._observer is not None:
                self._observer.on_policy(self.state.desired_replicas, decision.direction if decision else None, pinned=self.state.pinned)
            return answer

    async def approve(self, decision_id: str, *, by: str = "") -> ScaleDecision:
        """Deliver a decision that waits for approval. Raises NotFound, InvalidRequest (not open, expired), SQLAlchemyError or OSError."""
        if self._outbox is None:
            raise InvalidRequest("store.enabled is off: decisions are not kept, so there is nothing to approve", code="not_approvable")
        async with self._lock:
            decision = await self._outbox.find(decision_id)
            num_superseded = await self._outbox.approve(decision_id, await self._messages(decision), by=by, now_wall=self._clock.wall())
            self.state = self.state.with_current(decision.desired_replicas, self._clock.monotonic())
            self._settled = False
            if self._courier is not None:
                self._courier.wake(num_superseded=num_superseded)
            return decision

    def observe_replicas(self, replicas: int) -> None:
        """An outside source says how many replicas there are (or are starting). Overrides what the loop assumes."""
        self.state = self.state.with_current(replicas, self._clock.monotonic())

    async def enable_endpoint(self, endpoint: str) -> bool:
        """Use an endpoint again that had answered 410. Returns whether it was disabled."""
        return self._outbox is not None and await self._outbox.enable(endpoint)

    @property
    def age_seconds(self) -> float | None:
        """Seconds since the newest run; None before the first."""
        return None if self._ran_at is None else self._clock.monotonic() - self._ran_at

    def view(self) -> ScaleView:
        """The desired state now."""
        config = self.policy.config
        return ScaleView(
            instance_id=config.instance_id,
            fleet=config.fleet,
            mode=config.mode,
            desired_replicas=min(max(self.state.desired_replicas, config.min_replicas), config.max_replicas),
            current_replicas=self.state.current_replicas,
            pinned=self.state.pinned,
            sequence=self.state.sequence,
            age_seconds=self.age_seconds,
            hold=self.hold,
            last_decision=self.last_decision,
            disabled_endpoints=tuple(sorted(self._disabled)),
        )

    async def _run(self) -> ScaleDecision | Hold:
        if not self._restored:
            await self._restore()
        self._lapse()
        if repeated := await self._repeat():
            return repeated
        before = self.state
        answer, after = self.policy.decide(self._snapshot(), before, self._clock.monotonic())
        if isinstance(answer, Hold):
            self.state = after
            return answer
        self.state = after.without_decision(before)  # what holds if the decision cannot be stored
        await self._record(answer)
        self.state = after
        return answer

    async def _record(self, decision: ScaleDecision) -> None:
        """Store the decision with its signals, and have them sent."""
        config = self.policy.config
        messages = await self._messages(decision) if config.mode == "act" else []
        if self._outbox is not None:
            outcome = {"act": None if messages else "no endpoint", "approve": None}.get(config.mode, "recorded")
            await self._store(self._outbox, decision, messages, outcome=outcome)
        self.last_decision = decision
        self._settled = not messages
        _log.info("scale %s to %d (%s): %s", decision.direction, decision.desired_replicas, decision.mode, decision.reason)

    async def _messages(self, decision: ScaleDecision) -> list[Message]:
        """One message for each endpoint that is in use."""
        if self._outbox is None or self._courier is None or not self._endpoints:
            return []
        self._disabled = await self._outbox.disabled_endpoints()
        body = cloud_event(decision)
        return [Message(endpoint, body) for endpoint in self._endpoints if endpoint not in self._disabled]

    async def _restore(self) -> None:
        """Go on where the process before left off: its sequence numbers, and the replicas that it had asked for."""
        assert self._outbox is not None
        found = await self._outbox.last_decision()
        config = self.policy.config
        if found is not None:
            last, carried_out = found
            current = last.desired_replicas if carried_out else last.current_replicas
            desired = last.desired_replicas if last.mode == config.mode else current  # another mode has announced nothing yet
            self.state = replace(self.state.with_current(current, self._clock.monotonic()), desired_replicas=desired, sequence=last.sequence)
            self.last_decision = last
            self._settled = not carried_out
        self._disabled = await self._outbox.disabled_endpoints()
        self._restored = True

    def _lapse(self) -> None:
        """A decision that nobody approved in its time is void: while its cause lasts, it is taken again."""
        last, current = self.last_decision, self.state.current_replicas
        if self.policy.config.mode != "approve" or last is None or last.expires_wall > self._clock.wall():
            return
        if self.state.desired_replicas != current:
            self.state = replace(self.state, desired_replicas=current)

    async def _repeat(self) -> ScaleDecision | None:
        """The last decision again, where its signals expired undelivered: the fleet must not stay at a number that was never heard."""
        last = self.last_decision
        if self._settled or last is None or self._outbox is None or last.expires_wall > self._clock.wall():
            return None
        counts = await self._outbox.num_by_state(last.id)
        if counts.get("pending"):
            return None
        if not counts.get("dead") or last.desired_replicas != self.state.desired_replicas:
            self._settled = True
            return None
        config, at_wall, sequence = self.policy.config, self._clock.wall(), self.state.sequence + 1
        told = last.reason.rpartition("was not delivered: ")[2]
        again = msgspec.structs.replace(
            last,
            id=decision_id(config, sequence, at_wall),
            sequence=sequence,
            at_wall=at_wall,
            expires_wall=at_wall + config.signal_ttl_seconds,
            reason=f"repeats sequence {last.sequence}, which was not delivered: {told}",
        )
        messages = await self._messages(again)
        outcome = None if messages else "no endpoint"
        await self._store(self._outbox, again, messages, outcome=outcome, approved=again.mode == "approve")  # it needs no second approval
        self.last_decision = again
        self._settled = not messages
        self.state = replace(self.state, sequence=sequence)
        return again

    async def _store(self, outbox: Outbox, decision: ScaleDecision, messages: list[Message], *, outcome: str | None, approved: bool = False) -> None:
        try:
            num_superseded = await outbox.record(decision, messages, outcome=outcome, approved=approved)
        except (SQLAlchemyError, OSError):
            self._restored = False  # it may have been committed all the same: read back what the database holds
            raise
        if self._courier is not None and messages:
            self._courier.wake(num_superseded=num_superseded)
