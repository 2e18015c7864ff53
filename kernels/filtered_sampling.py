"""Top-k, top-p and min-p without sorting: the draw that `reference_sampling` defines, in three launches.

What the filters keep of a row is a prefix of the order (falling score, rising id). So the id with the best noisy score is drawn if it is kept; if
it is not, nothing after it in the order is kept either, and the draw goes on among what comes before. Whether an id is kept takes a count and a
mass over what comes before it, no sort.

1. A survey, each row split over several programs: the maxima of groups of ids, and the mass.
2. One program a row draws among candidates, all ids that reach the n-th largest group maximum (at least the n most likely are among them).
3. The same over the whole row, for the few rows whose kept ids may not all be candidates; the others it leaves at once.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels import ops
from appliance.kernels.launch import cdiv, dependent_launch, next_power_of_2
from appliance.kernels.scores import (
    LOG2_E,
    MIN_P,
    NUM_PARAMS,
    OUTPUT_INDEX,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_column,
    gumbel,
    num_parts,
    ordered,
)

_MAX_GROUPS: Final = 2048  # group maxima of a row, all in the registers of one program
_WANTED: Final = 256  # groups whose ids are looked at where no top-k says how many are needed
_CAPACITY: Final = 2048  # candidates of a row, likewise in registers
_USE_TOP_K = tl.constexpr(1)
_USE_TOP_P = tl.constexpr(2)
_USE_MIN_P = tl.constexpr(4)
_LOWEST = tl.constexpr(-2147483648)
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _filters(row_params, row, vocab, filters):
    """A row's top-k (vocab where off), top-p (1 where off), min-p (0 where off), and whether any of them can drop an id."""
    k = tl.load(row_params + row * NUM_PARAMS + TOP_K)
    k = tl.where((k > 0) & (k < vocab) & ((filters & _USE_TOP_K) != 0), k, vocab)
    p = tl.where((filters & _USE_TOP_P) != 0, float_column(row_params, row, TOP_P), 1.0)
    min_p = tl.where((filters & _USE_MIN_P) != 0, float_column(row_params, row, MIN_P), 0.0)
    return k, p, min_p, (k < vocab) | (p < 1.0) | (min_p > 0.0)


@triton.jit
def _peak_and_mass(part_peaks, part_sums, parts, is_part):
    """The largest score of a row, and the sum of exp(score - that one), from those of its parts."""
    peaks = tl.load(part_peaks + parts, mask=is_part, other=float("-inf"))
    sums = tl.load(part_sums + parts, mask=is_part, other=0.0)
    peak = tl.max(peaks, axis=0)
    return peak, tl.sum(tl.where(is_part, sums * tl.exp2((peaks - peak) * LOG2_E), 0.0), axis=0)


@triton.jit(do_not_specialize=["rows", "row_params", "num_parts", "tiles", "filters"])  # one compilation for any number of rows
def _survey_kernel(
    maxima, part_peaks, part_sums, part_values, part_ids, logits, rows, row_params, vocab, logits_stride, num_groups, num_parts, tiles, filters,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (part, row). Of a filtered row: the largest logit of each group, the part's peak score and mass. Of a greedy or an unfiltered row:
    the part's best score (noise included) and its id."""
    part = tl.program_id(0)
    entry = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lane = tl.arange(0, BLOCK)
    source = logits + entry.to(tl.int64) * logits_stride
    row = tl.load(rows + entry).to(tl.int64)
    temperature = float_column(row_params, row, TEMPERATURE)
    _, _, _, filtered = _filters(row_params, row, vocab, filters)
    at = entry * num_parts + part
    if (temperature > 0) & filtered:
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for tile in range(tiles):
            start = (part * tiles + tile) * BLOCK
            x = tl.load(source + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
            groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tops = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), axis=1)
            tl.store(maxima + entry.to(tl.int64) * num_groups + groups, tops, mask=groups < num_groups)
            x = tl.div_rn(x, tl.zeros_like(x) + temperature)
            new_peak = tl.maximum(peak, x)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2((peak - base) * LOG2_E) + tl.exp2((x - base) * LOG2_E)
            peak = new_peak
        top = tl.max(peak, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        tl.store(part_peaks + at, top)
        tl.store(part_sums + at, tl.sum(total * tl.exp2((peak - base) * LOG2_E), axis=0))
    else:
        index = tl.load(row_params + row * NUM_PARAMS + OUTPUT_INDEX)
        low = tl.load(row_params + row * NUM_PARAMS + SEED_LOW)
        high = tl.load(row_params + row * NUM_PARAMS + SEED_HIGH)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = part * (tiles * BLOCK) + lane
        for tile in range(tiles):
            ids = (part * tiles + tile) * BLOCK + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            if temperature > 0:
                x = tl.div_rn(x, tl.zeros_like(x) + temperature) + gumbel(ids, index, low, high)
            better = x > best
            best = tl.where(better, x, best)
            best_id = tl.where(better, ids, best_id)
        value = tl.max(best, axis=0)
        tl.store(part_values + at, value)
        tl.store(part_ids + at, tl.min(tl.where(best == value, best_id, _NO_ID), axis=0))


@triton.jit
def _kth_level(levels, k, low, high):
    """The largest level with at least k of `levels` >= it, from `low` (true of it) and `high` (false of it), int64 all three."""
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum((levels >= middle).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["rows", "row_params", "num_parts", "filters"])
def _draw_kernel(
    token_ids, pending, group_list, candidates, candidate_ids, maxima, part_peaks, part_sums, part_values, part_ids, logits, rows, row_params,
    vocab, logits_stride, num_groups, num_parts, filters,
    MOST_PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr, CAPACITY: tl.constexpr,
    WANTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. The candidates, in the order of their ids, go through global memory, since a tile cannot be packed in registers."""
    entry = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(rows + entry).to(tl.int64)
    temperature = float_column(row_params, row, TEMPERATURE)
    k, p, min_p, filtered = _filters(row_params, row, vocab, filters)
    is_part = tl.arange(0, MOST_PARTS) < num_parts
    parts = entry * num_parts + tl.arange(0, MOST_PARTS)
    unfinished = 0
    if (temperature > 0) & filtered:
        peak, total = _peak_and_mass(part_peaks, part_sums, parts, is_part)
        g = tl.arange(0, BLOCK_GROUPS)
        tops = tl.load(maxima + entry.to(tl.int64) * num_groups + g, mask=g < num_groups, other=float("-inf"))
        levels = tl.where(g < num_groups, ordered(tl.div_rn(tops, tl.zeros_like(tops) + temperature)), _LOWEST)
        above = ordered(peak).to(tl.int64) + 1
        wanted = tl.minimum(tl.where(k < vocab, tl.minimum(k, WANTED), WANTED), num_groups)
        level = _kth_level(levels, wanted, tl.full([], -2147483648, tl.int64), above)
        hits = (levels >= level) & (g < num_groups)
        num_hits = tl.sum(hits.to(tl.int32), axis=0)
        mine = group_list + entry * BLOCK_GROUPS
        tl.store(mine + tl.cumsum(hits.to(tl.int32), axis=0) - 1, g, mask=hits)
        tl.debug_barrier()

        values = candidates + entry * CAPACITY
        names = candidate_ids + entry * CAPACITY
        source = logits + entry.to(tl.int64) * logits_stride
        count = 0
        for start in range(0, num_hits, TILE_GROUPS):
            i = start + tl.arange(0, TILE_GROUPS)
            group = tl.load(mine + i, mask=i < num_hits, other=num_groups)
            ids = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [TILE_GROUPS * GROUP])
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            s = tl.div_rn(x, tl.zeros_like(x) + temperature)
            hit = (ordered(s) >= level) & (ids < vocab)
            place = count + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            tl.store(values + place, s, mask=hit & (place < CAPACITY))
            tl.store(names + place, ids, mask=hit & (place < CAPACITY))
            count += tl.sum(hit.to(tl.int32), axis=0)
        tl.debug_barrier()

        c = tl.arange(0, CAPACITY)
        valid = c < count
        s = tl.load(values + c, mask=valid, other=float("-inf"))
        ids = tl.load(names + c, mask=valid, other=_NO_ID)
        weights = tl.where(valid, tl.exp2((s - peak) * LOG2_E), 0.0)
        eligible = valid
        if k < vocab:
            ranked = tl.where(valid, ordered(s), _LOWEST)
            cut = _kth_level(ranked, k, level, above)
            equal = valid & (ranked == cut)
            higher = tl.sum((ranked > cut).to(tl.int32), axis=0)
            eligible = valid & ((ranked > cut) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= k - higher)))
            total = tl.sum(tl.where(eligible, weights, 0.0), axis=0)  # p is a share of what top-k leaves
            complete = k <= WANTED
        else:
            least = tl.min(tl.where(valid, weights, float("inf")), axis=0)
            complete = ((p < 1.0) & (tl.sum(weights, axis=0) >= p * total)) | ((min_p > 0.0) & (least < min_p)) | (count == vocab)
        if complete & (count <= CAPACITY):
            index = tl.load(row_params + row * NUM_PARAMS + OUTPUT_INDEX)
            low = tl.load(row_params + row * NUM_PARAMS + SEED_LOW)
            high = tl.load(row_params + row * NUM_PARAMS + SEED_HIGH)
            scores = tl.where(eligible, s + gumbel(ids, index, low, high), float("-inf"))
            drawn = -1
            while drawn < 0:
                best = tl.max(scores, axis=0)
                winner = tl.min(tl.where(scores == best, ids, _NO_ID), axis=0)
                score = tl.max(tl.where(ids == winner, s, float("-inf")), axis=0)
                before = eligible & ((s > score) | ((s == score) & (ids < winner)))
                mass = tl.sum(tl.where(before, weights, 0.0), axis=0)
                rank = tl.sum(before.to(tl.int32), axis=0)
                kept = ((p >= 1.0) | (mass < p * total)) & (tl.exp2((score - peak) * LOG2_E) >= min_p)
                if (rank == 0) | kept | (best == float("-inf")):
                    drawn = winner
                scores = tl.where(before, scores, float("-inf"))
            tl.store(token_ids + entry, tl.where(drawn < vocab, drawn, 0))
        else:
            unfinished = 1
    else:
        scores = tl.load(part_values + parts, mask=is_part, other=float("-inf"))
        winners = tl.load(part_ids + parts, mask=is_part, other=_NO_ID)
        winner = tl.min(tl.where(scores == tl.max(scores, axis=0), winners, _NO_ID), axis=0)
        tl.store(token_ids + entry, tl.where(winner < vocab, winner, 0))
    tl.store(pending + entry, unfinished)


@triton.jit
def _whole_row_mass_of_top_k(source, vocab, temperature, peak, k, BLOCK: tl.constexpr):
    """The mass of the k largest scores, relative to the peak's: bisection on the level of the k-th, a pass over the row for each step."""
    lane = tl.arange(0, BLOCK)
    low = tl.full([], -2147483648, tl.int64)
    high = ordered(peak).to(tl.int64) + 1
    total = 0.0
    searching = True
    while searching:
        searching = high - low > 1
        middle = low + tl.where(searching, (high - low) // 2, 1)  # the last pass looks just above the level found
        counts = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(source + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
            s = tl.div_rn(x, tl.zeros_like(x) + temperature)
            inside = (ordered(s) >= middle) & (start + lane < vocab)
            counts += inside.to(tl.int32)
            mass += tl.where(inside, tl.exp2((s - peak) * LOG2_E), 0.0)
        count = tl.sum(counts, axis=0)
        if searching:
            if count >= k:
                low = middle
            else:
                high = middle
        else:
            bits = low.to(tl.int32)
            level = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)  # `ordered` undone
            total = tl.sum(mass, axis=0) + (k - count) * tl.exp2((level - peak) * LOG2_E)
    return total


@triton.jit(do_not_specialize=["rows", "row_params", "num_parts", "filters"])
def _redraw_kernel(
    token_ids, pending, part_peaks, part_sums, logits, rows, row_params, vocab, logits_stride, num_parts, filters,
    MOST_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a pending row. Two passes a round; the first draw of a flat row under top-p is kept with probability p, so rounds are few."""
    entry = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(pending + entry) == 0:
        return
    row = tl.load(rows + entry).to(tl.int64)
    source = logits + entry.to(tl.int64) * logits_stride
    lane = tl.arange(0, BLOCK)
    temperature = float_column(row_params, row, TEMPERATURE)
    k, p, min_p, _ = _filters(row_params, row, vocab, filters)
    parts = tl.arange(0, MOST_PARTS)
    peak, total = _peak_and_mass(part_peaks, part_sums, entry * num_parts + parts, parts < num_parts)
    if (k < vocab) & (p < 1.0):
        total = _whole_row_mass_of_top_k(source, vocab, temperature, peak, k, BLOCK)
    index = tl.load(row_params + row * NUM_PARAMS + OUTPUT_INDEX)
    low = tl.load(row_params + row * NUM_PARAMS + SEED_LOW)
    high = tl.load(row_params + row * NUM_PARAMS + SEED_HIGH)
    bound = tl.full([], float("-inf"), tl.float32)  # eligible is what comes before (bound, bound_id) in the order
    bound_id = vocab
    drawn = -1
    while drawn < 0:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_score = best
        best_id = tl.full([BLOCK], _NO_ID, tl.int32)
        for start in range(0, vocab, BLOCK):
            ids = start + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            s = tl.div_rn(x, tl.zeros_like(x) + temperature)
            eligible = (ids < vocab) & ((s > bound) | ((s == bound) & (ids < bound_id)))
            noisy = s + gumbel(ids, index, low, high)
            better = eligible & (noisy > best)
            best = tl.where(better, noisy, best)
            best_score = tl.where(better, s, best_score)
            best_id = tl.where(better, ids, best_id)
        top = tl.max(best, axis=0)
        winner = tl.min(tl.where(best == top, best_id, _NO_ID), axis=0)
        score = tl.max(tl.where(best_id == winner, best_score, float("-inf")), axis=0)
        ranks = tl.zeros([BLOCK], tl.int32)
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ids = start + lane
            x = tl.load(source + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            s = tl.div_rn(x, tl.zeros_like(x) + temperature)
            before = (ids < vocab) & ((s > score) | ((s == score) & (ids < winner)))
            ranks += before.to(tl.int32)
            mass += tl.where(before, tl.exp2((s - peak) * LOG2_E), 0.0)
        rank = tl.sum(ranks, axis=0)
        kept = (rank < k) & ((p >= 1.0) | (tl.sum(mass, axis=0) < p * total)) & (tl.exp2((score - peak) * LOG2_E) >= min_p)
        if (rank == 0) | kept | (top == float("-inf")):
            drawn = winner
        bound = score
        bound_id = winner
    tl.store(token_ids + entry, tl.where(drawn < vocab, drawn, 0))


def draw(token_ids: Tensor, logits: Tensor, batch: ops.SamplingBatch) -> None:
    """Draw an id of every row of logits `[B, vocab]` into token_ids `[B]`: filtered, unfiltered and greedy rows alike."""
    num_rows, vocab = logits.shape
    device, rows, row_params = logits.device, batch.rows, batch.state.params
    block = 2048
    group = max(next_power_of_2(cdiv(vocab, _MAX_GROUPS)), 16)
    num_groups = cdiv(vocab, group)
    block_groups = next_power_of_2(num_groups)
    parts = num_parts(num_rows, vocab, block, device)
    maxima, candidates = (torch.empty((num_rows, n), dtype=torch.float32, device=device) for n in (num_groups, _CAPACITY))
    peaks, sums, values = (torch.empty((num_rows, parts), dtype=torch.float32, device=device) for _ in range(3))
    ids, group_list, candidate_ids, pending = (
        torch.empty((num_rows, n), dtype=torch.int32, device=device) for n in (parts, block_groups, _CAPACITY, 1)
    )
    most_parts, flags = next_power_of_2(cdiv(vocab, block)), dependent_launch(device)
    filters = batch.use_top_k * _USE_TOP_K.value + batch.use_top_p * _USE_TOP_P.value + batch.use_min_p * _USE_MIN_P.value
    _survey_kernel[(parts, num_rows)](
        maxima, peaks, sums, values, ids, logits, rows, row_params, vocab, logits.stride(0), num_groups,
        parts, cdiv(vocab, parts * block), filters, BLOCK=block, GROUP=group, num_warps=8, **flags,
    )  # fmt: skip
    _draw_kernel[(num_rows,)](
        token_ids, pending, group_list, candidates, candidate_ids, maxima, peaks, sums, values, ids, logits, rows, row_params, vocab,
        logits.stride(0), num_groups, parts, filters, MOST_PARTS=most_parts, GROUP=group, BLOCK_GROUPS=block_groups,
        TILE_GROUPS=max(4096 // group, 1), CAPACITY=_CAPACITY, WANTED=_WANTED, num_warps=8, **flags,
    )  # fmt: skip
    _redraw_kernel[(num_rows,)](
        token_ids, pending, peaks, sums, logits, rows, row_params, vocab, logits.stride(0), parts, filters, MOST_PARTS=most_parts, BLOCK=4096,
        num_warps=16, **flags,
    )  # fmt: skip
