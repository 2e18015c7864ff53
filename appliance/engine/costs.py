"""Whose step was it: splits each step's time and energy by modelled cost over the sequences in it. Torch-free; on the server's side.

A step that took t seconds is split over its rows as

    linear layers   max(weight_bytes / bandwidth, tokens x flops_per_token / flops), an equal share for every token of the step
    decode row      context x kv_bytes_per_token / bandwidth
    prefill chunk   pairs of query and position x flops_per_pair / flops

scaled so that the shares sum to t. Chunks are charged one by one (a few a step). Decodes are not: a sequence that decodes is in every step from its
last chunk to its end, with a context that grows by one each time, so what it owes is a difference of three running sums, read once as it begins
and once as it ends:

    sum of row prices  +  (context at the start - step at the start) x sum of position prices  +  sum of (step x position price)
"""

from __future__ import annotations

from appliance.events import StepCosts, StepStats

_FLOPS_PER_BYTE = 200.0  # of a device whose peaks are not known; only the ratio matters to a split


class Bill:
    """What one sequence has taken so far: engine seconds, and joules where power is known. Changed by the CostMeter alone."""

    __slots__ = ("context", "joules", "seconds", "since")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.joules: float | None = None
        self.since: tuple[float, ...] | None = None  # the running sums as it began to decode; None while it does not
        self.context = 0  # positions it held then, less the step's number


class _Account:
    """Running sums of one currency: seconds or joules."""

    __slots__ = ("chunk_pair", "chunk_token", "indexed", "position", "row")

    def __init__(self) -> None:
        self.row = self.position = self.indexed = 0.0
        self.chunk_token = self.chunk_pair = 0.0  # prices of the newest step

    def add(self, row: float, position: float, pair: float, index: int, *, decodes: bool) -> None:
        self.chunk_token, self.chunk_pair = row, pair
        if decodes:
            self.row += row
            self.position += position
            self.indexed += position * index


class CostMeter:
    """Prices of the steps so far. One owner, the SequenceTable: for each step `charge_step`, then its chunks, then what ends with it."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.watts: float | None = None  # power of the device while a step is under way; None: not known
        self._seconds = _Account()
        self._joules = _Account()
        self._index = 0  # of steps with decodes

    def charge_step(self, stats: StepStats) -> None:
        """Take the prices of a step that was done."""
        num_tokens = stats.num_decode_tokens + stats.num_prefill_tokens
        if not num_tokens or stats.busy_seconds <= 0.0:
            return
        costs = self.costs
        bandwidth = costs.peak_bytes_per_second or 1.0
        flops = costs.peak_flops or bandwidth * _FLOPS_PER_BYTE
        linear = max(costs.weight_bytes / bandwidth, num_tokens * costs.flops_per_token / flops) or 1.0
        position = costs.kv_bytes_per_token / bandwidth
        pair = costs.flops_per_pair / flops
        seconds = stats.busy_seconds / (linear + position * stats.num_context_tokens + pair * stats.num_prefill_pairs)
        row = linear / num_tokens
        decodes = stats.num_decode_tokens > 0
        self._index += decodes
        self._seconds.add(row * seconds, position * seconds, pair * seconds, self._index, decodes=decodes)
        if self.watts is not None:
            joules = seconds * self.watts
            self._joules.add(row * joules, position * joules, pair * joules, self._index, decodes=decodes)

    def charge_chunk(self, bill: Bill, start: int, length: int) -> None:
        """Charge for tokens [start, start + length) that the newest step prefilled."""
        pairs = length * start + length * (length + 1) // 2
        bill.seconds += length * self._seconds.chunk_token + pairs * self._seconds.chunk_pair
        if self.watts is not None:
            bill.joules = (bill.joules or 0.0) + length * self._joules.chunk_token + pairs * self._joules.chunk_pair

    def join(self, bill: Bill, context: int) -> None:
        """It decodes from the next step on, with `context` positions written."""
        self.leave(bill)
        bill.context = context - self._index
        seconds, joules = self._seconds, self._joules
        bill.since = (seconds.row, seconds.position, seconds.indexed, joules.row, joules.position, joules.indexed)

    def leave(self, bill: Bill) -> None:
        """It decodes no more, the newest step included. Harmless where it did not."""
        if (since := bill.since) is None:
            return
        bill.since = None
        bill.seconds += _owed(self._seconds, since[:3], bill.context)
        if self.watts is not None:
            bill.joules = (bill.joules or 0.0) + _owed(self._joules, since[3:], bill.context)


def _owed(account: _Account, since: tuple[float, ...], context: int) -> float:
    row, position, indexed = since
    return (account.row - row) + context * (account.position - position) + (account.indexed - indexed)
