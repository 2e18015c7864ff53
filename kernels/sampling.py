"""Sampling without leaving the device: the launches that `reference_sampling` defines in words.

Without filters a row is split over several programs, each the argmax of logits / temperature + noise over its part of the vocabulary; the last
to arrive combines them. Filtered rows are `filtered_sampling`'s.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels import filtered_sampling, ops
from appliance.kernels.launch import arrival_counters, cdiv, dependent_launch, next_power_of_2
from appliance.kernels.scores import (
    FREQUENCY_PENALTY,
    LOG2_E,
    NOISE_LANES,
    NUM_PARAMS,
    OUTPUT_INDEX,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    float_column,
    gumbel_of,
    num_parts,
    ordered,
    philox_words,
)


@triton.jit(do_not_specialize=["rows", "row_params", "num_parts", "tiles"])  # one compilation for any number of rows
def _argmax_kernel(
    token_ids, part_values, part_ids, counters, logits, rows, row_params, vocab, logits_stride, num_parts, tiles,
    NOISE: tl.constexpr, MOST_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, row of logits): so many tiles of BLOCK ids. Ties go to the lowest id."""
    part = tl.program_id(0)
    entry = tl.program_id(1)
    lane = tl.arange(0, BLOCK // 4)
    # A lane's four ids of a tile take the four words of one Philox call.
    offset = lane // NOISE_LANES * (4 * NOISE_LANES) + lane % NOISE_LANES
    best = tl.full([BLOCK // 4], float("-inf"), tl.float32)
    best_id = part * (tiles * BLOCK) + offset
    source = logits + entry.to(tl.int64) * logits_stride
    temperature = 0.0
    index, low, high = 0, 0, 0
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if NOISE:
        row = tl.load(rows + entry).to(tl.int64)
        temperature = float_column(row_params, row, TEMPERATURE)
        index = tl.load(row_params + row * NUM_PARAMS + OUTPUT_INDEX)
        low = tl.load(row_params + row * NUM_PARAMS + SEED_LOW)
        high = tl.load(row_params + row * NUM_PARAMS + SEED_HIGH)
    if temperature > 0:
        scale = 1.0 / temperature
        for tile in range(tiles):
            start = part * (tiles * BLOCK) + tile * BLOCK
            words = philox_words(start // 4 + lane, index, low, high)
            for word in tl.static_range(4):
                ids = start + word * NOISE_LANES + offset
                x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
                x = x * scale + gumbel_of(words[word])
                better = x > best
                best = tl.where(better, x, best)
                best_id = tl.where(better, ids, best_id)
    else:
        for tile in range(tiles):
            for word in tl.static_range(4):
                ids = part * (tiles * BLOCK) + tile * BLOCK + word * NOISE_LANES + offset
                x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
                better = x > best
                best = tl.where(better, x, best)
                best_id = tl.where(better, ids, best_id)
    value = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == value, best_id, 0x7FFFFFFF), axis=0)
    winner = tl.where(winner == 0x7FFFFFFF, 0, winner)  # a row of NaN
    if num_parts == 1:
        tl.store(token_ids + entry, winner)
    else:
        tl.store(part_values + entry * num_parts + part, value)
        tl.store(part_ids + entry * num_parts + part, winner)
        tl.debug_barrier()
        if tl.atomic_add(counters + entry, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.debug_barrier()
            tl.store(counters + entry, 0)
            parts = tl.arange(0, MOST_PARTS)
            values = tl.load(part_values + entry * num_parts + parts, mask=parts < num_parts, other=float("-inf"), cache_modifier=".cg")
            ids = tl.load(part_ids + entry * num_parts + parts, mask=parts < num_parts, other=0x7FFFFFFF, cache_modifier=".cg")
            top = tl.max(values, axis=0)
            winner = tl.min(tl.where(values == top, ids, 0x7FFFFFFF), axis=0)
            tl.store(token_ids + entry, tl.where(winner == 0x7FFFFFFF, 0, winner))


@triton.jit(do_not_specialize=["rows", "row_params"])
def _penalties_kernel(
    out, logits, rows, row_params, prompt_mask, output_counts, vocab, logits_stride, state_stride, counts_stride, BLOCK: tl.constexpr
):
    entry = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab
    row = tl.load(rows + entry).to(tl.int64)
    x = tl.load(logits + entry * logits_stride + ids, mask=mask, other=0.0).to(tl.float32)
    counts = tl.load(output_counts + row * counts_stride + ids, mask=mask, other=0)
    output = counts > 0
    seen = (tl.load(prompt_mask + row * state_stride + ids, mask=mask, other=0) != 0) | output
    repetition = tl.zeros_like(x) + float_column(row_params, row, REPETITION_PENALTY)
    x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = x - float_column(row_params, row, FREQUENCY_PENALTY) * counts.to(tl.float32)
    x = x - float_column(row_params, row, PRESENCE_PENALTY) * output.to(tl.float32)
    tl.store(out + entry * vocab + ids, x, mask=mask)


@triton.jit(do_not_specialize=["entries", "ids", "values", "count"])
def _bias_kernel(logits, entries, ids, values, count, vocab, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = tl.load(entries + i, mask=mask, other=0) * vocab + tl.load(ids + i, mask=mask, other=0)
    tl.atomic_add(logits + at, tl.load(values + i, mask=mask, other=0.0), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_top"])
def _logprobs_kernel(logprobs, ranks, top_ids, top_logprobs, logits, token_ids, vocab, logits_stride, num_top, BLOCK: tl.constexpr):
    """One program a row: the log-sum-exp, the drawn id's log-probability and rank, then the top ids one after another."""
    entry = tl.program_id(0).to(tl.int64)
    source = logits + entry * logits_stride
    lane = tl.arange(0, BLOCK)
    token = tl.load(token_ids + entry)
    drawn = tl.load(source + token).to(tl.float32)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    higher = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + lane
        x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, x)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2((peak - base) * LOG2_E) + tl.exp2((x - base) * LOG2_E)
        peak = new_peak
        higher += (x > drawn).to(tl.int32)
    top = tl.max(peak, axis=0)
    norm = top + tl.log(tl.sum(total * tl.exp2((peak - top) * LOG2_E), axis=0))
    tl.store(logprobs + entry, drawn - norm)
    tl.store(ranks + entry, 1 + tl.sum(higher, axis=0))
    last = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in range(num_top):
        best = tl.full([BLOCK], -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in range(0, vocab, BLOCK):
            ids = start + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            key = (ordered(x).to(tl.int64) << 32) | (vocab - 1 - ids).to(tl.int64)  # larger score first, then lower id
            best = tl.where((ids < vocab) & (key < last) & (key > best), key, best)
        last = tl.max(best, axis=0)
        chosen = vocab - 1 - (last & 0xFFFFFFFF).to(tl.int32)
        tl.store(top_ids + entry * num_top + i, chosen)
        tl.store(top_logprobs + entry * num_top + i, tl.load(source + chosen).to(tl.float32) - norm)


def sample(logits: Tensor, batch: ops.SamplingBatch) -> ops.Sampled:
    """See `Ops.sample`; logits `[B, vocab]` are not changed."""
    logits = _adjusted(logits, batch)
    num_rows, vocab = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        pass
    elif batch.all_greedy or not (batch.use_top_k or batch.use_top_p or batch.use_min_p):
        _argmax(token_ids, logits, batch)
    else:
        filtered_sampling.draw(token_ids, logits, batch)
    if batch.num_logprobs is None:
        return ops.Sampled(token_ids)
    return _with_logprobs(logits, token_ids, min(batch.num_logprobs, vocab))


def _adjusted(logits: Tensor, batch: ops.SamplingBatch) -> Tensor:
    """Logits after penalties and bias: the very tensor where there are none, else a float32 copy."""
    num_rows, vocab = logits.shape
    biased = batch.bias_entries is not None and batch.bias_ids is not None and batch.bias_values is not None and batch.bias_entries.shape[0] > 0
    if num_rows == 0 or not (batch.use_penalties or biased):
        return logits
    state = batch.state
    if batch.use_penalties:
        if state.prompt_mask is None or state.output_counts is None:
            raise ValueError("use_penalties needs state.prompt_mask and state.output_counts")
        out = torch.empty((num_rows, vocab), dtype=torch.float32, device=logits.device)
        block = 2048
        _penalties_kernel[(cdiv(vocab, block), num_rows)](
            out, logits, batch.rows, state.params, state.prompt_mask.view(torch.uint8), state.output_counts, vocab, logits.stride(0),
            state.prompt_mask.stride(0), state.output_counts.stride(0), BLOCK=block, num_warps=4,
        )  # fmt: skip
    else:
        out = logits.to(torch.float32, copy=True)
    if biased:
        count = batch.bias_entries.shape[0]  # type: ignore[union-attr]
        _bias_kernel[(cdiv(count, 256),)](out, batch.bias_entries, batch.bias_ids, batch.bias_values, count, vocab, BLOCK=256, num_warps=4)
    return out


def _argmax(token_ids: Tensor, logits: Tensor, batch: ops.SamplingBatch) -> None:
    num_rows, vocab = logits.shape
    block = 1024 if vocab <= 1024 else 2048
    parts = num_parts(num_rows, vocab, block, logits.device)
    values = torch.empty((num_rows, parts), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    _argmax_kernel[(parts, num_rows)](
        token_ids, values, ids, arrival_counters(logits.device), logits, batch.rows, batch.state.params, vocab, logits.stride(0),
        parts, cdiv(vocab, parts * block), NOISE=not batch.all_greedy, MOST_PARTS=next_power_of_2(cdiv(vocab, block)), BLOCK=block, num_warps=8,
        **dependent_launch(logits.device),
    )  # fmt: skip


def _with_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> ops.Sampled:
    num_rows, vocab = logits.shape
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int32, device=logits.device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
    if num_rows:
        _logprobs_kernel[(num_rows,)](
            logprobs, ranks, top_ids, top_logprobs, logits, token_ids, vocab, logits.stride(0), num_top,
            BLOCK=min(4096, next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
    return ops.Sampled(token_ids, logprobs, ranks, top_ids, top_logprobs)
