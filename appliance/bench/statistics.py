"""Latency figures with the definitions of vLLM's own client.

TTFT: first byte written to the first chunk with a token. ITL: each gap between two chunks with tokens. e2e: first byte written to the last
chunk with data. TPOT: (e2e - TTFT) / (n - 1), n by the server's usage, of requests with n > 1. Throughput counts completed requests over the
time from the first byte sent to the last chunk received.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from appliance.bench.records import Distribution, LevelReport, Outcome

CLAIMABLE_SHARE = 0.5  # of the client's own ceiling; above it the client may be what is measured


def percentile(ordered: Sequence[float], share: float) -> float:
    """The `share` (0-1) quantile of sorted, non-empty values, linearly interpolated."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution(values: Sequence[float]) -> Distribution | None:
    """The distribution of `values`; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Distribution(math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1], len(ordered))


def output_tokens(outcome: Outcome) -> int:
    """Tokens of one request: the server's usage, or its chunks where it sent none."""
    return outcome.num_chunks if outcome.num_output_tokens is None else outcome.num_output_tokens


def summarise(
    outcomes: Sequence[Outcome],
    *,
    concurrency: int | None,
    request_rate: float | None,
    client_cpu_seconds: float = 0.0,
    ceiling_events_per_second: float | None = None,
) -> LevelReport:
    """The report of one level. `outcomes` holds every request, failed ones included; latencies are those of completed ones."""
    good = [o for o in outcomes if o.error is None]
    started = min((o.started_at for o in outcomes), default=0.0)
    duration = max((o.last_at for o in good), default=started) - started
    e2e = [o.last_at - o.started_at for o in good]
    tokens = [output_tokens(o) for o in good]
    tpot = [(o.last_at - o.first_at) / (n - 1) for o, n in zip(good, tokens, strict=True) if n > 1]
    num_input, num_output = sum(o.num_prompt_tokens for o in good), sum(tokens)
    events = sum(o.num_chunks for o in good) / duration if duration > 0 else 0.0
    rate = 1 / duration if duration > 0 else 0.0
    lags = sorted(o.lag_seconds for o in outcomes)
    return LevelReport(
        label=f"c={concurrency}" if request_rate is None else f"{request_rate:g} req/s",
        concurrency=concurrency,
        request_rate=request_rate,
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(good),
        duration_seconds=duration,
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        requests_per_second=len(good) * rate,
        output_tokens_per_second=num_output * rate,
        total_tokens_per_second=(num_input + num_output) * rate,
        events_per_second=events,
        ttft=distribution([o.first_at - o.started_at for o in good if o.first_at]),
        tpot=distribution(tpot),
        itl=distribution([gap for o in good for gap in o.gaps]),
        e2e=distribution(e2e),
        send_lag_p99_seconds=percentile(lags, 0.99) if request_rate is not None and lags else None,
        usage_missing=any(o.num_output_tokens is None for o in good),
        client_cpu_share=client_cpu_seconds / duration if duration > 0 else 0.0,
        claimable=None if ceiling_events_per_second is None else events <= CLAIMABLE_SHARE * ceiling_events_per_second,
        errors=dict(Counter(o.error for o in outcomes if o.error is not None).most_common(5)),
    )
