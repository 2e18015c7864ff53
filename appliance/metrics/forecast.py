"""What a request that arrives now has to wait for: a live signal, where histograms of finished requests say nothing until it is too late."""

from __future__ import annotations

from appliance.events import StepStats, WindowStats

_MEMORY_SECONDS = 10.0  # of prefilling steps: older ones have lost two thirds of their weight
_ENOUGH_ENDS = 20  # in the window, for their rate to be believed
_SMOOTHING = 0.05  # weight of the newest request in the means


class QueueForecast:
    """Learns the prefill rate from steps and the usual request from those that ended. One owner, the recorder."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # of steps with prefill, decayed
        self._queried = self._found = 0.0  # prompt tokens looked up in the prefix cache, and found; decayed likewise
        self._mean_prompt: float | None = None
        self._mean_output: float | None = None
        self._mean_batch_seconds: float | None = None
        self._unseen_tokens = self._num_unseen = 0  # admitted since the engine's newest report

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

    def on_admitted(self, num_prompt_tokens: int) -> None:
        """A request went to the engine, whose reports do not know it yet: a step may take a second on a CPU."""
        self._unseen_tokens += num_prompt_tokens
        self._num_unseen += 1

    def on_report(self) -> None:
        """The engine has reported: what was admitted before is in its numbers."""
        self._unseen_tokens = self._num_unseen = 0

    def on_request(self, num_prompt_tokens: int, num_generated_tokens: int, batch_seconds: float) -> None:
        """Learn from a request that ended by itself, after so long in the batch."""
        self._mean_prompt = _blend(self._mean_prompt, num_prompt_tokens)
        self._mean_output = _blend(self._mean_output, num_generated_tokens)
        self._mean_batch_seconds = _blend(self._mean_batch_seconds, batch_seconds)

    def expected_output(self, max_tokens: int) -> float:
        """Output tokens that a request with this limit will likely have."""
        return max_tokens if self._mean_output is None else min(max_tokens, self._mean_output)

    def ttft_seconds(self, stats: StepStats | None, oldest_age_seconds: float, max_num_seqs: int | None, ends: WindowStats) -> float:
        """Predicted time to first token of a request that arrives now.

        The backlog, less the share that the prefix cache is likely to hold, over the prefill rate; at least the time in which so many requests end as
        must before there is a place for it in a batch of `max_num_seqs`. Then a prefill of its own, of the usual length. While no rate is known: the
        age of the oldest one in the queue.
        """
        rate = self.prefill_tokens_per_second
        if rate is None or stats is None:
            return oldest_age_seconds
        computed = 1.0 - (self._found / self._queried if self._queried > 0 else 0.0)
        wait = (stats.num_backlog_tokens + self._unseen_tokens) * computed / rate
        num_waiting = stats.num_waiting + self._num_unseen
        num_ends = 0 if max_num_seqs is None else stats.num_running + num_waiting + 1 - max_num_seqs
        if stats.num_waiting and not stats.num_prefill_tokens:  # they wait for KV blocks
            num_ends = num_waiting + 1
        if num_ends > 0:
            ends_per_second = self._ends_per_second(stats, ends)
            wait = max(wait, num_ends / ends_per_second if ends_per_second else oldest_age_seconds)
        return wait + (self._mean_prompt or 0.0) * computed / rate

    def _ends_per_second(self, stats: StepStats, ends: WindowStats) -> float:
        """As counted; while those are few, those that run over the usual time in the batch (Little's law). 0 where neither is known."""
        if ends.num_requests >= _ENOUGH_ENDS:
            return ends.num_requests / ends.seconds
        return stats.num_running / self._mean_batch_seconds if self._mean_batch_seconds else 0.0


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
