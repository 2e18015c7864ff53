"""What host and device hand each other at every step, through pinned memory that both see: no copy is launched in either direction.

The host writes a step's new rows and blocks into slot `turn % RING` before it launches the step; the step's first kernel reads them over the bus,
its last one writes the sampled ids into the same slot of another ring and counts the turn on the device. A graph may hold both, since the addresses
are those of the rings and the slot is found on the device. Twins: reference.take_updates, give_ids.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from appliance.kernels import ops
from appliance.kernels.launch import cdiv

_BLOCK = 32


@triton.jit(do_not_specialize=["row_params", "block_tables", "ring", "turn"])
def _take_updates_kernel(
    row_params, block_tables, table_stride, ring, turn,
    RING: tl.constexpr, SIZE: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_BLOCKS: tl.constexpr, NUM_PARAMS: tl.constexpr, BLOCK: tl.constexpr,
    ROW_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The first ROW_PROGRAMS programs copy BLOCK rows of parameters each, the others write BLOCK block-table entries each."""
    program = tl.program_id(0)
    source = ring + (tl.load(turn) & (RING - 1)) * SIZE  # a power of two, so the count may wrap
    if program < ROW_PROGRAMS:
        i = program * BLOCK + tl.arange(0, BLOCK)
        mask = i < NUM_ROWS
        row = tl.load(source + i, mask=mask, other=0).to(tl.int64)
        column = tl.arange(0, NUM_PARAMS)
        values = tl.load(source + NUM_ROWS + i[:, None] * NUM_PARAMS + column[None, :], mask=mask[:, None], other=0)
        tl.store(row_params + row[:, None] * NUM_PARAMS + column[None, :], values, mask=mask[:, None])
    else:
        i = (program - ROW_PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
        mask = i < NUM_BLOCKS
        triples = source + NUM_ROWS * (1 + NUM_PARAMS)
        row = tl.load(triples + i * 3, mask=mask, other=0).to(tl.int64)
        index = tl.load(triples + i * 3 + 1, mask=mask, other=0)
        block = tl.load(triples + i * 3 + 2, mask=mask, other=0)
        tl.store(block_tables + row * table_stride + index, block, mask=mask)


def take_updates(state: ops.RowState, ring: Tensor, turn: Tensor, num_rows: int, num_blocks: int) -> None:
    """See `Ops.take_updates`."""
    row_programs = cdiv(num_rows, _BLOCK)
    _take_updates_kernel[(row_programs + cdiv(num_blocks, _BLOCK),)](
        state.params, state.block_tables, state.block_tables.stride(0), ring, turn, RING=ring.shape[0], SIZE=ring.shape[1], NUM_ROWS=num_rows,
        NUM_BLOCKS=num_blocks, NUM_PARAMS=ops.NUM_PARAMS, BLOCK=_BLOCK, ROW_PROGRAMS=row_programs, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ring", "turn", "token_ids", "num_entries"])
def _give_ids_kernel(ring, turn, token_ids, num_entries, RING: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program, so that the turn is counted once, after all is written."""
    count = tl.load(turn)
    target = ring + (count & (RING - 1)) * SIZE
    for start in range(0, num_entries, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < num_entries
        tl.store(target + i, tl.load(token_ids + i, mask=mask, other=0), mask=mask)
    tl.debug_barrier()
    tl.store(turn, count + 1)


def give_ids(token_ids: Tensor, ring: Tensor, turn: Tensor) -> None:
    """See `Ops.give_ids`."""
    _give_ids_kernel[(1,)](ring, turn, token_ids, token_ids.shape[0], RING=ring.shape[0], SIZE=ring.shape[1], BLOCK=1024, num_warps=4)
