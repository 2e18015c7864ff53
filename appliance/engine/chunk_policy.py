"""How many prompt tokens a step may carry while others decode: as many as keep the inter-token latency within its target."""

from __future__ import annotations

_SMOOTHING = 0.1
_MIN_CHUNK_TOKENS = 64
_MIN_EVIDENCE_TOKENS = 32


class ChunkPolicy:
    """Learns seconds = base + tokens * rate from the steps that were run, and solves it for the budget.

    `base` is learned from steps without prefill, `rate` from mixed ones; both decay exponentially, so the budget follows growing contexts.
    Before the first evidence the budget is a quarter of the largest step.

    A step may stall for reasons of its own (a kernel compiled, a graph captured): one observation counts for at most twice what is known, and a
    mixed step bounds `base` from above. Without that bound a stall of a decode step cut the budget to its least for good: every step then
    carried prompt tokens, and none was left to correct the base (an 8B model at 128 streams fell from 7,558 to 3,748 tokens/s).
    """

    def __init__(self, itl_target_seconds: float, max_num_batched_tokens: int) -> None:
        self._target = itl_target_seconds
        self._max = max_num_batched_tokens
        self._base: float | None = None
        self._rate: float | None = None

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from one finished step."""
        if num_prefill_tokens == 0:
            if num_decodes:
                self._base = _blend(self._base, seconds)
            return
        if num_decodes and self._base is not None:
            self._base = min(self._base, seconds)
        if num_prefill_tokens >= _MIN_EVIDENCE_TOKENS:
            base = self._base or 0.0 if num_decodes else 0.0
            self._rate = _blend(self._rate, max(seconds - base, 0.1 * seconds) / num_prefill_tokens)

    @property
    def budget(self) -> int:
        """Prompt tokens for a step that also decodes."""
        if self._rate is None:
            return max(_MIN_CHUNK_TOKENS, self._max // 4)
        room = (self._target - (self._base or 0.0)) / self._rate
        return int(min(max(room, _MIN_CHUNK_TOKENS), self._max))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (min(new, 2 * old) - old)
