"""What was promised to users, and whether a finished request kept it."""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.errors import DeadlineExceeded
from appliance.events import LedgerState, RequestRecord
from appliance.settings import SloSettings

CHAT = "/v1/chat/completions"
GENERATION_ENDPOINTS = frozenset({CHAT, "/v1/completions"})


@dataclass(frozen=True, slots=True)
class Slo:
    """Thresholds in seconds, and the share of requests that must keep them."""

    ttft_seconds: float
    tpot_seconds: float
    target: float = 0.99
    reason: str = "configured"


def choose_slo(settings: SloSettings, device: str) -> Slo:
    """The SLO of this node: what is configured, else a default for `device` ("cuda" or "cpu").

    A GPU that serves well starts to answer within 0.5 s, below which a chat feels immediate, and streams at 30 ms a token (33 tokens/s),
    several times reading speed, so that agents are not held up either; vLLM's ITL on a Hopper GPU is 2-7 ms alone and about 10 ms under load, which
    leaves room for prefill of others. A CPU prefills hundreds, not tens of thousands, of tokens a second: a 500-token prompt takes over a
    second, so 2 s to the first token, and 100 ms a token (10 tokens/s), which still outruns a reader (4-7 tokens/s).
    """
    ttft_seconds, tpot_seconds = (0.5, 0.03) if device == "cuda" else (2.0, 0.1)
    chosen = [name for name, value in (("ttft", settings.ttft_seconds), ("tpot", settings.tpot_seconds)) if value is None]
    reason = f"default of {device} for {' and '.join(chosen)}" if chosen else "configured"
    return Slo(settings.ttft_seconds or ttft_seconds, settings.tpot_seconds or tpot_seconds, settings.target, reason)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Good (True), bad (False), or not judged (None), by objective."""

    ttft: bool | None
    tpot: bool | None
    both: bool | None = field(init=False)  # bad if either is, None where neither is judged

    def __post_init__(self) -> None:
        judged = [good for good in (self.ttft, self.tpot) if good is not None]
        object.__setattr__(self, "both", all(judged) if judged else None)


_JUDGEMENTS = {(ttft, tpot): Judgement(ttft, tpot) for ttft in (None, False, True) for tpot in (None, False, True)}
NOT_JUDGED = _JUDGEMENTS[None, None]
_BAD = _JUDGEMENTS[False, False]


def judge(record: RequestRecord, slo: Slo) -> Judgement:
    """Whether `record` kept the SLO.

    Not judged: routes that generate nothing, and what the client got wrong (4xx, its own rate limit included). Our failures (5xx, refusals for
    want of capacity included) are bad. A client that left (499) is judged by what it got; if it left before the first token, its wait counts
    as bad once it was longer than the TTFT threshold, and is not judged otherwise. A request under two tokens has no TPOT to judge.
    """
    if record.endpoint not in GENERATION_ENDPOINTS:
        return NOT_JUDGED
    if record.status >= 500:
        return _BAD
    if 400 <= record.status < 499:
        return NOT_JUDGED
    if record.ttft_seconds is None:
        return _JUDGEMENTS[False, None] if record.duration_seconds > slo.ttft_seconds else NOT_JUDGED
    tpot = None if record.tpot_seconds is None else record.tpot_seconds <= slo.tpot_seconds
    return _JUDGEMENTS[record.ttft_seconds <= slo.ttft_seconds, tpot]


def expired_in_queue(record: RequestRecord) -> bool:
    """Whether `record` ended because its deadline passed before the engine ever ran it, though the engine was up all the while."""
    if record.error_code != DeadlineExceeded.code or record.ttft_seconds is not None or record.num_engine_restarts:
        return False
    ran = any(record.states.get(state, 0.0) for state in (LedgerState.PREFILL, LedgerState.PREFILL_WAIT, LedgerState.DECODE))
    return record.states.get(LedgerState.QUEUED, 0.0) > 0 and not ran
