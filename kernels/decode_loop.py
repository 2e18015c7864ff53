"""The loop that both cuts of decode attention share: one query tile over a run of keys, online softmax."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

import triton
import triton.language as tl

from appliance.kernels.scales import load_scales, power_of_two


@triton.jit
def attend_keys(
    query, key_cache, value_cache, table, head, low, high, context, qk_scale, stride_block, stride_head,
    HKV: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """(peaks `[BLOCK_G]`, sums of weights `[BLOCK_G]`, weighted values `[BLOCK_G, BLOCK_D]`, not yet divided) of keys [low, high) of one KV head.

    `low` is a multiple of BLOCK_N; query `[BLOCK_G, BLOCK_D]`. Scores are in base 2: qk_scale = scale * log2(e).
    """
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    if FP8:
        if query.dtype.primitive_bitwidth == 16:
            query = query.to(tl.float16)  # e4m3 widens to float16 in one instruction, to bfloat16 in four
        qk_scale = qk_scale * 0.00390625  # a scale byte b stands for 2^(b - 8)
    key_head = key_cache + head * stride_head
    value_head = value_cache + head * stride_head
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if FP8:
        key_scales = key_cache + HKV * BLOCK_SIZE * D + head * BLOCK_SIZE
        value_scales = value_cache + HKV * BLOCK_SIZE * D + head * BLOCK_SIZE
        key_bytes, value_bytes = load_scales(key_scales, value_scales, table, low + n, high, stride_block, BLOCK_SIZE)
    for start in range(low, high, BLOCK_N):
        keys = start + n
        inside = keys < high
        if FP8:
            key_factors = power_of_two(key_bytes)
            value_factors = power_of_two(value_bytes)
            key_bytes, value_bytes = load_scales(key_scales, value_scales, table, keys + BLOCK_N, high, stride_block, BLOCK_SIZE)
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        cells = blocks[:, None] * stride_block + (keys % BLOCK_SIZE)[:, None] * D + d[None, :]
        if BLOCK_D == D:
            k = tl.load(key_head + cells)
            v = tl.load(value_head + cells, mask=inside[:, None], other=0.0)
        else:
            k = tl.load(key_head + cells, mask=(d < D)[None, :], other=0.0)
            v = tl.load(value_head + cells, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision=PRECISION) * qk_scale
        if FP8:
            scores *= key_factors[None, :]
        if WINDOW > 0:
            inside = inside & (keys >= context - WINDOW)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = new_peak
        if WINDOW > 0:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        if FP8:
            p *= value_factors[None, :]
        acc = acc * shrink[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
        peak = new_peak
    if FP8:
        acc *= 0.00390625
    return peak, total, acc
