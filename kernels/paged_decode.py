"""Attention of one new token a sequence over its paged KV cache.

out = softmax(q K^T * scale) V per head, online (Milakov and Gimelshein 2018), the keys of one sequence split over several programs where that
evens out the end (Flash-Decoding, Dao et al. 2023). The G query heads that share a KV head are the rows of one tile, so K and V are read once.
Small batches are cut otherwise: shared_decode.py. Twin: reference.attention.

A program reads tiles of BLOCK_N keys through the block table; a (block, KV head) pair is one contiguous run of block_size * D values. Bound by
memory: 4 * context * Hkv * D bytes a sequence in bf16, half of it in fp8, where each key's scale multiplies its scores and each value's its weight.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, SIM102 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.decode_loop import attend_keys
from appliance.kernels.kv_cache import FP8
from appliance.kernels.launch import NUM_COUNTERS, arrival_counters, dependent_launch, next_power_of_2, num_multiprocessors
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.shared_decode import choose_config as choose_shared_config
from appliance.kernels.shared_decode import shared_decode

_SHARED_PAIRS: Final = 3  # up to so many (sequence, KV head) pairs a multiprocessor the equal shares of shared_decode.py are faster


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a launch is cut: keys of a tile, splits of a sequence, warps of a program, tiles in flight."""

    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["context_lens", "rows", "block_tables"])
def _paged_decode_kernel(
    out, partial, partial_stats, counters, q, key_cache, value_cache, context_lens, rows, block_tables, table_stride, qk_scale,
    stride_block, stride_head,
    HKV: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one KV head of one entry, one split of its keys. Scores are kept in base 2: qk_scale = scale * log2(e)."""
    head = tl.program_id(0)
    entry = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    context = tl.load(context_lens + entry)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // BLOCK_N * BLOCK_N
    num_tiles = tl.cdiv(context - first, BLOCK_N)
    tiles_each = tl.cdiv(num_tiles, NUM_SPLITS)
    low = first + split * tiles_each * BLOCK_N
    high = tl.minimum(low + tiles_each * BLOCK_N, context)
    if NUM_SPLITS > 1:
        if (split > 0) & (low >= context):
            return

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    out_at = (entry * (HKV * GROUP) + head * GROUP + g[:, None]) * D + d[None, :]
    g_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(q + out_at, mask=g_mask, other=0.0)
    row = tl.load(rows + entry)
    table = block_tables + row.to(tl.int64) * table_stride
    peak, total, acc = attend_keys(
        query, key_cache, value_cache, table, head, low, high, context, qk_scale, stride_block, stride_head,
        HKV, BLOCK_G, D, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, PRECISION, FP8,
    )  # fmt: skip
    if NUM_SPLITS == 1:
        tl.store(out + out_at, (acc / tl.where(total > 0.0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=g_mask)
    else:
        # Partials of one (entry, head) lie together: [GROUP, NUM_SPLITS, D] and [2, GROUP, NUM_SPLITS].
        pair = (entry * HKV + head).to(tl.int64)
        sums = partial + pair * (GROUP * NUM_SPLITS * D)
        stats = partial_stats + pair * (2 * GROUP * NUM_SPLITS)
        tl.store(sums + (g[:, None] * NUM_SPLITS + split) * D + d[None, :], acc, mask=g_mask)
        tl.store(stats + g * NUM_SPLITS + split, peak, mask=g < GROUP)
        tl.store(stats + GROUP * NUM_SPLITS + g * NUM_SPLITS + split, total, mask=g < GROUP)
        tl.debug_barrier()  # every thread's partials before the one thread's release
        num_active = tl.maximum(tl.cdiv(num_tiles, tl.maximum(tiles_each, 1)), 1)
        arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_active - 1:
            tl.debug_barrier()
            tl.store(counters + pair, 0)
            s = tl.arange(0, NUM_SPLITS)
            active = s < num_active
            for i in tl.static_range(GROUP):
                peaks = tl.load(stats + i * NUM_SPLITS + s, mask=active, other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(stats + (GROUP + i) * NUM_SPLITS + s, mask=active, other=0.0, cache_modifier=".cg")
                top = tl.max(peaks, axis=0)
                weights = tl.exp2(peaks - tl.where(top == float("-inf"), 0.0, top))
                denominator = tl.sum(weights * totals, axis=0)
                accs = tl.load(
                    sums + (i * NUM_SPLITS + s)[:, None] * D + d[None, :], mask=active[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg"
                )
                result = tl.sum(accs * weights[:, None], axis=0) / tl.where(denominator > 0.0, denominator, 1.0)
                tl.store(out + (entry * (HKV * GROUP) + head * GROUP + i) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def choose_config(
    num_decodes: int, num_kv_heads: int, head_dim: int, max_context_len: int, itemsize: int, multiprocessors: int, *, fp8: bool = False
) -> DecodeConfig:
    """A cut by shape for a chip that is full, or nearly so.

    Swept on an H100 at heads of 128: 64 keys, 4 warps and 3 stages stream 3.0 TB/s at 256 entries. With fewer programs, whose contexts differ, two
    splits even out the end (96 entries of 100 to 1,800 keys: 129 us against 135).
    """
    pairs = max(num_decodes * num_kv_heads, 1)
    full = pairs >= 8 * multiprocessors
    if itemsize > 2:
        block_n, num_warps, num_stages = 32, 8, 2  # scalar units: four warps spill
    else:
        block_n, num_warps, num_stages = (32, 4, 7) if fp8 and full else (64, 4, 3)
    if head_dim > 128:
        num_stages = min(num_stages, 3)
    split = not full and itemsize <= 2 and max_context_len > block_n and pairs <= NUM_COUNTERS
    return DecodeConfig(block_n, 2 if split else 1, num_warps, num_stages)


def paged_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of entries [0, num_decodes) into the first rows of `out` `[T, Hq * D]`; q `[T, Hq, D]`."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_decodes = batch.num_decodes
    if num_decodes == 0:
        return
    if config is None:
        chip = num_multiprocessors(q.device)
        if num_decodes * num_kv_heads <= _SHARED_PAIRS * chip:
            shared = choose_shared_config(num_decodes * num_kv_heads, batch.max_context_len, q.element_size(), chip)
            shared_decode(q, key_cache, value_cache, batch, scale, sliding_window, out, shared)
            return
        config = choose_config(num_decodes, num_kv_heads, head_dim, batch.max_context_len, q.element_size(), chip, fp8=key_cache.dtype == FP8)
    group = num_heads // num_kv_heads
    num_splits = config.num_splits
    partial = out
    stats = out
    if num_splits > 1:
        partial = torch.empty((num_decodes, num_kv_heads, group, num_splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((num_decodes, num_kv_heads, 2, group, num_splits), dtype=torch.float32, device=q.device)
    _paged_decode_kernel[(num_kv_heads, num_decodes, num_splits)](
        out, partial, stats, arrival_counters(q.device), q, key_cache, value_cache, batch.context_lens, batch.rows, batch.block_tables,
        batch.block_tables.stride(0), scale * math.log2(math.e), key_cache.stride(0), key_cache.stride(1),
        HKV=num_kv_heads, GROUP=group, BLOCK_G=max(next_power_of_2(group), 16), D=head_dim, BLOCK_D=max(next_power_of_2(head_dim), 16),
        BLOCK_SIZE=block_size, BLOCK_N=config.block_n, NUM_SPLITS=num_splits, WINDOW=sliding_window or 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", FP8=key_cache.dtype == FP8, num_warps=config.num_warps,
        num_stages=config.num_stages, **dependent_launch(q.device),
    )  # fmt: skip
