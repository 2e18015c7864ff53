"""What a report says in words: the SLO, errors, incidents, capacity, energy. Pure; each sentence holds its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.report.charts import moment, number, span
from appliance.report.collect import ReportData
from appliance.report.timeline import Points

FAULTS = frozenset({"crashed", "hung", "failed"})
_MIN_BUCKETS = 3  # in which the SLO was kept, before they say anything about capacity


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence; `bad` where somebody should look."""

    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """How near the fleet came to one limit: the share of it that was used, by bucket; above 1 it was passed."""

    name: str
    used: Points

    @property
    def greatest(self) -> float | None:
        """The nearest that it came; None where it was never measured."""
        return max((share for share in self.used if share is not None), default=None)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is left. `tokens_per_second` (prompt and output) is the most that was served while the SLO was kept, so at least that can be; None where
    too little was measured."""

    limits: tuple[Limit, ...]
    tokens_per_second: float | None
    mean_load: float | None  # share of that

    @property
    def nearest(self) -> Limit | None:
        """The limit that came nearest; None where none was measured."""
        measured = [limit for limit in self.limits if limit.greatest is not None]
        return max(measured, key=lambda limit: limit.greatest or 0.0, default=None)


def findings(data: ReportData) -> list[Finding]:
    """The most important first."""
    return [*_slo(data), *_errors(data), *_incidents(data), *_capacity(data), *_queue(data), *_scaling(data), *_energy(data), *_gaps(data)]


def capacity(data: ReportData) -> Capacity:
    """From the samples: the worst 95th percentiles over the SLO's thresholds, and KV use over the policy's limit."""
    timeline = data.timeline
    limits = (
        Limit("TTFT p95", _over(timeline.ttft_p95_seconds, data.slo.ttft_seconds)),
        Limit("TPOT p95", _over(timeline.tpot_p95_seconds, data.slo.tpot_seconds)),
        Limit("KV cache", _over(timeline.kv_utilisation, data.kv_limit)),
    )
    both = zip(timeline.output_tokens_per_second, timeline.prompt_tokens_per_second, strict=True)
    rates = [None if output is None else output + (prompt or 0.0) for output, prompt in both]
    kept = [
        rate
        for rate, goodput in zip(rates, timeline.goodput, strict=True)
        if rate is not None and rate > 0 and goodput is not None and goodput >= data.slo.target
    ]
    if len(kept) < _MIN_BUCKETS:
        return Capacity(limits, None, None)
    known = [rate for rate in rates if rate is not None]
    return Capacity(limits, max(kept), sum(known) / len(known) / max(kept))


def _over(values: Points, limit: float) -> Points:
    return tuple(None if value is None else value / limit for value in values)


def _slo(data: ReportData) -> list[Finding]:
    total = data.total
    if total.goodput is None:
        return [Finding("No request was judged by the SLO.")]
    kept = total.goodput >= data.slo.target
    text = (
        f"{number(total.goodput, share=True)} of {total.num_judged:,} judged requests were within the SLO; the target is "
        f"{number(data.slo.target, share=True)}: {'kept' if kept else 'missed'}."
    )
    sentences = [Finding(text, bad=not kept)]
    hours = [hour for hour in data.hours if hour.usage.goodput is not None]
    missed = [hour for hour in hours if (hour.usage.goodput or 0.0) < data.slo.target]
    if missed:
        worst = min(missed, key=lambda hour: hour.usage.goodput or 0.0)
        sentences.append(
            Finding(
                f"It was missed in {len(missed)} of {len(hours)} hours with requests; the worst began {moment(worst.start_wall)} UTC with "
                f"{number(worst.usage.goodput, share=True)} (TTFT {number(worst.usage.ttft_attainment, share=True)}, "
                f"TPOT {number(worst.usage.tpot_attainment, share=True)}).",
                bad=True,
            )
        )
    return sentences


def _errors(data: ReportData) -> list[Finding]:
    total = data.total
    if not total.num_requests:
        return []
    if not total.num_errors and not total.num_rejected:
        return [Finding(f"None of {total.num_requests:,} requests failed on our side or was refused.")]
    share = total.num_errors / total.num_requests
    text = (
        f"{total.num_errors:,} of {total.num_requests:,} requests ({number(share, share=True)}) ended with 5xx; {total.num_rejected:,} were refused"
    )
    return [Finding(f"{text} (429 or 503).", bad=total.num_errors > 0)]


def _incidents(data: ReportData) -> list[Finding]:
    faults = [stored for stored in data.events if stored.event.kind in FAULTS]
    shares = [share for share in data.timeline.ready_share if share is not None]
    down = sum(1 - share for share in shares) * data.timeline.width_seconds
    sentences = []
    if faults:
        newest = faults[0].event
        times = "once" if len(faults) == 1 else f"{len(faults)} times, last"
        text = f"The engine crashed, hung or failed {times} at {moment(newest.at_wall)} UTC: {newest.detail or newest.kind}."
        sentences.append(Finding(text, bad=True))
    if down >= data.timeline.width_seconds / 2:
        sentences.append(Finding(f"While the server ran, an engine was not ready for about {span(down)}, loading included.", bad=bool(faults)))
    return sentences


def _capacity(data: ReportData) -> list[Finding]:
    found = capacity(data)
    nearest, sentences = found.nearest, []
    if nearest is not None and (greatest := nearest.greatest) is not None:
        at = data.timeline.start_wall + nearest.used.index(greatest) * data.timeline.width_seconds
        left = f"{number(1 - greatest, share=True)} of it was left" if greatest <= 1 else "nothing was left"
        text = f"The nearest limit was {nearest.name}, at {number(greatest, share=True)} of what is allowed around {moment(at)} UTC: {left}."
        sentences.append(Finding(text, bad=greatest > 1))
    if found.tokens_per_second is None:
        return [*sentences, Finding("Too little was measured while the SLO was kept to say how many tokens a second can be served.")]
    text = f"The most that was served within the SLO is {number(found.tokens_per_second)} tokens/s (prompt and output); "
    return [*sentences, Finding(f"{text}the mean load was {number(found.mean_load, share=True)} of that.")]


def _queue(data: ReportData) -> list[Finding]:
    oldest = max((age for age in data.timeline.waiting_age_seconds if age is not None), default=0.0)
    busiest = max(data.hours, key=lambda hour: hour.usage.num_requests, default=None)
    sentences = []
    if busiest is not None:
        usage = busiest.usage
        text = (
            f"The busiest hour began {moment(busiest.start_wall)} UTC: {usage.num_requests:,} requests, {usage.num_generated_tokens:,} output tokens"
        )
        sentences.append(Finding(f"{text}, goodput {number(usage.goodput, share=True)}."))
    if oldest > 0:
        sentences.append(Finding(f"The longest wait in the queue that a sample saw was {span(oldest)}."))
    return sentences


def _scaling(data: ReportData) -> list[Finding]:
    if not data.decisions:
        return []
    newest = data.decisions[0].decision
    pinned = any(stored.decision.direction == "pinned" for stored in data.decisions)
    text = f"{len(data.decisions)} scale decisions; the last asked for {newest.desired_replicas} replicas: {newest.reason}"
    more = " More than max_replicas was wanted." if pinned else ""
    return [Finding(text.rstrip(".") + "." + more, bad=pinned)]


def _energy(data: ReportData) -> list[Finding]:
    joules = data.timeline.joules
    if joules is None:
        return []
    tokens = data.total.num_generated_tokens
    each = f", {number(joules / tokens)} J per output token, idle time included" if tokens else ""
    return [Finding(f"The GPUs took {number(joules / 3.6e6)} kWh{each}.")]


def _gaps(data: ReportData) -> list[Finding]:
    missing = (data.until_wall - data.since_wall) - data.timeline.covered_seconds
    if missing < max(data.timeline.width_seconds, 0.01 * (data.until_wall - data.since_wall)):
        return []
    return [Finding(f"For {span(missing)} of the range there are no samples: no server ran, or it had just begun.")]
