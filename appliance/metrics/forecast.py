"""What a request that arrives now has to wait for: a live signal, where histograms of finished requests say nothing until it is too late."""

from __future__ import annotations

from appliance.events import StepStats

_MEMORY_SECONDS = 10.0  # of prefilling steps: older ones have lost two thirds of their weight
_SMOOTHING = 0.05  # weight of the newest request in the means


class QueueForecast:
    """Learns the prefill rate from steps and the usual request from those that ended. One owner, the recorder."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # of steps with prefill, decayed
        self._queried = self._found = 0.0  # prompt tokens looked up in the prefix cache, and found; decayed likewise
        self._mean_prompt: float | None = None
        self._mean_output: float | None = None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens computed over the time of the steps that computed any, decodes beside them included; None before the first."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def on_step(self, stats: StepStats) -> None:
        """Learn from a step that prefilled."""
        seconds = stats.busy_seconds
        if stats.num_prefill_tokens and seconds > 0:
            keep = _MEMORY_SECONDS / (_MEMORY_SECONDS + seconds)
            self._tokens = self._tokens * keep + stats.num_prefill_tokens
            self._seconds = self._seconds * keep + seconds
            self._queried = self._queried * keep
            self._found = self._found * keep
        self._queried += stats.prefix_query_tokens
        self._found += stats.prefix_hit_tokens

    def on_request(self, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        self._mean_prompt = _blend(self._mean_prompt, num_prompt_tokens)
        self._mean_output = _blend(self._mean_output, num_generated_tokens)

    def expected_output(self, max_tokens: int) -> float:
        """Output tokens that a request with this limit will likely have."""
        return max_tokens if self._mean_output is None else min(max_tokens, self._mean_output)

    def ttft_seconds(self, stats: StepStats | None, oldest_age_seconds: float, max_num_seqs: int | None, ends_per_second: float) -> float:
        """Predicted time to first token of a request that arrives now.

        The backlog, less the share that the prefix cache is likely to hold, over the prefill rate; where those ahead wait for a place rather than for
        their turn (the batch is full, or they wait though the step prefilled nothing), at least their number over the rate at which requests end.
        Then a prefill of its own, of the usual length. At least the age of the oldest one in the queue while nothing else is known.
        """
        rate = self.prefill_tokens_per_second
        if rate is None or stats is None:
            return oldest_age_seconds
        computed = 1.0 - (self._found / self._queried if self._queried > 0 else 0.0)
        wait = stats.num_backlog_tokens * computed / rate
        is_full = max_num_seqs is not None and stats.num_running >= max_num_seqs
        if is_full or (stats.num_waiting and not stats.num_prefill_tokens):
            wait = max(wait, (stats.num_waiting + 1) / ends_per_second if ends_per_second > 0 else oldest_age_seconds)
        return wait + (self._mean_prompt or 0.0) * computed / rate


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
