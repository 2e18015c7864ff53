"""The samples of every instance in even buckets: rates and sums over the fleet, shares as means, latencies as the worst. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appliance.store.results import SampleHistory, SampleSeries

_MAX_BUCKETS = 240
_WIDTHS = (10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800)
Points = tuple[float | None, ...]  # one a bucket; None: no sample said


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bucket i covers [start_wall + i * width, ...). Rates are a second, over all instances; `worst` is over instances and samples."""

    start_wall: float
    width_seconds: float
    num_buckets: int
    covered_seconds: float  # of the range, for which any instance has samples
    output_tokens_per_second: Points
    prompt_tokens_per_second: Points
    requests_per_second: Points
    errors_per_second: Points
    rejections_per_second: Points
    ttft_p50_seconds: Points  # mean over samples
    ttft_p95_seconds: Points  # worst
    tpot_p50_seconds: Points
    tpot_p95_seconds: Points
    goodput: Points
    num_running: Points  # mean, summed over instances
    num_waiting: Points
    waiting_age_seconds: Points  # worst
    kv_utilisation: Points  # worst
    ready_share: Points
    cpu_utilisation: Points
    gpu_utilisation: Points
    gpu_power_watts: Points  # summed over instances
    joules_per_token: Points
    joules: float | None  # of the range; None: not measured

    @property
    def has_gpu(self) -> bool:
        """Whether any sample speaks of a GPU."""
        return any(value is not None for value in self.gpu_utilisation) or any(value is not None for value in self.gpu_power_watts)


@dataclass(slots=True)
class _Bucket:
    """The indices of one instance's samples in one bucket."""

    series: SampleSeries
    indices: list[int]

    def known(self, *names: str) -> list[float]:
        """The values of the first of these columns that there is, without None."""
        for name in names:
            if (column := self.series.columns.get(name)) is not None:
                return [float(value) for i in self.indices if (value := column[i]) is not None]
        return []

    def total(self, name: str) -> float | None:
        """Their sum; None where none is known."""
        values = self.known(name)
        return sum(values) if values else None

    def mean(self, name: str) -> float | None:
        """Their mean."""
        values = self.known(name)
        return sum(values) / len(values) if values else None

    def greatest(self, name: str) -> float | None:
        """Their greatest; of rollups that of what was rolled up."""
        return max(self.known(f"max_{name}", name), default=None)

    def rate(self, name: str) -> float | None:
        """A count a second of the time that its samples cover."""
        total, seconds = self.total(name), self.total("period_seconds")
        return total / seconds if total is not None and seconds else None

    def ready(self) -> float | None:
        """The share of samples with the engine ready."""
        if (states := self.series.columns.get("engine_state")) is not None:
            return sum(states[i] == "ready" for i in self.indices) / len(self.indices)
        return self.mean("ready_share")


def timeline_of(history: SampleHistory, since_wall: float, until_wall: float) -> Timeline:
    """`history` in at most 240 buckets."""
    width = _width(until_wall - since_wall, max(history.resolution_seconds, _period(history)))
    count = max(1, math.ceil((until_wall - since_wall) / width))
    buckets: list[list[_Bucket]] = [[] for _ in range(count)]
    covered: set[int] = set()
    for series in history.series:
        filled: dict[int, _Bucket] = {}
        for i, at in enumerate(series.at_wall):
            index = int((at - since_wall) // width)
            if 0 <= index < count:
                filled.setdefault(index, _Bucket(series, [])).indices.append(i)
        for index, bucket in filled.items():
            buckets[index].append(bucket)
            covered.add(index)
    joules = [total for of in buckets for bucket in of if (total := bucket.total("gpu_joules")) is not None]

    def over(of_instance: Callable[[_Bucket], float | None], combine: Callable[[list[float]], float]) -> Points:
        return tuple(_combined([of_instance(bucket) for bucket in of], combine) for of in buckets)

    return Timeline(
        start_wall=since_wall,
        width_seconds=width,
        num_buckets=count,
        covered_seconds=min(len(covered) * width, until_wall - since_wall),
        output_tokens_per_second=over(lambda b: b.rate("num_generated_tokens"), sum),
        prompt_tokens_per_second=over(lambda b: b.rate("num_prompt_tokens"), sum),
        requests_per_second=over(lambda b: b.rate("num_requests"), sum),
        errors_per_second=over(lambda b: b.rate("num_errors"), sum),
        rejections_per_second=over(lambda b: b.rate("num_rejected"), sum),
        ttft_p50_seconds=over(lambda b: b.mean("ttft_p50_seconds"), _mean),
        ttft_p95_seconds=over(lambda b: b.greatest("ttft_p95_seconds"), max),
        tpot_p50_seconds=over(lambda b: b.mean("tpot_p50_seconds"), _mean),
        tpot_p95_seconds=over(lambda b: b.greatest("tpot_p95_seconds"), max),
        goodput=over(lambda b: b.mean("goodput"), _mean),
        num_running=over(lambda b: b.mean("num_running"), sum),
        num_waiting=over(lambda b: b.mean("num_waiting"), sum),
        waiting_age_seconds=over(lambda b: b.greatest("oldest_waiting_age_seconds"), max),
        kv_utilisation=over(lambda b: b.greatest("kv_utilisation"), max),
        ready_share=over(_Bucket.ready, _mean),
        cpu_utilisation=over(lambda b: b.mean("cpu_utilisation"), _mean),
        gpu_utilisation=over(lambda b: b.mean("gpu_utilisation"), _mean),
        gpu_power_watts=over(lambda b: b.mean("gpu_power_watts"), sum),
        joules_per_token=tuple(_joules_per_token(of) for of in buckets),
        joules=sum(joules) if joules else None,
    )


def _period(history: SampleHistory) -> float:
    """The usual time that a row stands for: samples may be taken more seldom than the charts' finest buckets."""
    periods = sorted(float(value) for series in history.series for value in series.columns.get("period_seconds", ()) if value is not None)
    return periods[len(periods) // 2] if periods else 0.0


def _width(seconds: float, resolution: float) -> float:
    """The least width that is no finer than the samples and gives few enough buckets."""
    return float(next((width for width in _WIDTHS if width >= resolution and seconds / width <= _MAX_BUCKETS), _WIDTHS[-1]))


def _combined(values: Sequence[float | None], combine: Callable[[list[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _joules_per_token(of: Sequence[_Bucket]) -> float | None:
    joules = _combined([bucket.total("gpu_joules") for bucket in of], sum)
    tokens = _combined([bucket.total("num_generated_tokens") for bucket in of], sum)
    return joules / tokens if joules is not None and tokens else None
