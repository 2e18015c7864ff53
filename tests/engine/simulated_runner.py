"""A model runner without a model: it keeps the device's rows, block tables and KV as plain dicts and checks every context it reads."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from appliance.engine.model_runner import LaunchedStep, StepResult
from appliance.engine.scheduler import StepPlan
from appliance.engine.sequence import Sequence

VOCAB_SIZE = 50


def next_token(ids: list[int], seed: int) -> int:
    """The token this model samples after `ids`: a function of the whole context and the seed."""
    return zlib.crc32(repr((ids, seed)).encode()) % VOCAB_SIZE


def expected_output(prompt: list[int], seed: int, max_tokens: int, stop: tuple[int, ...] = ()) -> list[int]:
    """What a sequence must produce, however it is scheduled."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(next_token(ids, seed))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@dataclass
class SimulatedRunner:
    """Stands where ModelRunner stands. `largest_step` records the most tokens a step carried."""

    block_size: int
    table: dict[tuple[int, int], int] = field(default_factory=dict)  # (row, index) -> block
    last_id: dict[int, int] = field(default_factory=dict)
    kv: dict[int, dict[int, int]] = field(default_factory=dict)  # block -> offset -> token id
    largest_step: int = 0
    num_computed_tokens: int = 0

    def launch(self, plan: StepPlan) -> LaunchedStep:
        for row, index, block in plan.new_blocks:
            self.table[row, index] = block
        sequences, ids = list(plan.decodes), []
        for sequence in plan.decodes:
            position = sequence.num_computed - 1
            self._write(sequence, position, self.last_id[sequence.row])
            ids.append(self._sample(sequence, position + 1))
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                self._write(chunk.sequence, position, chunk.sequence.token_ids[position])
            context = self._context(chunk.sequence, chunk.start + chunk.length)
            assert context == list(chunk.sequence.token_ids[: len(context)])
            if chunk.final:
                sequences.append(chunk.sequence)
                ids.append(self._sample(chunk.sequence, chunk.start + chunk.length))
        num_tokens = len(plan.decodes) + plan.num_prefill_tokens
        self.largest_step = max(self.largest_step, num_tokens)
        self.num_computed_tokens += num_tokens
        return LaunchedStep(plan, sequences, [sequence.id for sequence in sequences], [], ids, None, graph_hit=False)

    def collect(self, step: LaunchedStep) -> StepResult:
        return StepResult(list(step.outputs), {})

    def forget(self, sequence: Sequence) -> None:
        pass

    def _write(self, sequence: Sequence, position: int, token_id: int) -> None:
        block = self.table[sequence.row, position // self.block_size]
        self.kv.setdefault(block, {})[position % self.block_size] = token_id

    def _context(self, sequence: Sequence, length: int) -> list[int]:
        size = self.block_size
        return [self.kv[self.table[sequence.row, p // size]][p % size] for p in range(length)]

    def _sample(self, sequence: Sequence, length: int) -> int:
        token_id = next_token(self._context(sequence, length), sequence.sampling.seed)
        self.last_id[sequence.row] = token_id
        return token_id
