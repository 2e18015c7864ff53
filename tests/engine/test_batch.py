"""The device's batch state: staged updates are those uploaded at once."""

from __future__ import annotations

import random

import torch

from appliance.engine.batch import DeviceBatch
from appliance.engine.scheduler import StepPlan
from appliance.engine.sequence import Sequence
from appliance.engine.wire import Sampling, Submit, pack_ids
from appliance.kernels import ops as k
from appliance.kernels.reference import ReferenceOps

NUM_SEQS, NUM_CHUNKS, NUM_BLOCKS = 12, 4, 64
OPS = ReferenceOps()


def make_batch() -> DeviceBatch:
    """A small one on the CPU."""
    return DeviceBatch(max_num_seqs=NUM_SEQS, max_num_chunks=NUM_CHUNKS, max_num_tokens=64, max_blocks=NUM_BLOCKS, device=torch.device("cpu"))


def make_plan(rng: random.Random, num_rows: int, num_blocks: int) -> StepPlan:
    """New rows of random parameters, and blocks at random places of them and others."""
    plan = StepPlan()
    for row in rng.sample(range(NUM_SEQS), num_rows):
        sampling = Sampling(max_tokens=5, seed=rng.getrandbits(64), temperature=rng.random(), top_k=rng.randrange(9))
        sequence = Sequence(Submit(sequence_id=row, prompt_ids=pack_ids([1, 2]), sampling=sampling), 0, 100)
        sequence.row = row
        plan.new_rows.append(sequence)
    places = rng.sample([(row, index) for row in range(NUM_SEQS) for index in range(NUM_BLOCKS)], num_blocks)
    plan.new_blocks.extend((row, index, rng.randrange(1, 1000)) for row, index in places)
    return plan


def test_staged_updates_are_applied_once_and_equal_the_upload() -> None:
    """Plans with updates, without, and with too many to be staged, one after another; the device counts in between as steps would."""
    rng = random.Random(3)
    staged, direct = make_batch(), make_batch()
    refused = 0
    for sizes in [(4, 240), (0, 0), (2, 0), (0, 7), (5, 3), (0, 0), (1, 241), (3, 30), (0, 0), (0, 0), (4, 1)]:
        plan = make_plan(rng, *sizes)
        updates = direct.upload_updates(plan)
        if updates is not None:
            OPS.apply_updates(direct.state, *updates)
        if not staged.stage_updates(plan):
            refused += 1
            too_many = staged.upload_updates(plan)
            assert too_many is not None
            OPS.apply_updates(staged.state, *too_many)
        OPS.take_updates(staged.state, staged.updates_ring, staged.turn, *staged.num_staged)
        staged.turn += 1
        staged.take_turn()
        for batch in (staged, direct):  # a step changes the rows: what is applied a second time would show
            batch.state.params[:NUM_SEQS, k.NUM_TOKENS] += 1
            batch.state.block_tables[:NUM_SEQS] += 1
        assert torch.equal(staged.state.params[:NUM_SEQS], direct.state.params[:NUM_SEQS])
        assert torch.equal(staged.state.block_tables[:NUM_SEQS], direct.state.block_tables[:NUM_SEQS])
    assert refused == 2
    assert not staged.state.params[NUM_SEQS].any()
