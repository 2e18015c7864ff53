"""The bookkeeping of a step on the device: host diffs in, inputs of the forward pass out, sampled ids back into the rows.

Twins: reference.apply_updates, prepare_inputs, commit_sampled. One launch each; the sizes that vary are read from device memory.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels import ops
from appliance.kernels.launch import cdiv, dependent_launch, next_power_of_2

LAST_ID = tl.constexpr(ops.LAST_ID)
NUM_TOKENS = tl.constexpr(ops.NUM_TOKENS)
OUTPUT_INDEX = tl.constexpr(ops.OUTPUT_INDEX)
# Triton's launcher has locals of its own (params, options, backend): a kernel's argument must not be named like them.
_ENTRIES = 64  # decode entries of a program
_TOKENS = 512  # chunk tokens of a program


@triton.jit(do_not_specialize=["row_params", "block_tables", "rows", "new_params", "blocks", "num_rows", "num_blocks", "row_programs"])
def _apply_updates_kernel(
    row_params, block_tables, table_stride, rows, new_params, blocks, num_rows, num_blocks, row_programs,
    NUM_PARAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `row_programs` programs copy BLOCK rows of parameters each, the others write BLOCK block-table entries each."""
    program = tl.program_id(0)
    if program < row_programs:
        i = program * BLOCK + tl.arange(0, BLOCK)
        mask = i < num_rows
        row = tl.load(rows + i, mask=mask, other=0).to(tl.int64)
        column = tl.arange(0, NUM_PARAMS)
        values = tl.load(new_params + i[:, None] * NUM_PARAMS + column[None, :], mask=mask[:, None], other=0)
        tl.store(row_params + row[:, None] * NUM_PARAMS + column[None, :], values, mask=mask[:, None])
    else:
        i = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        mask = i < num_blocks
        row = tl.load(blocks + i * 3, mask=mask, other=0).to(tl.int64)
        index = tl.load(blocks + i * 3 + 1, mask=mask, other=0)
        block = tl.load(blocks + i * 3 + 2, mask=mask, other=0)
        tl.store(block_tables + row * table_stride + index, block, mask=mask)


def apply_updates(state: ops.RowState, rows: Tensor, params: Tensor, blocks: Tensor) -> None:
    """See `Ops.apply_updates`."""
    block = 32
    row_programs, block_programs = cdiv(rows.shape[0], block), cdiv(blocks.shape[0], block)
    if row_programs + block_programs:
        _apply_updates_kernel[(row_programs + block_programs,)](
            state.params, state.block_tables, state.block_tables.stride(0), rows, params, blocks, rows.shape[0], blocks.shape[0], row_programs,
            NUM_PARAMS=ops.NUM_PARAMS, BLOCK=block, num_warps=1,
        )  # fmt: skip


_PREPARE_ARGUMENTS = [
    "input_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_lens",
    "batch_rows",
    "logit_index",
    "row_params",
    "block_tables",
]
_PREPARE_ARGUMENTS += ["rows", "chunk_starts", "chunk_lens", "chunk_ids", "num_decodes", "num_chunks", "num_tokens", "decode_programs"]


@triton.jit(do_not_specialize=_PREPARE_ARGUMENTS)
def _prepare_inputs_kernel(
    input_ids, positions, slot_mapping, query_start, context_lens, batch_rows, logit_index, row_params, block_tables, table_stride,
    rows, chunk_starts, chunk_lens, chunk_ids, num_decodes, num_chunks, num_tokens, decode_programs,
    NUM_PARAMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ENTRIES: tl.constexpr, TOKENS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (p, 0) with p < decode_programs: ENTRIES decodes. Program (decode_programs + c, t): tokens [t * TOKENS, (t + 1) * TOKENS) of
    chunk c; c = num_chunks stands for the tokens that no chunk owns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    part = tl.program_id(1)
    if program < decode_programs:
        if part == 0:
            i = program * ENTRIES + tl.arange(0, ENTRIES)
            mask = i < num_decodes
            row = tl.load(rows + i, mask=mask, other=0)
            count = tl.load(row_params + row.to(tl.int64) * NUM_PARAMS + NUM_TOKENS, mask=mask, other=0)
            last = tl.load(row_params + row.to(tl.int64) * NUM_PARAMS + LAST_ID, mask=mask, other=0)
            real = count > 0
            position = tl.where(real, count - 1, 0)
            block = tl.load(block_tables + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=mask & real, other=0).to(tl.int64)
            tl.store(input_ids + i, tl.where(real, last, 0), mask=mask)
            tl.store(positions + i, position, mask=mask)
            tl.store(slot_mapping + i, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=mask)
            tl.store(query_start + i, i, mask=mask)
            tl.store(context_lens + i, count, mask=mask)
            tl.store(batch_rows + i, row, mask=mask)
            tl.store(logit_index + i, tl.where(real, i, 0).to(tl.int64), mask=mask)
            if program == 0:
                tl.store(query_start + num_decodes, num_decodes)  # also the end where there is no chunk
    else:
        chunk = program - decode_programs
        c = tl.arange(0, CHUNKS)
        lens = tl.load(chunk_lens + c, mask=c < num_chunks, other=0)
        start = num_decodes + tl.sum(tl.where(c < chunk, lens, 0), axis=0)
        j = part * TOKENS + tl.arange(0, TOKENS)
        token = start + j
        if chunk == num_chunks:
            mask = token < num_tokens
            tl.store(input_ids + token, tl.zeros([TOKENS], tl.int32), mask=mask)
            tl.store(positions + token, tl.zeros([TOKENS], tl.int32), mask=mask)
            tl.store(slot_mapping + token, tl.full([TOKENS], -1, tl.int64), mask=mask)
        else:
            length = tl.load(chunk_lens + chunk)
            before = tl.load(chunk_starts + chunk)
            row = tl.load(rows + num_decodes + chunk)
            if part == 0:
                entry = num_decodes + chunk
                tl.store(query_start + entry, start)
                tl.store(query_start + entry + 1, start + length)
                tl.store(context_lens + entry, tl.where(length > 0, before + length, 0))
                tl.store(batch_rows + entry, row)
                tl.store(logit_index + entry, tl.where(length > 0, start + length - 1, 0).to(tl.int64))
            if part * TOKENS < length:
                mask = j < length
                position = before + j
                block = tl.load(block_tables + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
                ids = tl.load(chunk_ids + token - num_decodes, mask=mask, other=0)
                tl.store(input_ids + token, ids, mask=mask)
                tl.store(positions + token, position, mask=mask)
                tl.store(slot_mapping + token, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)


def prepare_inputs(state: ops.RowState, step: ops.StepInput, batch: ops.AttentionBatch, block_size: int) -> None:
    """See `Ops.prepare_inputs`."""
    num_decodes, num_chunks, num_tokens = step.num_decodes, step.chunk_lens.shape[0], batch.input_ids.shape[0]
    decode_programs = max(cdiv(num_decodes, _ENTRIES), 1)
    chunk_programs = num_chunks + 1 if num_tokens > num_decodes else 0
    _prepare_inputs_kernel[(decode_programs + chunk_programs, max(cdiv(num_tokens - num_decodes, _TOKENS), 1))](
        batch.input_ids, batch.positions, batch.slot_mapping, batch.query_start, batch.context_lens, batch.rows, batch.logit_index,
        state.params, state.block_tables, state.block_tables.stride(0),
        step.rows, step.chunk_starts, step.chunk_lens, step.chunk_ids, num_decodes, num_chunks, num_tokens, decode_programs,
        NUM_PARAMS=ops.NUM_PARAMS, BLOCK_SIZE=block_size, ENTRIES=_ENTRIES, TOKENS=_TOKENS, CHUNKS=max(next_power_of_2(num_chunks), 16), num_warps=4,
        **dependent_launch(batch.input_ids.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["row_params", "counts", "rows", "samples", "context_lens", "token_ids", "num_entries"])
def _commit_sampled_kernel(
    row_params, counts, rows, samples, context_lens, token_ids, num_entries, counts_stride,
    NUM_PARAMS: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row occurs once among the entries that sample, so nothing here needs an atomic."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_entries
    mask = mask & (tl.load(samples + i, mask=mask, other=0) > 0)
    row = tl.load(rows + i, mask=mask, other=0).to(tl.int64)
    token = tl.load(token_ids + i, mask=mask, other=0)
    context = tl.load(context_lens + i, mask=mask, other=0)
    index = tl.load(row_params + row * NUM_PARAMS + OUTPUT_INDEX, mask=mask, other=0)
    tl.store(row_params + row * NUM_PARAMS + LAST_ID, token, mask=mask)
    tl.store(row_params + row * NUM_PARAMS + NUM_TOKENS, context + 1, mask=mask)
    tl.store(row_params + row * NUM_PARAMS + OUTPUT_INDEX, index + 1, mask=mask)
    if HAS_COUNTS:
        count = tl.load(counts + row * counts_stride + token, mask=mask, other=0)
        tl.store(counts + row * counts_stride + token, count + 1, mask=mask)


def commit_sampled(state: ops.RowState, step: ops.StepInput, batch: ops.AttentionBatch, token_ids: Tensor) -> None:
    """See `Ops.commit_sampled`."""
    num_entries = step.rows.shape[0]
    counts = state.output_counts
    if num_entries:
        block = 64
        _commit_sampled_kernel[(cdiv(num_entries, block),)](
            state.params, state.params if counts is None else counts, step.rows, step.samples, batch.context_lens, token_ids, num_entries,
            0 if counts is None else counts.stride(0), NUM_PARAMS=ops.NUM_PARAMS, HAS_COUNTS=counts is not None, BLOCK=block, num_warps=2,
            **dependent_launch(token_ids.device),
        )  # fmt: skip
