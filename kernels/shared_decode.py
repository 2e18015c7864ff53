"""Attention of one new token a sequence over its paged KV cache, for batches too small to fill the chip evenly.

What paged_decode.py does, cut otherwise: the tiles of all sequences lie in one line, those of a (sequence, KV head) pair together, and every program
takes an equal stretch of it. Whatever the lengths, all end at the same time (stream-K, Osama et al. 2023; for attention Lean Attention, Sanovar et
al. 2024). A pair that several programs share is combined by the one that arrives last. The shares are found on the device, so a graph serves any
lengths. With more pairs than about three a multiprocessor the hardware evens out as well, and a program that keeps to one pair is faster.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.decode_loop import attend_keys
from appliance.kernels.kv_cache import FP8
from appliance.kernels.launch import arrival_counters, cdiv, dependent_launch, next_power_of_2
from appliance.kernels.ops import AttentionBatch


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """How a launch is cut: keys of a tile, programs that share all tiles, partial results combined at once, warps of a program, tiles in flight."""

    block_n: int
    num_programs: int
    pieces: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["context_lens", "rows", "block_tables", "num_decodes"])
def _shared_decode_kernel(
    out, partial, partial_stats, counters, q, key_cache, value_cache, context_lens, rows, block_tables, table_stride, qk_scale,
    stride_block, stride_head, num_decodes,
    HKV: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, PIECES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles [low, high) of the line of all tiles. Scores are kept in base 2: qk_scale = scale * log2(e)."""
    program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.arange(0, BLOCK_B)
    contexts = tl.load(context_lens + b, mask=b < num_decodes, other=0)
    tiles = tl.cdiv(contexts, BLOCK_N)
    if WINDOW > 0:
        tiles -= tl.maximum(contexts - WINDOW, 0) // BLOCK_N
    tiles = tl.where(b < num_decodes, tl.maximum(tiles, 1), 0)  # a padded entry is visited too: its output is 0
    ends = tl.cumsum(tiles, axis=0) * HKV
    share = tl.cdiv(tl.sum(tiles, axis=0) * HKV, tl.num_programs(0))
    at = program * share
    high = tl.minimum(at + share, tl.sum(tiles, axis=0) * HKV)
    entry = tl.sum((ends <= at).to(tl.int32), axis=0)
    begin = tl.max(tl.where(ends <= at, ends, 0), axis=0)  # of the entry's tiles

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    g_mask = (g < GROUP)[:, None] & (d < D)[None, :]

    while at < high:
        context = tl.load(context_lens + entry)
        row = tl.load(rows + entry)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(context - WINDOW, 0) // BLOCK_N
        num_tiles = tl.maximum(tl.cdiv(context, BLOCK_N) - first, 1)
        head = (at - begin) // num_tiles
        pair_begin = begin + head * num_tiles
        pair_end = pair_begin + num_tiles
        until = tl.minimum(pair_end, high)
        low_key = (first + at - pair_begin) * BLOCK_N
        high_key = tl.minimum((first + until - pair_begin) * BLOCK_N, context)

        out_at = (entry * (HKV * GROUP) + head * GROUP + g[:, None]) * D + d[None, :]
        query = tl.load(q + out_at, mask=g_mask, other=0.0)
        table = block_tables + row.to(tl.int64) * table_stride
        peak, total, acc = attend_keys(
            query, key_cache, value_cache, table, head, low_key, high_key, context, qk_scale, stride_block, stride_head,
            HKV, BLOCK_G, D, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, PRECISION, FP8,
        )  # fmt: skip

        if (at == pair_begin) & (until == pair_end):
            tl.store(out + out_at, (acc / tl.where(total > 0.0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=g_mask)
        else:
            # A program has two places for parts of a pair: 0 for one that it begins with, 1 for one that begins within its share.
            first_program = pair_begin // share
            last_program = (pair_end - 1) // share
            within = (pair_begin > first_program * share).to(tl.int32)
            place = 2 * program + tl.where(program == first_program, within, 0)
            tl.store(partial + (place * GROUP + g[:, None]) * D + d[None, :], acc, mask=g_mask)
            tl.store(partial_stats + place * (2 * GROUP) + g, peak, mask=g < GROUP)
            tl.store(partial_stats + place * (2 * GROUP) + GROUP + g, total, mask=g < GROUP)
            tl.debug_barrier()  # every thread's partials before the one thread's release
            # Only one pair crosses the end of the first program's share: the counter is its own.
            arrived = tl.atomic_add(counters + first_program, 1, sem="acq_rel", scope="gpu")
            if arrived == last_program - first_program:
                tl.debug_barrier()
                tl.store(counters + first_program, 0)
                for i in tl.static_range(GROUP):
                    top = tl.full([1], float("-inf"), tl.float32)
                    denominator = tl.zeros([1], tl.float32)
                    result = tl.zeros([BLOCK_D], tl.float32)
                    for piece in range(first_program, last_program + 1, PIECES):
                        s = piece + tl.arange(0, PIECES)
                        active = s <= last_program
                        places = 2 * s + tl.where(s == first_program, within, 0)
                        peaks = tl.load(partial_stats + places * (2 * GROUP) + i, mask=active, other=float("-inf"), cache_modifier=".cg")
                        totals = tl.load(partial_stats + places * (2 * GROUP) + GROUP + i, mask=active, other=0.0, cache_modifier=".cg")
                        accs = tl.load(
                            partial + (places * GROUP + i)[:, None] * D + d[None, :], mask=active[:, None] & (d < D)[None, :], other=0.0,
                            cache_modifier=".cg",
                        )  # fmt: skip
                        new_top = tl.maximum(top, tl.max(peaks, axis=0))
                        base_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                        weights = tl.exp2(peaks - base_top)
                        kept = tl.exp2(top - base_top)
                        denominator = denominator * kept + tl.sum(weights * totals, axis=0)
                        result = result * kept + tl.sum(accs * weights[:, None], axis=0)
                        top = new_top
                    result = result / tl.where(denominator > 0.0, denominator, 1.0)
                    tl.store(out + (entry * (HKV * GROUP) + head * GROUP + i) * D + d, result.to(out.dtype.element_ty), mask=d < D)
        at = until
        if at == begin + HKV * num_tiles:
            begin = at
            entry += 1


def choose_config(num_pairs: int, max_context_len: int, itemsize: int, multiprocessors: int) -> SharedConfig:
    """As many programs as stand on the chip at once (half of them for a sequence or two), fewer where the longest contexts have fewer tiles.

    Swept on an H100 at heads of 128 (microseconds, one program a pair or a split of it beside it): one entry of 700 keys 6.8 (7.5), 8 of 100 to
    1,900 keys 16.5 (17.3), 16 31 (38), 32 57 (62), 48 78 (79).
    """
    block_n, num_warps, num_stages = (32, 8, 2) if itemsize > 2 else (32, 2, 4)  # scalar units: four warps spill
    each = 2 if itemsize > 2 or num_pairs * 8 < multiprocessors else 4
    num_programs = min(each * multiprocessors, num_pairs * cdiv(max(max_context_len, 1), block_n))
    return SharedConfig(block_n, num_programs, 32 if num_pairs * 8 < multiprocessors else 8, num_warps, num_stages)


def _round_up_entries(num_decodes: int) -> int:
    """16, 64, 256, 1024, ...: a few variants of the kernel for all batches."""
    return 1 << max((max(num_decodes - 1, 0).bit_length() + 1) // 2 * 2, 4)


def shared_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
    config: SharedConfig,
) -> None:
    """Attention of entries [0, num_decodes), of which there is at least one, into the first rows of `out` `[T, Hq * D]`; q `[T, Hq, D]`."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_decodes = batch.num_decodes
    group = num_heads // num_kv_heads
    partial = torch.empty((2 * config.num_programs, group, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((2 * config.num_programs, 2, group), dtype=torch.float32, device=q.device)
    _shared_decode_kernel[(config.num_programs,)](
        out, partial, stats, arrival_counters(q.device), q, key_cache, value_cache, batch.context_lens, batch.rows, batch.block_tables,
        batch.block_tables.stride(0), scale * math.log2(math.e), key_cache.stride(0), key_cache.stride(1), num_decodes,
        HKV=num_kv_heads, GROUP=group, BLOCK_G=max(next_power_of_2(group), 16), D=head_dim, BLOCK_D=max(next_power_of_2(head_dim), 16),
        BLOCK_SIZE=block_size, BLOCK_N=config.block_n, BLOCK_B=_round_up_entries(num_decodes), PIECES=config.pieces, WINDOW=sliding_window or 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", FP8=key_cache.dtype == FP8, num_warps=config.num_warps,
        num_stages=config.num_stages, **dependent_launch(q.device),
    )  # fmt: skip
