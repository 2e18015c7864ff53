"""From two looks at an appliance to the figures that people read. Pure: scrapes in, figures out. None means not known, which is not zero."""

from __future__ import annotations

from collections import deque

import msgspec

from appliance.top.scrape import Histogram, Scrape

WINDOW_SECONDS = 60.0  # latencies, shares and energy are of so much; rates of the newest interval
_MAX_POINTS = 120
_GPU_VALUES = ("memory_used_bytes", "memory_bytes", "power_watts", "temperature_celsius")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU now."""

    index: str
    name: str
    utilisation: float | None
    memory_used_bytes: float | None
    memory_bytes: float | None
    power_watts: float | None
    temperature_celsius: float | None
    throttled: tuple[str, ...]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a look tells. Seconds, bytes, watts; shares 0-1; rates a second."""

    url: str
    at_wall: float
    interval_seconds: float
    window_seconds: float
    model: str
    instance_id: str
    version: str
    device: str
    engine_state: str
    uptime_seconds: float | None
    requests_per_second: float | None
    errors_per_second: float | None
    rejections_per_second: float | None
    prompt_tokens_per_second: float | None
    output_tokens_per_second: float | None
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    tpot_p50_seconds: float | None
    tpot_p95_seconds: float | None
    itl_p95_seconds: float | None
    duration_p95_seconds: float | None
    num_running: float | None
    num_waiting: float | None
    oldest_waiting_age_seconds: float | None
    predicted_ttft_seconds: float | None
    kv_utilisation: float | None
    kv_cached_share: float | None
    kv_waste: float | None
    prefix_hit_share: float | None
    preemptions_per_second: float | None
    steps_per_second: float | None
    mean_batch_sequences: float | None
    mean_step_seconds: float | None
    engine_busy_share: float | None
    flops_utilisation: float | None
    bandwidth_utilisation: float | None
    goodput: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    ttft_slo_seconds: float | None
    tpot_slo_seconds: float | None
    slo_target: float | None
    power_watts: float | None
    joules_per_token: float | None
    cpu_utilisation: float | None
    num_cpus: float | None
    memory_used_bytes: float | None
    memory_bytes: float | None
    engine_resident_bytes: float | None
    gpus: tuple[Gpu, ...]
    desired_replicas: float | None
    scaling_pinned: bool
    store_available: bool | None
    num_queued_rows: float | None
    num_spooled_rows: float | None
    num_dropped_rows: float | None


class History:
    """The looks of the last minute. A server that was started anew begins a new history."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window = window_seconds
        self._scrapes: deque[Scrape] = deque()
        self.output_rates: deque[float] = deque(maxlen=_MAX_POINTS)  # tokens a second, one an interval

    def add(self, scrape: Scrape) -> None:
        """The newest look."""
        if self._scrapes and (scrape.total("uptime_seconds") or 0.0) < (self._scrapes[-1].total("uptime_seconds") or 0.0):
            self._scrapes.clear()
            self.output_rates.clear()
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and scrape.at - self._scrapes[1].at >= self._window:
            self._scrapes.popleft()
        if (rate := _Change(self._scrapes[-2], scrape).rate("output_tokens_total") if len(self._scrapes) > 1 else None) is not None:
            self.output_rates.append(rate)

    def figures(self, url: str, at_wall: float) -> Figures:
        """Of what was added; at least one look must have been."""
        now = self._scrapes[-1]
        last = _Change(self._scrapes[-2], now) if len(self._scrapes) > 1 else _Change(now, now)
        window = _Change(self._scrapes[0], now)
        build, engine = now.info("build_info"), now.info("engine_info")
        joules, tokens = _energy(window), window.grown("output_tokens_total")
        pinned, available = now.total("scaling_pinned"), now.total("store_available")
        return Figures(
            url=url,
            at_wall=at_wall,
            interval_seconds=last.seconds,
            window_seconds=window.seconds,
            model=build.get("model", ""),
            instance_id=build.get("instance_id", ""),
            version=build.get("version", ""),
            device=engine.get("device", ""),
            engine_state=now.info("engine_state").get("state", "unknown"),
            uptime_seconds=now.total("uptime_seconds"),
            requests_per_second=last.rate("requests_total"),
            errors_per_second=_server_errors(last),
            rejections_per_second=last.rate("rejections_total"),
            prompt_tokens_per_second=last.rate("admitted_prompt_tokens_total"),
            output_tokens_per_second=last.rate("output_tokens_total"),
            ttft_p50_seconds=window.quantile("time_to_first_token_seconds", 0.5),
            ttft_p95_seconds=window.quantile("time_to_first_token_seconds", 0.95),
            tpot_p50_seconds=window.quantile("time_per_output_token_seconds", 0.5),
            tpot_p95_seconds=window.quantile("time_per_output_token_seconds", 0.95),
            itl_p95_seconds=window.quantile("inter_token_latency_seconds", 0.95),
            duration_p95_seconds=window.quantile("request_duration_seconds", 0.95),
            num_running=now.total("requests_running"),
            num_waiting=now.total("requests_waiting"),
            oldest_waiting_age_seconds=now.total("oldest_waiting_age_seconds"),
            predicted_ttft_seconds=now.total("predicted_ttft_seconds"),
            kv_utilisation=now.total("kv_utilisation_ratio"),
            kv_cached_share=now.total("kv_cached_ratio"),
            kv_waste=now.total("kv_waste_ratio"),
            prefix_hit_share=_share(window.grown("prefix_hit_tokens_total"), window.grown("prefix_query_tokens_total")),
            preemptions_per_second=last.rate("preemptions_total"),
            steps_per_second=last.rate("engine_steps_total"),
            mean_batch_sequences=window.mean("engine_batch_sequences"),
            mean_step_seconds=window.mean("engine_step_seconds"),
            engine_busy_share=now.total("engine_busy_ratio"),
            flops_utilisation=now.total("engine_flops_utilisation_ratio"),
            bandwidth_utilisation=now.total("engine_bandwidth_utilisation_ratio"),
            goodput=window.good("both"),
            ttft_attainment=window.good("ttft"),
            tpot_attainment=window.good("tpot"),
            ttft_slo_seconds=now.total("slo_ttft_seconds"),
            tpot_slo_seconds=now.total("slo_tpot_seconds"),
            slo_target=now.total("slo_target_ratio"),
            power_watts=now.total("gpu_power_watts"),
            joules_per_token=joules / tokens if joules is not None and tokens else None,
            cpu_utilisation=now.total("host_cpu_utilisation_ratio"),
            num_cpus=now.total("host_cpus"),
            memory_used_bytes=now.total("host_memory_used_bytes"),
            memory_bytes=now.total("host_memory_bytes"),
            engine_resident_bytes=now.total("process_resident_bytes", process="engine"),
            gpus=_gpus(now),
            desired_replicas=now.total("scaling_desired_replicas") if now.total("scaling_runs_total") else None,
            scaling_pinned=bool(pinned),
            store_available=None if available is None else bool(available),
            num_queued_rows=now.total("store_queued_rows"),
            num_spooled_rows=now.total("store_spool_backlog_rows"),
            num_dropped_rows=now.total("store_dropped_rows_total"),
        )


class _Change:
    """What happened between two looks; between a look and itself nothing did, and no rate is known."""

    def __init__(self, before: Scrape, now: Scrape) -> None:
        self.before = before
        self.now = now
        self.seconds = now.at - before.at

    def grown(self, name: str, **labels: str) -> float | None:
        """By how much a counter grew; a sample that was not there before began at zero."""
        now = self.now.total(name, **labels)
        if now is None or self.seconds <= 0:
            return None
        return max(0.0, now - (self.before.total(name, **labels) or 0.0))

    def rate(self, name: str, **labels: str) -> float | None:
        """Growth a second."""
        grown = self.grown(name, **labels)
        return None if grown is None else grown / self.seconds

    def histogram(self, name: str) -> Histogram | None:
        """What was observed between the two."""
        now = self.now.histogram(name)
        return None if now is None or self.seconds <= 0 else now.since(self.before.histogram(name))

    def quantile(self, name: str, share: float) -> float | None:
        """A quantile of that."""
        histogram = self.histogram(name)
        return None if histogram is None else histogram.quantile(share)

    def mean(self, name: str) -> float | None:
        """The mean of that."""
        histogram = self.histogram(name)
        return None if histogram is None else histogram.mean

    def good(self, objective: str) -> float | None:
        """The share of judged requests that kept an objective."""
        return _share(self.grown("slo_good_requests_total", objective=objective), self.grown("slo_requests_total", objective=objective))


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _server_errors(change: _Change) -> float | None:
    if change.seconds <= 0 or "requests_total" not in change.now.samples:
        return None
    now, before = (
        sum(count for status, count in scrape.labelled("requests_total", "status").items() if status.startswith("5"))
        for scrape in (change.now, change.before)
    )
    return max(0.0, now - before) / change.seconds


def _energy(change: _Change) -> float | None:
    """Joules of the GPUs between two looks; None where a GPU's counter was not there at both."""
    now, before = (scrape.labelled("gpu_energy_joules_total", "gpu") for scrape in (change.now, change.before))
    if not now or now.keys() != before.keys() or change.seconds <= 0:
        return None
    return sum(max(0.0, now[gpu] - before[gpu]) for gpu in now)


def _gpus(now: Scrape) -> tuple[Gpu, ...]:
    throttled: dict[str, list[str]] = {}
    for labels, value in now.samples.get("gpu_throttled", ()):
        if value:
            throttled.setdefault(labels.get("gpu", ""), []).append(labels.get("reason", ""))
    gpus = []
    for labels, _ in sorted(now.samples.get("gpu_info", ()), key=lambda sample: sample[0].get("gpu", "")):
        index = labels.get("gpu", "")
        values = {name: now.labelled(f"gpu_{name}", "gpu").get(index) for name in _GPU_VALUES}
        utilisation = now.labelled("gpu_utilisation_ratio", "gpu").get(index)
        gpus.append(Gpu(index=index, name=labels.get("name", ""), utilisation=utilisation, throttled=tuple(throttled.get(index, ())), **values))
    return tuple(gpus)
