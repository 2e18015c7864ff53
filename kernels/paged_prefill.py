"""Causal attention of prompt chunks over the paged KV cache (their own keys included, already stored).

out = softmax(q K^T * scale + causal mask) V per head, online and tiled (FlashAttention 2, Dao 2023) with keys gathered through the block table.
A tile's rows are BLOCK_Q tokens times the G query heads of one KV head: short chunks fill the matrix unit, and the masked diagonal is G times
thinner. Tiles wholly below the diagonal run without masks. Twin: reference.attention.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, SIM102, SIM108 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from appliance.kernels.kv_cache import FP8
from appliance.kernels.launch import next_power_of_2
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.scales import load_scales, power_of_two


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How a launch is cut: rows (tokens x group heads) and keys of a tile, warps of a program, tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _attend(
    acc, total, peak, query, positions, low, high, context, table, key_head, value_head, key_scales, value_scales, qk_scale, stride_block,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold keys [low, high) into the running softmax. Not MASKED promises that every row sees every key of the range."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    if FP8:
        key_bytes, value_bytes = load_scales(key_scales, value_scales, table, low + n, high, stride_block, BLOCK_SIZE)
    for start in range(low, high, BLOCK_N):
        keys = start + n
        if MASKED:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < context, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
        at = blocks[:, None] * stride_block + (keys % BLOCK_SIZE)[:, None] * D + d[None, :]
        if BLOCK_D == D:
            k = tl.load(key_head + at)
        else:
            k = tl.load(key_head + at, mask=(d < D)[None, :], other=0.0)
        k = k.to(query.dtype)
        if FP8:  # exact in float16
            key_factors = power_of_two(key_bytes) * 0.00390625
            value_factors = power_of_two(value_bytes) * 0.00390625
            key_bytes, value_bytes = load_scales(key_scales, value_scales, table, keys + BLOCK_N, high, stride_block, BLOCK_SIZE)
            k *= key_factors.to(query.dtype)[:, None]
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        if MASKED:  # what lies past the context is not ours: a NaN there must not reach the product
            v = tl.load(value_head + at, mask=(keys < context)[:, None] & (d < D)[None, :], other=0.0)
        elif BLOCK_D == D:
            v = tl.load(value_head + at)
        else:
            v = tl.load(value_head + at, mask=(d < D)[None, :], other=0.0)
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if WINDOW > 0:
                seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * qk_scale)
        base = new_peak
        if MASKED:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * qk_scale - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        v = v.to(query.dtype)
        if FP8:
            v *= value_factors.to(query.dtype)[:, None]
        acc = tl.dot(p.to(query.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["query_start", "context_lens", "rows", "block_tables", "num_decodes", "num_chunks"])
def _paged_prefill_kernel(
    out, q, key_cache, value_cache, query_start, context_lens, rows, block_tables, table_stride, num_decodes, num_chunks, qk_scale,
    stride_block, stride_head,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one chunk, one KV head.

    Chunk c owns tile numbers from (its first token // BLOCK_Q) + c on, which leaves room for its own rounding up; numbers between its last tile
    and the next chunk's first find nothing to do. Late tiles see the most keys, so they start first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    chunk = 0
    past = num_chunks
    while past - chunk > 1:
        middle = (chunk + past) // 2
        if (tl.load(query_start + num_decodes + middle) - num_decodes) // BLOCK_Q + middle <= tile:
            chunk = middle
        else:
            past = middle
    entry = num_decodes + chunk
    start = tl.load(query_start + entry)
    query_len = tl.load(query_start + entry + 1) - start
    first = (tile - (start - num_decodes) // BLOCK_Q - chunk) * BLOCK_Q
    if first >= query_len:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = first + m // GROUP
    row_mask = (m < BLOCK_Q * GROUP) & (token < query_len)
    mask = row_mask[:, None] & (d < D)[None, :]
    at = ((start + token).to(tl.int64) * (HKV * GROUP) + head * GROUP + m % GROUP)[:, None] * D + d[None, :]
    query = tl.load(q + at, mask=mask, other=0.0)
    if FP8:
        if query.dtype.primitive_bitwidth == 16:
            query = query.to(tl.float16)  # e4m3 widens to float16 in one instruction, to bfloat16 in four
    context = tl.load(context_lens + entry)
    row = tl.load(rows + entry)
    table = block_tables + row.to(tl.int64) * table_stride
    key_head = key_cache + head * stride_head
    value_head = value_cache + head * stride_head
    key_scales = key_cache + HKV * BLOCK_SIZE * D + head * BLOCK_SIZE
    value_scales = value_cache + HKV * BLOCK_SIZE * D + head * BLOCK_SIZE
    positions = context - query_len + token
    first_position = context - query_len + first
    last_position = context - query_len + tl.minimum(first + BLOCK_Q, query_len) - 1

    low = 0
    clear = 0  # keys [clear, diagonal) are seen by every row
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        low = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        clear = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        diagonal = tl.maximum(diagonal, clear)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WINDOW > 0:
        acc, total, peak = _attend(
            acc, total, peak, query, positions, low, tl.minimum(clear, last_position + 1), context, table, key_head, value_head,
            key_scales, value_scales, qk_scale, stride_block, D, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, PRECISION, FP8, True,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, query, positions, clear, diagonal, context, table, key_head, value_head,
        key_scales, value_scales, qk_scale, stride_block, D, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, PRECISION, FP8, False,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, query, positions, diagonal, last_position + 1, context, table, key_head, value_head,
        key_scales, value_scales, qk_scale, stride_block, D, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, PRECISION, FP8, True,
    )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def choose_config(max_query_len: int, group: int, head_dim: int, itemsize: int) -> PrefillConfig:
    """A cut by shape, swept on an H100 at 32 / 8 heads of 128 (share of the measured matrix rate): long chunks 128 x 128 with 8 warps (51-54 %
    at 8,192 and 32,768 tokens, 41-46 % with tiles of 64 keys), chunks of some 512 tokens 64 x 64 (7 % faster than 128 x 128), short ones behind
    a long context 64 x 128 (152 us against 205). float32 runs on the scalar units and spills with large tiles."""
    if itemsize > 2:
        return PrefillConfig(block_m=max(32, next_power_of_2(group)), block_n=32, num_warps=8, num_stages=1)
    rows = max_query_len * group
    if rows <= 64:
        return PrefillConfig(block_m=max(16, next_power_of_2(rows), next_power_of_2(group)), block_n=64, num_warps=4, num_stages=3)
    if head_dim > 128:
        return PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
    if rows <= 256:
        return PrefillConfig(block_m=64, block_n=128, num_warps=4, num_stages=3)
    if rows <= 2048:
        return PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)
    return PrefillConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
    config: PrefillConfig | None = None,
) -> None:
    """Attention of entries [num_decodes, B) into their rows of `out` `[T, Hq * D]`; q `[T, Hq, D]`."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_chunks = batch.context_lens.shape[0] - batch.num_decodes
    if num_chunks == 0:
        return
    group = num_heads // num_kv_heads
    if config is None:
        config = choose_config(batch.max_query_len, group, head_dim, q.element_size())
    block_q = config.block_m // group
    grid = ((num_tokens - batch.num_decodes) // block_q + num_chunks, num_kv_heads)
    _paged_prefill_kernel[grid](
        out, q, key_cache, value_cache, batch.query_start, batch.context_lens, batch.rows, batch.block_tables, batch.block_tables.stride(0),
        batch.num_decodes, num_chunks, scale * math.log2(math.e), key_cache.stride(0), key_cache.stride(1),
        HKV=num_kv_heads, GROUP=group, D=head_dim, BLOCK_D=max(next_power_of_2(head_dim), 16), BLOCK_SIZE=block_size, BLOCK_M=config.block_m,
        BLOCK_Q=block_q, BLOCK_N=config.block_n, WINDOW=sliding_window or 0, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        FP8=key_cache.dtype == FP8, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
