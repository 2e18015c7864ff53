"""The recent past in buckets of a second: rates, quantiles and time-weighted means over any window up to the longest. No data is None, not zero."""

from __future__ import annotations

import math
from collections import deque

from appliance.events import WindowStats

_MAX_BUCKETS = 3600
_BINS_PER_E = 1 / math.log(1.04)  # values are binned 4 % apart, so a quantile is off by 2 % at most
_LEAST = 1e-6


class _Bucket:
    """What happened in one slice of time. Sums and bins only: its size does not grow with the traffic."""

    __slots__ = (
        *("index", "num_requests", "num_errors", "num_rejected", "num_shed", "num_judged", "num_good"),
        *("prompt_tokens", "max_output_tokens", "expected_output_tokens", "output_tokens", "flops", "moved_bytes", "busy_seconds"),
        *("ttft", "tpot", "num_ttft", "num_good_ttft", "num_tpot", "num_good_tpot"),
        *("held_seconds", "running_seconds", "waiting_seconds", "kv_seconds", "max_kv", "max_waiting_age"),
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_requests = self.num_errors = self.num_rejected = self.num_shed = self.num_judged = self.num_good = 0
        self.prompt_tokens = self.max_output_tokens = self.output_tokens = 0
        self.expected_output_tokens = self.flops = self.moved_bytes = self.busy_seconds = 0.0
        self.ttft: dict[int, int] = {}  # bin -> count
        self.tpot: dict[int, int] = {}
        self.num_ttft = self.num_good_ttft = self.num_tpot = self.num_good_tpot = 0
        self.held_seconds = self.running_seconds = self.waiting_seconds = self.kv_seconds = 0.0  # gauge integrals
        self.max_kv = self.max_waiting_age = 0.0


class History:
    """A ring of buckets that covers `longest_seconds`. Every method takes `now`, CLOCK_MONOTONIC; one thread.

    Gauges count from the step that reported them until the next one (an idle engine reports nothing and still is idle), or until `release`.
    """

    def __init__(self, longest_seconds: float, now: float) -> None:
        self._width = max(1.0, longest_seconds / _MAX_BUCKETS)
        self._longest = longest_seconds
        self._started = now
        self._buckets: deque[_Bucket] = deque()
        self._held_at: float | None = None
        self._running = self._waiting = 0
        self._kv = 0.0

    def on_admitted(self, now: float, num_prompt_tokens: int, max_tokens: int, expected_tokens: float = 0.0) -> None:
        """A request was admitted with this demand."""
        bucket = self._at(now)
        bucket.prompt_tokens += num_prompt_tokens
        bucket.max_output_tokens += max_tokens
        bucket.expected_output_tokens += expected_tokens

    def on_rejected(self, now: float) -> None:
        """A request was refused at admission, whatever the reason."""
        self._at(now).num_rejected += 1

    def on_shed(self, now: float) -> None:
        """A request got no service for want of capacity: refused, or its deadline passed in the queue."""
        self._at(now).num_shed += 1

    def on_output(self, now: float, num_tokens: int) -> None:
        """Tokens came from the engine."""
        self._at(now).output_tokens += num_tokens

    def on_ttft(self, now: float, seconds: float, good: bool) -> None:
        """A first token was sent `seconds` after its request was received."""
        bucket = self._at(now)
        bin_ = _bin(seconds)
        bucket.ttft[bin_] = bucket.ttft.get(bin_, 0) + 1
        bucket.num_ttft += 1
        bucket.num_good_ttft += good

    def on_request(self, now: float, *, error: bool, good: bool | None, tpot_seconds: float | None, good_tpot: bool | None) -> None:
        """A request finished; `good` is None where no objective judges it."""
        bucket = self._at(now)
        bucket.num_requests += 1
        bucket.num_errors += error
        if good is not None:
            bucket.num_judged += 1
            bucket.num_good += good
        if tpot_seconds is not None:
            bin_ = _bin(tpot_seconds)
            bucket.tpot[bin_] = bucket.tpot.get(bin_, 0) + 1
        if good_tpot is not None:
            bucket.num_tpot += 1
            bucket.num_good_tpot += good_tpot

    def on_step(self, now: float, num_running: int, num_waiting: int, waiting_age: float, kv_utilisation: float) -> None:
        """The engine's gauges from `now` on."""
        bucket = self._integrate(now)
        self._held_at, self._running, self._waiting, self._kv = now, num_running, num_waiting, kv_utilisation
        if waiting_age > bucket.max_waiting_age:
            bucket.max_waiting_age = waiting_age
        if kv_utilisation > bucket.max_kv:
            bucket.max_kv = kv_utilisation

    def on_work(self, now: float, busy_seconds: float, flops: float, moved_bytes: float) -> None:
        """What the engine did in steps that ended about `now`."""
        bucket = self._at(now)
        bucket.busy_seconds += busy_seconds
        bucket.flops += flops
        bucket.moved_bytes += moved_bytes

    def slice_of(self, now: float) -> int:
        """The number of the slice of time that `now` lies in; what is counted together should lie in one."""
        return int(now // self._width)

    def release(self, now: float) -> None:
        """The engine is gone: from `now` until the next step nothing is known of its gauges."""
        self._integrate(now)
        self._held_at = None

    def stats(self, seconds: float, now: float) -> WindowStats:
        """What was seen in the last `seconds`; fewer where the history is shorter, to whole buckets (WindowStats.seconds says how many)."""
        self._integrate(now)
        first = math.floor((now - min(seconds, self._longest)) / self._width) + 1
        buckets = [bucket for bucket in self._buckets if bucket.index >= first]
        covered = max(now - max(self._started, first * self._width), self._width)
        num_ttft, num_tpot = sum(b.num_ttft for b in buckets), sum(b.num_tpot for b in buckets)
        num_judged = sum(b.num_judged for b in buckets)
        held = sum(b.held_seconds for b in buckets)
        seen = [b for b in buckets if b.held_seconds > 0 or b.max_kv > 0 or b.max_waiting_age > 0]
        ttft, tpot = _merge([b.ttft for b in buckets]), _merge([b.tpot for b in buckets])
        return WindowStats(
            seconds=covered,
            num_requests=sum(b.num_requests for b in buckets),
            num_errors=sum(b.num_errors for b in buckets),
            num_rejected=sum(b.num_rejected for b in buckets),
            num_shed=sum(b.num_shed for b in buckets),
            prompt_tokens_per_second=sum(b.prompt_tokens for b in buckets) / covered,
            max_output_tokens_per_second=sum(b.max_output_tokens for b in buckets) / covered,
            output_tokens_per_second=sum(b.output_tokens for b in buckets) / covered,
            ttft_p50_seconds=_quantile(ttft, 0.5),
            ttft_p95_seconds=_quantile(ttft, 0.95),
            tpot_p50_seconds=_quantile(tpot, 0.5),
            tpot_p95_seconds=_quantile(tpot, 0.95),
            ttft_attainment=sum(b.num_good_ttft for b in buckets) / num_ttft if num_ttft else None,
            tpot_attainment=sum(b.num_good_tpot for b in buckets) / num_tpot if num_tpot else None,
            goodput=sum(b.num_good for b in buckets) / num_judged if num_judged else None,
            mean_running=sum(b.running_seconds for b in buckets) / held if held else None,
            mean_waiting=sum(b.waiting_seconds for b in buckets) / held if held else None,
            mean_kv_utilisation=sum(b.kv_seconds for b in buckets) / held if held else None,
            max_kv_utilisation=max((b.max_kv for b in seen), default=None),
            max_waiting_age_seconds=max((b.max_waiting_age for b in seen), default=None),
            expected_output_tokens_per_second=sum(b.expected_output_tokens for b in buckets) / covered,
            flops_per_second=sum(b.flops for b in buckets) / covered,
            moved_bytes_per_second=sum(b.moved_bytes for b in buckets) / covered,
            busy_ratio=min(1.0, sum(b.busy_seconds for b in buckets) / covered),
        )

    def _at(self, now: float) -> _Bucket:
        """The bucket of `now`."""
        index = int(now // self._width)
        buckets = self._buckets
        if buckets and buckets[-1].index >= index:
            return buckets[-1] if buckets[-1].index == index else self._earlier(index)
        bucket = _Bucket(index)
        buckets.append(bucket)
        oldest = index - math.ceil(self._longest / self._width)
        while buckets[0].index < oldest:
            buckets.popleft()
        return bucket

    def _earlier(self, index: int) -> _Bucket:
        """A bucket before the newest: what is counted in rows comes a moment late."""
        position = len(self._buckets) - 1
        while position and self._buckets[position - 1].index >= index:
            position -= 1
        if self._buckets[position].index != index:
            self._buckets.insert(position, _Bucket(index))
        return self._buckets[position]

    def _integrate(self, now: float) -> _Bucket:
        """Add the held gauges up to `now`, slice by slice; the bucket of `now`."""
        at = self._held_at
        if at is None or now <= at:
            return self._at(now)
        buckets = self._buckets
        if buckets and buckets[-1].index == int(now // self._width) == int(at // self._width):  # nearly always: steps take milliseconds
            self._hold(buckets[-1], now - at)
            self._held_at = now
            return buckets[-1]
        at = max(at, now - self._longest)
        while at < now:
            end = min(now, (at // self._width + 1) * self._width)
            if end <= at:  # rounding of a large clock reading
                end = now
            self._hold(self._at(at), end - at)
            at = end
        self._held_at = now
        return self._at(now)

    def _hold(self, bucket: _Bucket, seconds: float) -> None:
        bucket.held_seconds += seconds
        bucket.running_seconds += self._running * seconds
        bucket.waiting_seconds += self._waiting * seconds
        bucket.kv_seconds += self._kv * seconds
        if self._kv > bucket.max_kv:
            bucket.max_kv = self._kv


def _bin(seconds: float) -> int:
    return math.floor(math.log(max(seconds, _LEAST)) * _BINS_PER_E)


def _merge(bins: list[dict[int, int]]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for one in bins:
        for bin_, count in one.items():
            merged[bin_] = merged.get(bin_, 0) + count
    return merged


def _quantile(bins: dict[int, int], share: float) -> float | None:
    """The middle (geometric) of the bin that holds the quantile by nearest rank; None without values."""
    rank = math.ceil(share * sum(bins.values()))
    for bin_ in sorted(bins):
        rank -= bins[bin_]
        if rank <= 0:
            return math.exp((bin_ + 0.5) / _BINS_PER_E)
    return None
