"""What presses a node to ask for more replicas: each signal against its limit, as a ratio and in words. Pure functions of a Snapshot.

A ratio above 1 asks for more. Hard signals (requests turned away, queue age, a stall) speak for themselves on the fast window; soft ones (TTFT, TPOT,
KV) need the fast and the slow window to agree, so their ratio is the smaller of the two. No signal is built on the number of running requests: it is
bounded by the slots, so it would never reach its target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from appliance.events import Snapshot, WindowStats

MIN_MEAN_WAITING = 0.5
"""A queue that is empty most of the fast window is one long prompt passing, not a lack of replicas."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the node may not exceed. Seconds, and ratios in 0-1."""

    queue_age_seconds: float
    ttft_seconds: float
    tpot_seconds: float
    kv_utilisation: float
    slo_target: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """One signal: `ratio` > 1 asks for more replicas; `text` says why, or why it does not count."""

    name: str
    ratio: float
    text: str


def pressures(snapshot: Snapshot, limits: Limits, relief: str = "") -> tuple[Pressure, ...]:
    """Every signal of `snapshot`, the hard ones first. Ratios are 0.0 where there is nothing to judge.

    `relief`: why the queue, and the TTFT that it makes, will be well before a new replica could serve; empty where they will not.
    """
    ttft = _latency("TTFT", snapshot, limits.ttft_seconds, limits.slo_target, lambda w: (w.ttft_p95_seconds, w.ttft_attainment))
    return (
        _shed(snapshot.fast),
        _relieved(_queue(snapshot, limits), relief),
        _relieved(ttft, relief),
        _latency("TPOT", snapshot, limits.tpot_seconds, limits.slo_target, lambda w: (w.tpot_p95_seconds, w.tpot_attainment)),
        _kv(snapshot, limits),
    )


def concurrency(window: WindowStats) -> float:
    """Mean number of requests in the node, running or waiting; 0.0 without data."""
    return (window.mean_running or 0.0) + (window.mean_waiting or 0.0)


def _relieved(pressure: Pressure, relief: str) -> Pressure:
    """`pressure`, brought to its limit where it will pass by itself."""
    return Pressure(pressure.name, 1.0, f"{pressure.text}, but {relief}") if relief and pressure.ratio > 1 else pressure


def _shed(fast: WindowStats) -> Pressure:
    """All requests over those that were served (each plus one, so that a single one counts), where some were turned away for want of capacity."""
    if not fast.num_shed:
        return Pressure("demand", 0.0, "no request was turned away for want of capacity")
    num_requests = max(fast.num_requests, fast.num_shed)
    ratio = (num_requests + 1) / (num_requests - fast.num_shed + 1)
    return Pressure("demand", ratio, f"{fast.num_shed} of {num_requests} requests in {fast.seconds:.0f} s were turned away for want of capacity")


def _queue(snapshot: Snapshot, limits: Limits) -> Pressure:
    """The oldest waiting request's age against its limit, where the queue is more than a passing one."""
    if snapshot.num_waiting == 0:
        return Pressure("queue", 0.0, "nothing waits")
    age, limit = snapshot.oldest_waiting_age_seconds, limits.queue_age_seconds
    ratio = age / limit
    text = f"the oldest of {snapshot.num_waiting} waiting requests is {age:.2f} s old, {ratio:.1f}x its limit of {limit:.2f} s"
    if snapshot.num_running == 0 and ratio > 1:
        return Pressure("stall", ratio, f"admission is stalled: nothing runs, and {text}")
    if ratio > 1 and (snapshot.fast.mean_waiting or 0.0) < MIN_MEAN_WAITING:
        return Pressure("queue", 1.0, f"{text}, but on average only {snapshot.fast.mean_waiting or 0.0:.2f} waited in {snapshot.fast.seconds:.0f} s")
    return Pressure("queue", ratio, text)


def _latency(
    name: str, snapshot: Snapshot, limit: float, target: float, read: Callable[[WindowStats], tuple[float | None, float | None]]
) -> Pressure:
    """p95 over the SLO where the promised share is missed, in both windows. A node that serves one request at a time has no load to share:
    its latency is that of a lone request, which no replica shortens."""
    ratios = []
    for window in (snapshot.fast, snapshot.slow):
        p95, attainment = read(window)
        if p95 is None or attainment is None:
            return Pressure(name, 0.0, f"no {name} within {window.seconds:.0f} s")
        ratios.append(max(p95 / limit, 1.0 + target - attainment) if attainment < target else min(p95 / limit, 1.0))
    (fast, fast_share), (slow, slow_share) = read(snapshot.fast), read(snapshot.slow)
    text = (
        f"{name} p95 is {fast:.3f} s over {snapshot.fast.seconds:.0f} s and {slow:.3f} s over {snapshot.slow.seconds:.0f} s (SLO {limit:.3f} s), "
        f"{fast_share:.1%} and {slow_share:.1%} within it (target {target:.1%})"
    )
    ratio = min(ratios)
    if ratio > 1 and min(concurrency(snapshot.fast), concurrency(snapshot.slow)) <= 1.0:
        return Pressure(name, 1.0, f"{text}, but requests are alone in the node: a replica would not make them faster")
    return Pressure(name, ratio, text)


def _kv(snapshot: Snapshot, limits: Limits) -> Pressure:
    """Mean KV use against its limit, in both windows."""
    fast, slow = snapshot.fast.mean_kv_utilisation, snapshot.slow.mean_kv_utilisation
    if fast is None or slow is None:
        return Pressure("KV", 0.0, "KV use is unknown")
    windows = f"{fast:.1%} over {snapshot.fast.seconds:.0f} s and {slow:.1%} over {snapshot.slow.seconds:.0f} s"
    text = f"KV use is {windows} (limit {limits.kv_utilisation:.1%})"
    return Pressure("KV", min(fast, slow) / limits.kv_utilisation, text)
