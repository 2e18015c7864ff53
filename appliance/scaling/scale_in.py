"""How few replicas would hold the load that the slow window saw. Pure; every doubt is an answer of "not fewer".

Taking replicas away multiplies each survivor's load by n / m. KV use grows by that factor; latency by at most it (a step's time is affine in its
batch), and not at all where requests stay alone. On top of these bounds the policy remembers the load at which it last had to scale out: what was too
much for a replica then is not put on one again, which is why a constant load cannot flap.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.events import WindowStats
from appliance.scaling.pressure import Limits, concurrency


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens a second on one replica: prompts as admitted, outputs as generated."""

    prompt_tokens_per_second: float
    output_tokens_per_second: float

    @classmethod
    def of(cls, window: WindowStats) -> Load:
        """The load that `window` saw."""
        return cls(window.prompt_tokens_per_second, window.output_tokens_per_second)

    def share_of(self, ceiling: Load) -> float:
        """This load over `ceiling`, the mean of both kinds of tokens (those that the ceiling had)."""
        pairs = (
            (self.prompt_tokens_per_second, ceiling.prompt_tokens_per_second),
            (self.output_tokens_per_second, ceiling.output_tokens_per_second),
        )
        shares = [own / most for own, most in pairs if most > 0]
        return sum(shares) / len(shares) if shares else 0.0

    def or_more(self, other: Load) -> Load:
        """The larger of each kind."""
        return Load(
            max(self.prompt_tokens_per_second, other.prompt_tokens_per_second), max(self.output_tokens_per_second, other.output_tokens_per_second)
        )


def fewest_replicas(window: WindowStats, limits: Limits, *, current: int, floor: int, headroom: float, ceiling: Load | None) -> tuple[int, str]:
    """Fewest replicas in [floor, current] that would hold the load of `window` at `headroom` (0-1) of every limit, and why not one fewer."""
    fewest, reason = current, "already at the fewest allowed"
    for candidate in range(current - 1, floor - 1, -1):
        blocked = _objection(window, limits, current / candidate if candidate else None, headroom, ceiling)
        if blocked:
            return fewest, f"{candidate} would not hold it: {blocked}"
        fewest, reason = candidate, f"{floor} is the fewest allowed"
    return fewest, reason


def _objection(window: WindowStats, limits: Limits, factor: float | None, headroom: float, ceiling: Load | None) -> str:
    """Why `factor` times the load of `window` on each replica would not hold; empty if it would. None: no replica would be left."""
    if factor is None:
        return "" if is_idle(window) else f"{window.num_requests} requests came in {window.seconds:.0f} s, and none would serve them"
    if window.mean_running is None or window.max_kv_utilisation is None:
        return "the slow window has no data"
    if window.num_shed:
        return f"{window.num_shed} requests were turned away for want of capacity in {window.seconds:.0f} s"
    age = window.max_waiting_age_seconds or 0.0
    if age > limits.queue_age_seconds * headroom / factor:
        return f"a request waited {age:.2f} s"
    checks = [("KV use", window.max_kv_utilisation * factor, limits.kv_utilisation * headroom)]
    slowdown = factor if concurrency(window) * factor > 1 else 1.0
    for name, seconds, limit in (
        ("TTFT p95", window.ttft_p95_seconds, limits.ttft_seconds),
        ("TPOT p95", window.tpot_p95_seconds, limits.tpot_seconds),
    ):
        if seconds is None:
            # A reply of one token has no TPOT; a window with requests but no first token has no verdict.
            if name == "TTFT p95" and not is_idle(window):
                return "requests ran but no first token was seen"
            continue
        checks.append((name, seconds * slowdown, limit * headroom))
    if ceiling is not None:
        checks.append(("share of the load that was once too much", Load.of(window).share_of(ceiling) * factor, headroom))
    for name, expected, allowed in checks:
        if expected > allowed:
            return f"{name} would be {expected:.3g}, over {allowed:.3g}"
    return ""


def is_idle(window: WindowStats) -> bool:
    """Nothing came, ran or waited. Fresh zeros are data; a missing value is not idle."""
    return window.num_requests == 0 and window.mean_running == 0 and window.mean_waiting == 0 and window.prompt_tokens_per_second == 0
