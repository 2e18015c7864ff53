"""Sampling without leaving the device: the launches that `reference_sampling` defines in words.

Without filters a row is split over several programs, each the argmax of logits / temperature + noise over its part of the vocabulary; the last
to arrive combines them. With filters one program a row looks for the shortest kept prefix by bisection on the ordered bits of the scores,
instead of sorting 151,936 of them.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, SIM108 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels import ops
from appliance.kernels.launch import arrival_counters, cdiv, dependent_launch, next_power_of_2, num_multiprocessors

_OUTPUT_INDEX = tl.constexpr(ops.OUTPUT_INDEX)
_SEED_LOW = tl.constexpr(ops.SEED_LOW)
_SEED_HIGH = tl.constexpr(ops.SEED_HIGH)
_TEMPERATURE = tl.constexpr(ops.TEMPERATURE)
_TOP_K = tl.constexpr(ops.TOP_K)
_TOP_P = tl.constexpr(ops.TOP_P)
_MIN_P = tl.constexpr(ops.MIN_P)
_REPETITION = tl.constexpr(ops.REPETITION_PENALTY)
_PRESENCE = tl.constexpr(ops.PRESENCE_PENALTY)
_FREQUENCY = tl.constexpr(ops.FREQUENCY_PENALTY)
_NUM_PARAMS = tl.constexpr(ops.NUM_PARAMS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _float(row_params, row, column: tl.constexpr):
    return tl.load(row_params + row * _NUM_PARAMS + column).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(ids, output_index, seed_low, seed_high):
    """Twin of philox.gumbel_noise: -log(-log u), u = (word + 0.5) / 2^32, in float32 to a few units in the last place.

    Near u = 1, where float32 has no room, -log u comes from the complement v = 1 - u: -log(1 - v) = 2 artanh(v / (2 - v)), by its series.
    """
    c0 = ids.to(tl.uint32)
    c1 = tl.zeros_like(c0) + output_index.to(tl.uint32, bitcast=True)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed_low.to(tl.uint32, bitcast=True)
    k1 = seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    upper = c0 >= 0x80000000
    folded = tl.where(upper, c0 ^ 0xFFFFFFFF, c0)  # the word, or the complement's: below 2^31
    v = (folded.to(tl.int32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    s = v / (2.0 - v)
    t = s * s
    series = 1.0 + t * (0.33333334 + t * (0.2 + t * (0.14285715 + t * (0.11111111 + t * (0.09090909 + t * (0.07692308 + t * 0.06666667))))))
    negative_log = tl.where(upper, 2.0 * s * series, -tl.log(v))
    return -tl.log(negative_log)


@triton.jit
def _ordered(x):
    """int32 that orders as the float32 x does; -0.0 and 0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["rows", "row_params"])
def _argmax_kernel(
    token_ids, part_values, part_ids, counters, logits, rows, row_params, vocab, logits_stride,
    NOISE: tl.constexpr, NUM_PARTS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, row of logits): TILES tiles of BLOCK ids. Ties go to the lowest id."""
    part = tl.program_id(0)
    entry = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = part * (TILES * BLOCK) + lane
    source = logits + entry.to(tl.int64) * logits_stride
    temperature = 0.0
    index, low, high = 0, 0, 0
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if NOISE:
        row = tl.load(rows + entry).to(tl.int64)
        temperature = _float(row_params, row, _TEMPERATURE)
        index = tl.load(row_params + row * _NUM_PARAMS + _OUTPUT_INDEX)
        low = tl.load(row_params + row * _NUM_PARAMS + _SEED_LOW)
        high = tl.load(row_params + row * _NUM_PARAMS + _SEED_HIGH)
    if temperature > 0:
        for tile in range(TILES):
            ids = part * (TILES * BLOCK) + tile * BLOCK + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            x = tl.div_rn(x, tl.zeros_like(x) + temperature) + _gumbel(ids, index, low, high)
            better = x > best
            best = tl.where(better, x, best)
            best_id = tl.where(better, ids, best_id)
    else:
        for tile in range(TILES):
            ids = part * (TILES * BLOCK) + tile * BLOCK + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            better = x > best
            best = tl.where(better, x, best)
            best_id = tl.where(better, ids, best_id)
    value = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == value, best_id, 0x7FFFFFFF), axis=0)
    winner = tl.where(winner == 0x7FFFFFFF, 0, winner)  # a row of NaN
    if NUM_PARTS == 1:
        tl.store(token_ids + entry, winner)
    else:
        tl.store(part_values + entry * NUM_PARTS + part, value)
        tl.store(part_ids + entry * NUM_PARTS + part, winner)
        tl.debug_barrier()
        if tl.atomic_add(counters + entry, 1, sem="acq_rel", scope="gpu") == NUM_PARTS - 1:
            tl.debug_barrier()
            tl.store(counters + entry, 0)
            parts = tl.arange(0, NUM_PARTS)
            values = tl.load(part_values + entry * NUM_PARTS + parts, cache_modifier=".cg")
            ids = tl.load(part_ids + entry * NUM_PARTS + parts, cache_modifier=".cg")
            top = tl.max(values, axis=0)
            winner = tl.min(tl.where(values == top, ids, 0x7FFFFFFF), axis=0)
            tl.store(token_ids + entry, tl.where(winner == 0x7FFFFFFF, 0, winner))


@triton.jit
def _tail(source, vocab, temperature, peak, low, BLOCK: tl.constexpr):
    """How many scores have ordered bits >= low, and their mass relative to the peak's."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lane
        x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        s = tl.div_rn(x, tl.zeros_like(x) + temperature)
        inside = (_ordered(s) >= low) & (ids < vocab)
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp2((s - peak) * _LOG2_E), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _equal_before(source, vocab, temperature, level, end, BLOCK: tl.constexpr):
    """How many ids below `end` have exactly the score whose ordered bits are `level`."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, end, BLOCK):
        ids = start + lane
        x = tl.load(source + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        s = tl.div_rn(x, tl.zeros_like(x) + temperature)
        count += ((_ordered(s) == level) & (ids < end)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["rows", "row_params"])
def _filtered_kernel(
    token_ids, logits, rows, row_params, vocab, logits_stride,
    USE_TOP_K: tl.constexpr, USE_TOP_P: tl.constexpr, USE_MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. What the filters keep is a prefix of the order (falling score, rising id): all scores above `level` and, of those equal
    to it, the `ties` lowest ids."""
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    source = logits + entry.to(tl.int64) * logits_stride
    lane = tl.arange(0, BLOCK)
    temperature = _float(row_params, row, _TEMPERATURE)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lane
        top = tl.maximum(top, tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32))
    peak = tl.div_rn(tl.max(top, axis=0), temperature)
    level = tl.full([], -2147483648, tl.int64)
    ties = vocab
    min_p = 0.0
    if greedy:
        level = _ordered(peak).to(tl.int64)
    else:
        if USE_MIN_P:
            min_p = _float(row_params, row, _MIN_P)
        limit = vocab
        if USE_TOP_K:
            k = tl.load(row_params + row * _NUM_PARAMS + _TOP_K)
            limit = tl.where((k > 0) & (k < vocab), k, vocab)
        if limit < vocab:
            above = _ordered(peak).to(tl.int64) + 1  # too few scores are >= above, enough are >= level
            while above - level > 1:
                middle = level + (above - level) // 2
                count, _ = _tail(source, vocab, temperature, peak, middle, BLOCK)
                if count >= limit:
                    level = middle
                else:
                    above = middle
            count, _ = _tail(source, vocab, temperature, peak, level + 1, BLOCK)
            ties = limit - count
        if USE_TOP_P:
            p = _float(row_params, row, _TOP_P)
            if p < 1.0:
                floor = level
                _, total = _tail(source, vocab, temperature, peak, floor + 1, BLOCK)
                _, whole = _tail(source, vocab, temperature, peak, floor, BLOCK)
                if limit < vocab:
                    # _ordered is its own inverse on the bits
                    at = level.to(tl.int32)
                    score = tl.where(at < 0, at ^ 0x7FFFFFFF, at).to(tl.float32, bitcast=True)
                    whole = total + ties * tl.exp2((score - peak) * _LOG2_E)
                wanted = p * whole
                above = _ordered(peak).to(tl.int64) + 1
                while above - level > 1:
                    middle = level + (above - level) // 2
                    _, mass = _tail(source, vocab, temperature, peak, middle, BLOCK)
                    if mass >= wanted:
                        level = middle
                    else:
                        above = middle
                _, mass = _tail(source, vocab, temperature, peak, level + 1, BLOCK)
                at = level.to(tl.int32)
                score = tl.where(at < 0, at ^ 0x7FFFFFFF, at).to(tl.float32, bitcast=True)
                needed = tl.maximum(tl.ceil((wanted - mass) / tl.exp2((score - peak) * _LOG2_E)), 1.0)
                most = tl.where(level > floor, vocab, ties)
                ties = tl.where(needed < most, needed.to(tl.int32), most)
    # Of the ids equal to `level` the first `ties` count: those below `end`.
    end = vocab
    if ties < vocab:
        end = 0
        past = vocab
        if _equal_before(source, vocab, temperature, level, vocab, BLOCK) <= ties:
            end = vocab
        while past - end > 1:
            middle = end + (past - end) // 2
            if _equal_before(source, vocab, temperature, level, middle, BLOCK) <= ties:
                end = middle
            else:
                past = middle
    index = tl.load(row_params + row * _NUM_PARAMS + _OUTPUT_INDEX)
    low = tl.load(row_params + row * _NUM_PARAMS + _SEED_LOW)
    high = tl.load(row_params + row * _NUM_PARAMS + _SEED_HIGH)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = lane
    for start in range(0, vocab, BLOCK):
        ids = start + lane
        x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        s = tl.div_rn(x, tl.zeros_like(x) + temperature)
        ordered = _ordered(s)
        kept = (ids < vocab) & ((ordered > level) | ((ordered == level) & (ids < end)))
        if USE_MIN_P:
            kept = kept & ((tl.exp2((s - peak) * _LOG2_E) >= min_p) | (s == peak))
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            if greedy:
                score = s
            else:
                score = s + _gumbel(ids, index, low, high)
            better = kept & (score > best)
            best = tl.where(better, score, best)
            best_id = tl.where(better, ids, best_id)
    value = tl.max(best, axis=0)
    winner = tl.min(tl.where(best == value, best_id, 0x7FFFFFFF), axis=0)
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
    repetition = tl.zeros_like(x) + _float(row_params, row, _REPETITION)
    x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = x - _float(row_params, row, _FREQUENCY) * counts.to(tl.float32)
    x = x - _float(row_params, row, _PRESENCE) * output.to(tl.float32)
    tl.store(out + entry * vocab + ids, x, mask=mask)


@triton.jit(do_not_specialize=["entries", "ids", "values", "count"])
def _bias_kernel(logits, entries, ids, values, count, vocab, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    at = tl.load(entries + i, mask=mask, other=0) * vocab + tl.load(ids + i, mask=mask, other=0)
    tl.atomic_add(logits + at, tl.load(values + i, mask=mask, other=0.0), mask=mask, sem="relaxed")


@triton.jit
def _logprobs_kernel(
    logprobs, ranks, top_ids, top_logprobs, logits, token_ids, vocab, logits_stride, NUM_TOP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
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
        total = total * tl.exp2((peak - base) * _LOG2_E) + tl.exp2((x - base) * _LOG2_E)
        peak = new_peak
        higher += (x > drawn).to(tl.int32)
    top = tl.max(peak, axis=0)
    norm = top + tl.log(tl.sum(total * tl.exp2((peak - top) * _LOG2_E), axis=0))
    tl.store(logprobs + entry, drawn - norm)
    tl.store(ranks + entry, 1 + tl.sum(higher, axis=0))
    last = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for i in range(NUM_TOP):
        best = tl.full([BLOCK], -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in range(0, vocab, BLOCK):
            ids = start + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            key = (_ordered(x).to(tl.int64) << 32) | (vocab - 1 - ids).to(tl.int64)  # larger score first, then lower id
            best = tl.where((ids < vocab) & (key < last) & (key > best), key, best)
        last = tl.max(best, axis=0)
        chosen = vocab - 1 - (last & 0xFFFFFFFF).to(tl.int32)
        tl.store(top_ids + entry * NUM_TOP + i, chosen)
        tl.store(top_logprobs + entry * NUM_TOP + i, tl.load(source + chosen).to(tl.float32) - norm)


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
        _filtered_kernel[(num_rows,)](
            token_ids, logits, batch.rows, batch.state.params, vocab, logits.stride(0),
            USE_TOP_K=batch.use_top_k, USE_TOP_P=batch.use_top_p, USE_MIN_P=batch.use_min_p, BLOCK=min(4096, next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
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
    block = min(2048, next_power_of_2(vocab))
    most = next_power_of_2(cdiv(vocab, block))
    num_parts = 1
    while num_parts < most and num_rows * num_parts < 8 * num_multiprocessors(logits.device):
        num_parts *= 2
    values = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    _argmax_kernel[(num_parts, num_rows)](
        token_ids, values, ids, arrival_counters(logits.device), logits, batch.rows, batch.state.params, vocab, logits.stride(0),
        NOISE=not batch.all_greedy, NUM_PARTS=num_parts, TILES=cdiv(vocab, num_parts * block), BLOCK=block, num_warps=8,
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
            logprobs, ranks, top_ids, top_logprobs, logits, token_ids, vocab, logits.stride(0), NUM_TOP=num_top,
            BLOCK=min(4096, next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
    return ops.Sampled(token_ids, logprobs, ranks, top_ids, top_logprobs)
