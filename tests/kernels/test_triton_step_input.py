"""The step's bookkeeping kernels against their twins: host diffs, input preparation, commit."""

from __future__ import annotations

import copy

import pytest
import torch

from appliance.kernels import ops
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

TRITON, TWIN = TritonOps(), ReferenceOps()
NUM_ROWS, MAX_BLOCKS, VOCAB, BLOCK_SIZE = 9, 200, 11, 16


def make_state(device: torch.device, counts: bool = False) -> ops.RowState:
    """Random rows; the last one is the dummy."""
    generator = torch.Generator().manual_seed(0)
    params = torch.randint(1, 1000, (NUM_ROWS, ops.NUM_PARAMS), generator=generator, dtype=torch.int32)
    params[-1] = 0
    tables = torch.randint(0, 500, (NUM_ROWS, MAX_BLOCKS), generator=generator, dtype=torch.int32)
    output_counts = torch.randint(0, 3, (NUM_ROWS, VOCAB), generator=generator, dtype=torch.int32).to(device) if counts else None
    return ops.RowState(params.to(device), tables.to(device), output_counts=output_counts)


def make_step(rows: list[int], chunks: list[tuple[int, int]], num_tokens: int, device: torch.device) -> ops.StepInput:
    """Decodes for `rows` but the last len(chunks); a chunk is (tokens before, length)."""
    num_decodes = len(rows) - len(chunks)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    samples = [int(row != NUM_ROWS - 1 and i % 3 != 2) for i, row in enumerate(rows)]
    ids = torch.arange(num_tokens - num_decodes, dtype=torch.int32, device=device) + 100
    return ops.StepInput(ints(rows), ints(samples), ints([c[0] for c in chunks]), ints([c[1] for c in chunks]), ids, num_decodes)


def make_batch(step: ops.StepInput, num_tokens: int, state: ops.RowState) -> ops.AttentionBatch:
    """A batch filled with a value that no kernel writes."""
    device, num_entries = state.params.device, step.rows.shape[0]

    def poison(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full((size,), -77, dtype=dtype, device=device)

    return ops.AttentionBatch(
        poison(num_tokens),
        poison(num_tokens),
        poison(num_tokens, torch.int64),
        poison(num_entries + 1),
        poison(num_entries),
        poison(num_entries),
        state.block_tables,
        poison(num_entries, torch.int64),
        step.num_decodes,
        num_tokens,
        MAX_BLOCKS * BLOCK_SIZE,
    )


CASES = [
    pytest.param([3, 1, 8, 0], [], 4, id="decodes with padding"),
    pytest.param([5, 2], [(0, 7), (33, 600)], 607, id="chunks alone"),
    pytest.param([5, 8, 2, 0, 8, 4, 8], [(17, 3), (0, 0), (512, 20), (0, 0)], 40, id="mixed, padded in every way"),
    pytest.param([8, 8], [(0, 0)], 9, id="padding alone"),
]


@pytest.mark.parametrize(("rows", "chunks", "num_tokens"), CASES)
def test_prepare_inputs_matches_its_twin(rows: list[int], chunks: list[tuple[int, int]], num_tokens: int, device: torch.device) -> None:
    """Every field of the batch, poisoned before, holds what the twin writes."""
    state = make_state(device)
    step = make_step(rows, chunks, num_tokens, device)
    batches = [make_batch(step, num_tokens, state) for _ in range(2)]
    TRITON.prepare_inputs(state, step, batches[0], BLOCK_SIZE)
    TWIN.prepare_inputs(state, step, batches[1], BLOCK_SIZE)
    for field in ("input_ids", "positions", "slot_mapping", "query_start", "context_lens", "rows", "logit_index"):
        assert getattr(batches[0], field).tolist() == getattr(batches[1], field).tolist(), field


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(("rows", "chunks", "num_tokens"), CASES[:3])
def test_commit_sampled_matches_its_twin(rows: list[int], chunks: list[tuple[int, int]], num_tokens: int, counts: bool, device: torch.device) -> None:
    """Only entries that sample change their rows."""
    states = [make_state(device, counts) for _ in range(2)]
    step = make_step(rows, chunks, num_tokens, device)
    batch = make_batch(step, num_tokens, states[0])
    TWIN.prepare_inputs(states[0], step, batch, BLOCK_SIZE)
    token_ids = torch.arange(len(rows), dtype=torch.int32, device=device) % VOCAB
    before = states[0].params.clone()
    TRITON.commit_sampled(states[0], step, batch, token_ids)
    TWIN.commit_sampled(states[1], step, batch, token_ids)
    assert torch.equal(states[0].params, states[1].params)
    assert not torch.equal(states[0].params, before)
    if counts:
        assert torch.equal(states[0].output_counts, states[1].output_counts)


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(0, 0), (1, 0), (0, 70), (5, 33)])
def test_apply_updates_matches_its_twin(num_rows: int, num_blocks: int, device: torch.device) -> None:
    """Rows of parameters and single block-table entries change, in one call, and nothing else does."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(NUM_ROWS, generator=generator)[:num_rows].int().to(device)
    params = torch.randint(0, 99, (num_rows, ops.NUM_PARAMS), generator=generator, dtype=torch.int32).to(device)
    places = torch.randperm(NUM_ROWS * MAX_BLOCKS, generator=generator)[:num_blocks]
    blocks = torch.stack((places // MAX_BLOCKS, places % MAX_BLOCKS, torch.arange(num_blocks) + 1000), dim=1).int().to(device)
    states = [make_state(device) for _ in range(2)]
    TRITON.apply_updates(states[0], rows, params, blocks)
    TWIN.apply_updates(states[1], rows, params, blocks)
    assert torch.equal(states[0].params, states[1].params)
    assert torch.equal(states[0].block_tables, states[1].block_tables)
    untouched = copy.copy(make_state(device))
    assert torch.equal(states[0].params, untouched.params) == (num_rows == 0)
