"""The split of steps over sequences: nothing is lost, nothing is charged twice, and each pays for its own tokens and context."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.costs import Bill, CostMeter
from appliance.events import StepCosts, StepStats

COSTS = StepCosts(
    flops_per_token=2e9,
    flops_per_sample=1e8,
    flops_per_pair=4e5,
    weight_bytes=10**9,
    kv_bytes_per_token=10**5,
    peak_flops=1e14,
    peak_bytes_per_second=1e12,
)
ZEROS = {**dict.fromkeys(StepStats.__struct_fields__, 0), "chunks": (), "block_ends": None}


class _Row:
    """A sequence of a simulated engine."""

    def __init__(self, sequence_id: int, num_prompt: int) -> None:
        self.id = sequence_id
        self.num_prompt = num_prompt
        self.num_computed = 0
        self.bill = Bill()
        self.expected = 0.0


def _step(rows: list[_Row], busy_seconds: float, chunk_tokens: int) -> StepStats:
    """Decode every row past its prompt, prefill up to `chunk_tokens` of the others; adds each row's share, computed one by one, to `expected`."""
    decodes = [row for row in rows if row.num_computed >= row.num_prompt]
    chunks, budget = [], chunk_tokens
    for row in rows:
        if row not in decodes and budget > 0:
            length = min(budget, row.num_prompt - row.num_computed)
            budget -= length
            chunks.append((row, row.num_computed, length, row.num_computed + length == row.num_prompt))
    num_tokens = len(decodes) + sum(length for _, _, length, _ in chunks)
    linear = max(COSTS.weight_bytes / COSTS.peak_bytes_per_second, num_tokens * COSTS.flops_per_token / COSTS.peak_flops)
    units: list[tuple[_Row, float]] = []
    for row in decodes:
        row.num_computed += 1
        units.append((row, linear / num_tokens + row.num_computed * COSTS.kv_bytes_per_token / COSTS.peak_bytes_per_second))
    for row, start, length, _ in chunks:
        row.num_computed += length
        pairs = sum(range(start + 1, start + length + 1))
        units.append((row, length * linear / num_tokens + pairs * COSTS.flops_per_pair / COSTS.peak_flops))
    total = sum(cost for _, cost in units)
    for row, cost in units:
        row.expected += busy_seconds * cost / total
    fields = {
        "num_decode_tokens": len(decodes),
        "num_prefill_tokens": num_tokens - len(decodes),
        "busy_seconds": busy_seconds,
        "num_context_tokens": sum(row.num_computed for row in decodes),
        "chunks": tuple((row.id, start, length, final) for row, start, length, final in chunks),
    }
    return StepStats(**{**ZEROS, **fields})  # type: ignore[arg-type]


def _charge(meter: CostMeter, rows: list[_Row], stats: StepStats) -> None:
    """As the sequence table does."""
    meter.charge_step(stats)
    bills = {row.id: row.bill for row in rows}
    for sequence_id, start, length, final in stats.chunks:
        meter.charge_chunk(bills[sequence_id], start, length)
        if final:
            meter.join(bills[sequence_id], start + length)


@given(st.integers(0, 10**6))
def test_differences_of_sums_are_the_shares_step_by_step(seed: int) -> None:
    """Sequences that come, prefill in chunks, decode and leave at any time owe what a split of each step over its rows says; together, all time."""
    chance = random.Random(seed)
    meter, rows, done, busy = CostMeter(), [], [], 0.0
    meter.costs, meter.watts = COSTS, 300.0
    for number in range(chance.randrange(1, 60)):
        if chance.random() < 0.4 or not rows:
            rows.append(_Row(number, chance.randrange(1, 200)))
        seconds = chance.uniform(0.001, 0.1)
        busy += seconds
        _charge(meter, rows, _step(rows, seconds, chunk_tokens=64))
        if chance.random() < 0.2:
            row = rows.pop(chance.randrange(len(rows)))
            meter.leave(row.bill)
            done.append(row)
    for row in rows:
        meter.leave(row.bill)
        meter.leave(row.bill)  # a second time costs nothing
    for row in [*rows, *done]:
        assert row.bill.seconds == pytest.approx(row.expected, rel=1e-9, abs=1e-12)
        if row.num_computed:
            assert row.bill.joules == pytest.approx(row.expected * 300.0, rel=1e-9, abs=1e-9)
    assert sum(row.bill.seconds for row in [*rows, *done]) == pytest.approx(busy)


def test_longer_contexts_and_prompts_cost_more() -> None:
    """Of two that decode together, the one with a hundred times the context pays more, by its KV; an unread one pays nothing."""
    meter, rows = CostMeter(), [_Row(1, 10), _Row(2, 1000)]
    meter.costs = COSTS
    for _ in range(80):
        _charge(meter, rows, _step(rows, 0.01, chunk_tokens=256))
    short, long = (row.bill for row in rows)
    meter.leave(short)
    before = long.seconds
    meter.leave(long)
    decode = long.seconds - before
    assert short.seconds < decode
    assert decode / short.seconds == pytest.approx((0.0005 + 1.04e-4) / (0.0005 + 0.05e-4), rel=0.1)


def test_power_that_is_not_known_is_no_energy() -> None:
    """Without a reading a bill has no joules, not zero."""
    meter, rows = CostMeter(), [_Row(1, 10)]
    for _ in range(5):
        _charge(meter, rows, _step(rows, 0.01, chunk_tokens=64))
    meter.leave(rows[0].bill)
    assert rows[0].bill.joules is None
    assert rows[0].bill.seconds == pytest.approx(0.05)


def test_flops_and_bytes_are_those_of_the_formula() -> None:
    """One decode at context 100 beside a chunk of 10 at 20: 11 tokens, 2 samples, 100 + 255 pairs; weights, 100 + 20 positions read, 11 written."""
    stats = StepStats(
        **{
            **ZEROS,
            "num_decode_tokens": 1,
            "num_prefill_tokens": 10,
            "num_sampled_tokens": 2,
            "num_context_tokens": 100,
            "chunks": ((1, 20, 10, True),),
        }  # type: ignore[arg-type]
    )
    assert COSTS.flops(stats) == 11 * 2e9 + 2 * 1e8 + (100 + 200 + 55) * 4e5
    assert COSTS.moved_bytes(stats) == 10**9 + (100 + 20 + 11) * 10**5
    assert COSTS.moved_bytes(StepStats(**ZEROS)) == 0  # type: ignore[arg-type]
