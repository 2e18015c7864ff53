"""What happens to q, k and v between the QKV projection and attention, in one launch.

Per-head RMS norm of q and k (Qwen3), rotary embedding (Su et al. 2021; rotate-half convention: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
over the first W values of a head), K and V written to the paged cache (in fp8 with their scales: kv_cache), q returned. In float32, rounded once.
Twin: reference.rope_store_kv.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, SIM108 - constants of a kernel are upper case; a branch on one, chosen in compilation, stands alone

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.kv_cache import FP8
from appliance.kernels.launch import cdiv, dependent_launch, next_power_of_2
from appliance.kernels.ops import AttentionBatch


@triton.jit(do_not_specialize=["positions", "slot_mapping"])
def _rope_kv_kernel(
    q_out, key_cache, value_cache, qkv, cos_sin, positions, slot_mapping, q_norm, k_norm, eps, stride_block, stride_head,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of one token, counted through q, k and v. x1 and x2 are the rotary halves, x3 what lies beyond them."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK_HALF)
    is_q = heads < HQ
    is_k = (heads >= HQ) & (heads < HQ + HKV)
    is_v = (heads >= HQ + HKV) & (heads < HQ + 2 * HKV)
    half_mask = (heads < HQ + 2 * HKV)[:, None] & (half < HALF)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = qkv + token * ((HQ + 2 * HKV) * D) + heads[:, None] * D
    x1 = tl.load(source + half[None, :], mask=half_mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF + half[None, :], mask=half_mask, other=0.0).to(tl.float32)
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)
    rest_mask = (heads < HQ + 2 * HKV)[:, None] & (rest < D)[None, :]
    if 2 * HALF < D:
        x3 = tl.load(source + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)

    position = tl.load(positions + token)
    cos = tl.load(cos_sin + position.to(tl.int64) * (2 * HALF) + half, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position.to(tl.int64) * (2 * HALF) + HALF + half, mask=half < HALF, other=0.0)[None, :]
    y1 = x1
    y2 = x2
    if Q_NORM or K_NORM:
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if 2 * HALF < D:
            squares += tl.sum(x3 * x3, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        if Q_NORM:
            y1 = tl.where(is_q[:, None], x1 * scale * tl.load(q_norm + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :], y1)
            y2 = tl.where(is_q[:, None], x2 * scale * tl.load(q_norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :], y2)
            if 2 * HALF < D:
                x3 = tl.where(is_q[:, None], x3 * scale * tl.load(q_norm + rest, mask=rest < D, other=0.0).to(tl.float32)[None, :], x3)
        if K_NORM:
            y1 = tl.where(is_k[:, None], x1 * scale * tl.load(k_norm + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :], y1)
            y2 = tl.where(is_k[:, None], x2 * scale * tl.load(k_norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :], y2)
            if 2 * HALF < D:
                x3 = tl.where(is_k[:, None], x3 * scale * tl.load(k_norm + rest, mask=rest < D, other=0.0).to(tl.float32)[None, :], x3)
    w1 = tl.where(is_v[:, None], x1, y1 * cos - y2 * sin)
    w2 = tl.where(is_v[:, None], x2, y2 * cos + y1 * sin)
    z1 = w1.to(q_out.dtype.element_ty)
    z2 = w2.to(q_out.dtype.element_ty)

    q_target = q_out + token * (HQ * D) + heads[:, None] * D
    q_mask = is_q[:, None] & half_mask
    tl.store(q_target + half[None, :], z1, mask=q_mask)
    tl.store(q_target + HALF + half[None, :], z2, mask=q_mask)
    slot_of_token = tl.load(slot_mapping + token).to(tl.int64)
    stored = ((slot_of_token + heads * 0) >= 0)[:, None]  # as a column: the interpreter takes no scalar among masks
    slot = tl.maximum(slot_of_token, 0)
    place = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * D
    if FP8:  # see kv_cache: 448 = 1.75 * 2^8, so this constant carries larger mantissas into the exponent
        peak = tl.maximum(tl.max(tl.abs(w1), axis=1), tl.max(tl.abs(w2), axis=1))
        if 2 * HALF < D:
            peak = tl.maximum(peak, tl.max(tl.abs(x3), axis=1))
        exponent = ((peak.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 127
        exponent = tl.minimum(tl.maximum(exponent, 0), 15)
        factor = ((135 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]  # 2^(8 - exponent)
        scale_byte = exponent.to(tl.uint8).to(key_cache.dtype.element_ty, bitcast=True)
        scale_place = (slot // BLOCK_SIZE) * stride_block + HKV * BLOCK_SIZE * D + slot % BLOCK_SIZE
        has_slot = (slot_of_token + heads * 0) >= 0
        tl.store(key_cache + scale_place + (heads - HQ) * BLOCK_SIZE, scale_byte, mask=is_k & has_slot)
        tl.store(value_cache + scale_place + (heads - HQ - HKV) * BLOCK_SIZE, scale_byte, mask=is_v & has_slot)
        c1 = tl.minimum(tl.maximum(w1 * factor, -448.0), 448.0).to(key_cache.dtype.element_ty)
        c2 = tl.minimum(tl.maximum(w2 * factor, -448.0), 448.0).to(key_cache.dtype.element_ty)
    else:
        factor = 1.0
        c1 = z1.to(key_cache.dtype.element_ty)
        c2 = z2.to(key_cache.dtype.element_ty)
    k_target = key_cache + place + (heads[:, None] - HQ) * stride_head
    k_mask = is_k[:, None] & half_mask & stored
    tl.store(k_target + half[None, :], c1, mask=k_mask)
    tl.store(k_target + HALF + half[None, :], c2, mask=k_mask)
    v_target = value_cache + place + (heads[:, None] - HQ - HKV) * stride_head
    v_mask = is_v[:, None] & half_mask & stored
    tl.store(v_target + half[None, :], c1, mask=v_mask)
    tl.store(v_target + HALF + half[None, :], c2, mask=v_mask)
    if 2 * HALF < D:
        z3 = x3.to(q_out.dtype.element_ty)
        if FP8:
            c3 = tl.minimum(tl.maximum(x3 * factor, -448.0), 448.0).to(key_cache.dtype.element_ty)
        else:
            c3 = z3.to(key_cache.dtype.element_ty)
        tl.store(q_target + rest[None, :], z3, mask=is_q[:, None] & rest_mask)
        tl.store(k_target + rest[None, :], c3, mask=is_k[:, None] & rest_mask & stored)
        tl.store(v_target + rest[None, :], c3, mask=is_v[:, None] & rest_mask & stored)


def rope_store_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See `Ops.rope_store_kv`."""
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    half = cos_sin.shape[1] // 2
    q_out = qkv.new_empty((num_tokens, num_heads, head_dim))
    if num_tokens:
        heads = 4 if num_tokens <= 64 else 8  # few tokens: more programs; many: more bytes in flight in each
        _rope_kv_kernel[(num_tokens, cdiv(num_heads + 2 * num_kv_heads, heads))](
            q_out, key_cache, value_cache, qkv, cos_sin, batch.positions, batch.slot_mapping,
            qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps, key_cache.stride(0), key_cache.stride(1),
            HQ=num_heads, HKV=num_kv_heads, D=head_dim, HALF=half, BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(head_dim - 2 * half, 1)), BLOCK_SIZE=block_size, HEADS=heads,
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, FP8=key_cache.dtype == FP8,
            num_warps=2 if heads == 4 else 4, **dependent_launch(qkv.device),
        )  # fmt: skip
    return q_out
