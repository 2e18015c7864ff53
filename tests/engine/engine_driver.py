"""An engine over the simulated runner, and a driver that collects what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from simulated_runner import SimulatedRunner

from appliance.engine.block_pool import BlockPool
from appliance.engine.chunk_policy import ChunkPolicy
from appliance.engine.engine import Engine
from appliance.engine.scheduler import SchedulerLimits
from appliance.engine.wire import Sampling, SequenceEvent, Submit, pack_ids, unpack_ids
from appliance.events import StepStats


@dataclass
class Driver:
    """Steps an engine and sorts its reports by sequence."""

    engine: Engine
    runner: SimulatedRunner
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    events: list[SequenceEvent] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)

    def submit(self, sequence_id: int, prompt: list[int], *, outputs: list[int] | None = None, **fields: object) -> object:
        options = {"max_tokens": 8, "seed": sequence_id, "temperature": 0.0}
        submit_fields = {key: fields.pop(key) for key in ("deadline_at", "priority", "key_id", "cache_salt", "alone") if key in fields}
        sampling = Sampling(**(options | fields))
        return self.engine.submit(
            Submit(sequence_id=sequence_id, prompt_ids=pack_ids(prompt), output_ids=pack_ids(outputs or []), sampling=sampling, **submit_fields)
        )

    def step(self) -> None:
        output = self.engine.step()
        if output is None:
            return
        self.stats.append(output.stats)
        self.events.extend(output.events)
        for sequence_id, token_id in zip(unpack_ids(output.sequence_ids), unpack_ids(output.token_ids), strict=True):
            assert sequence_id not in self.ends, "a token after the end"
            self.outputs.setdefault(sequence_id, []).append(token_id)
        for sequence_id, reason, _ in output.finished:
            assert sequence_id not in self.ends, "two ends"
            self.ends[sequence_id] = reason

    def check_counts(self) -> None:
        """What the scheduler keeps as sums equals what its sequences hold."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        running = scheduler.running
        used = sum(s.num_computed for s in running) - (sum(len(s.blocks) for s in running) - pool.num_used) * scheduler.limits.block_size
        backlog = sum(len(s.token_ids) - s.num_computed for s in running if s.is_prefilling)
        assert scheduler.count_tokens() == (used, backlog + scheduler.waiting.num_tokens)

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do; the pool must then be whole."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
            self.engine.pool.check_integrity()
            self.check_counts()
        assert not self.engine.has_work, "the engine did not come to an end"
        assert self.engine.pool.num_used == 0


def make_driver(*, depth: int = 0, num_blocks: int = 64, **overrides: object) -> Driver:
    """A driver of a small engine; keywords override the limits."""
    limits = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_num_chunks": 4,
        "block_size": 4,
        "context_length": 128,
        "max_waiting": 100,
        "prefix_caching": True,
    } | overrides
    limits = SchedulerLimits(**limits)
    runner = SimulatedRunner(limits.block_size)
    policy = ChunkPolicy(10.0, limits.max_num_batched_tokens)
    driver = Driver(
        Engine(runner, limits, BlockPool(num_blocks), policy, depth=depth, announce=lambda told: driver.events.extend(told.events)), runner
    )
    return driver
