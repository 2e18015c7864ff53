"""The engine's reports as the server splits them: over all sequences the shares are the busy time, preemption and aborts included."""

from __future__ import annotations

import random

import pytest
from engine_driver import make_driver

from appliance.engine.client import SequenceRequest
from appliance.engine.generation import OpenSequence
from appliance.engine.replay import SequenceTable
from appliance.engine.wire import Abort, Finish, Ready, Sampling, Submit
from appliance.events import StepCosts

COSTS = StepCosts(flops_per_token=2e6, flops_per_pair=1e4, weight_bytes=10**6, kv_bytes_per_token=1000, peak_flops=1e12, peak_bytes_per_second=1e10)


class _Wire:
    """The link of a table to an engine in the same process; outputs go back with `step`."""

    writable = True

    def __init__(self, depth: int) -> None:
        self.driver = make_driver(depth=depth, num_blocks=24)
        self.engine = self.driver.engine
        self.engine._announce = lambda told: self.table.on_events(told.events, ahead=True)
        self.table = SequenceTable(max_waiting=1000)
        facts = dict.fromkeys(("vocab_size", "max_num_batched_tokens", "num_blocks", "num_parameters", "weight_bytes", "kv_bytes_per_token"), 1)
        ready = Ready(
            device="x",
            dtype="x",
            quantization="x",
            context_length=128,
            max_num_seqs=8,
            block_size=4,
            load_seconds=0.0,
            reasons=(),
            costs=COSTS,
            **facts,
        )
        self.table.costs.watts = 100.0
        self.table.attach(self, ready, 0.0)
        self.busy_seconds = 0.0
        self.num_preemptions = 0

    def send(self, message: Submit | Abort | Finish) -> None:
        handle = {Submit: self.engine.submit, Abort: self.engine.abort, Finish: self.engine.finish}[type(message)]
        handle(message)  # type: ignore[operator]

    def step(self) -> None:
        if (output := self.engine.step()) is not None:
            self.table.on_step(output, output.stats.started_at)
            self.busy_seconds += output.stats.busy_seconds
            self.num_preemptions += output.stats.num_preemptions


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("aborts", [False, True])
async def test_shares_sum_to_the_busy_time(depth: int, *, aborts: bool) -> None:
    """A pool too small for its load: what was recomputed is charged to whom it was done for, and nothing twice."""
    chance, wire, sequences = random.Random(11), _Wire(depth), list[OpenSequence]()
    for number in range(60):
        sampling = Sampling(max_tokens=chance.randrange(4, 40), seed=number, temperature=0.0)
        request = SequenceRequest(prompt_ids=chance.choices(range(50), k=chance.randrange(1, 60)), sampling=sampling)
        sequences.append(wire.table.submit(request, 0.0, restarting=False))
        for _ in range(chance.randrange(4)):
            wire.step()
        if aborts and chance.random() < 0.2:
            chance.choice(sequences).abort()
    while wire.engine.has_work:
        wire.step()
    charged = sum(sequence.bill.seconds for sequence in sequences)
    assert wire.num_preemptions > 3
    if depth == 0:
        assert charged == pytest.approx(wire.busy_seconds, rel=1e-9)
    else:  # a row that ran a step past its end is nobody's
        assert 0.9 * wire.busy_seconds <= charged <= wire.busy_seconds * (1 + 1e-9)
    assert sum(sequence.bill.joules or 0.0 for sequence in sequences) == pytest.approx(100.0 * charged)
    assert all(sequence.bill.since is None for sequence in sequences)
