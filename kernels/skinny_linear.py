"""Linear layers of a step of one to sixteen tokens: time is that of streaming the weight once, so that is all these kernels do.

y = norm(x) W^T, with what stands around it in a decoder layer folded in where asked: the RMS norm of the input (the scale of a row leaves the
sum, so the sum of squares is taken along the way), the residual added to the output, silu(gate) * up of a stacked gate-up weight. K may be split
over programs; the last one to arrive adds the parts up in order, so the result does not depend on timing. Twins: reference.rms_norm,
DenseLinear, silu_mul in turn (which round to dtype in between; these kernels do not).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806 - constants of a kernel are upper case

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.launch import NUM_COUNTERS, arrival_counters, cdiv, dependent_launch, next_power_of_2, num_multiprocessors

MAX_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How a launch is cut: output channels and input values of a tile, splits of K, warps of a program, tiles in flight (products only)."""

    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_weight(weight, channels, k, N: tl.constexpr, K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    at = weight + channels[:, None].to(tl.int64) * K + k[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(at)
    return tl.load(at, mask=(channels < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _load_until(weight, channels, k, limit, N: tl.constexpr, K: tl.constexpr, EVEN_N: tl.constexpr):
    mask = (k < limit)[None, :]
    if not EVEN_N:
        mask = mask & (channels < N)[:, None]
    return tl.load(weight + channels[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])  # one compilation for any number of tokens, so that none comes while serving
def _skinny_kernel(
    out, partial, counters, x, weight, bias, norm_weight, residual, eps, num_tokens,
    BLOCK_T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BLOCK_N outputs, split of K). BLOCK_T = 1 multiplies on the scalar units, 16 on the matrix units."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_T)
    is_token = tokens < (1 if BLOCK_T == 1 else num_tokens)
    lanes = tl.arange(0, BLOCK_K)
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    SPAN: tl.constexpr = (K + BLOCK_K * NUM_SPLITS - 1) // (BLOCK_K * NUM_SPLITS) * BLOCK_K
    low = split * SPAN
    high = tl.minimum(low + SPAN, K)
    if PDL:
        gdc_launch_dependents()
    if BLOCK_T == 1:
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_products = products
        lane_squares = tl.zeros([BLOCK_K], tl.float32)
        # Weights never change, so the first tile need not wait; each turn then asks for the tile of the next.
        next_w = _load_until(weight, channels, low + lanes, high, N, K, EVEN_N)
        next_up = next_w
        if GATE:
            next_up = _load_until(weight + N * K, channels, low + lanes, high, N, K, EVEN_N)
        if PDL:
            gdc_wait()
        for start in range(low, high, BLOCK_K):
            k = start + lanes
            w = next_w.to(tl.float32)
            w_up = next_up.to(tl.float32)
            next_w = _load_until(weight, channels, k + BLOCK_K, high, N, K, EVEN_N)
            if GATE:
                next_up = _load_until(weight + N * K, channels, k + BLOCK_K, high, N, K, EVEN_N)
            v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                lane_squares += v * v
                v = v * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
            products += w * v[None, :]
            if GATE:
                up_products += w_up * v[None, :]
        y = tl.sum(products, axis=1)[:, None]
        up = y
        if GATE:
            up = tl.sum(up_products, axis=1)[:, None]
        squares = tl.zeros([BLOCK_T], tl.float32) + tl.sum(lane_squares, axis=0)
    else:
        if PDL:
            gdc_wait()
        y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        up = y
        squares = tl.zeros([BLOCK_T], tl.float32)
        for start in range(low, high, BLOCK_K):
            k = start + lanes
            w = _load_weight(weight, channels, k, N, K, EVEN_N, EVEN_K)
            v = tl.load(x + tokens[None, :] * K + k[:, None], mask=is_token[None, :] & (k < K)[:, None], other=0.0)
            if NORM:
                wide = v.to(tl.float32)
                squares += tl.sum(wide * wide, axis=0)
                v = (wide * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)[:, None]).to(w.dtype)
            y = tl.dot(w, v, y, input_precision=PRECISION)
            if GATE:
                w_up = _load_weight(weight + N * K, channels, k, N, K, EVEN_N, EVEN_K)
                up = tl.dot(w_up, v, up, input_precision=PRECISION)

    last = True
    if NUM_SPLITS > 1:
        # Parts of one tile: [split, gate or up, BLOCK_N, BLOCK_T], then [split, BLOCK_T] sums of squares.
        PART: tl.constexpr = BLOCK_N * BLOCK_T
        parts = partial + tile.to(tl.int64) * (NUM_SPLITS * (2 * PART + BLOCK_T))
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tokens[None, :]
        tl.store(parts + split * 2 * PART + cell, y)
        if GATE:
            tl.store(parts + (split * 2 + 1) * PART + cell, up)
        if NORM:
            tl.store(parts + NUM_SPLITS * 2 * PART + split * BLOCK_T + tokens, squares)
        tl.debug_barrier()  # every thread's parts before the one thread's release
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == NUM_SPLITS - 1
        if last:
            tl.debug_barrier()
            tl.store(counters + tile, 0)
            y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            up = y
            squares = tl.zeros([BLOCK_T], tl.float32)
            for s in tl.static_range(NUM_SPLITS):
                y += tl.load(parts + s * 2 * PART + cell, cache_modifier=".cg")
                if GATE:
                    up += tl.load(parts + (s * 2 + 1) * PART + cell, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(parts + NUM_SPLITS * 2 * PART + s * BLOCK_T + tokens, cache_modifier=".cg")
    if last:
        if NORM:
            scale = tl.rsqrt(squares / K + eps)[None, :]
            y = y * scale
            up = up * scale
        if BIAS:
            y += tl.load(bias + channels, mask=channels < N, other=0.0).to(tl.float32)[:, None]
            if GATE:
                up += tl.load(bias + N + channels, mask=channels < N, other=0.0).to(tl.float32)[:, None]
        if GATE:
            y = y / (1.0 + tl.exp(-y)) * up
        at = tokens[None, :] * N + channels[:, None]
        mask = (channels < N)[:, None] & is_token[None, :]
        if ADD:
            y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def choose_config(num_tokens: int, num_outputs: int, size: int, gate: bool, multiprocessors: int) -> SkinnyConfig:
    """A cut by shape, swept on an H100. One token: two channels of 1,024 values, four 16-byte loads a thread in flight, and no split of K (at
    4096 x 4096 12.1 us, 8 x 512 12.6, cuBLAS 15.7; at 1024 x 3072 3.5, 4.7 and 7.3). More: matrix tiles, four in flight, K split until there
    are two programs a multiprocessor, none below 1,024 values."""
    if num_tokens == 1:
        return SkinnyConfig(block_n=2, block_k=min(1024, next_power_of_2(size)), num_splits=1, num_warps=4, num_stages=1)
    block_n, block_k, num_warps, num_stages = (16 if num_outputs < 8192 else 32), 256 if size >= 256 else 32, 4, 4
    tiles = cdiv(num_outputs, block_n)
    num_splits = 1
    while num_splits < 8 and tiles * num_splits < 2 * multiprocessors and size // (num_splits * 2) >= max(1024, block_k):
        num_splits *= 2
    return SkinnyConfig(block_n, block_k, num_splits, num_warps, num_stages)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gate: bool = False,
    config: SkinnyConfig | None = None,
) -> Tensor:
    """`[T, N]` from x `[T, K]`, T <= MAX_TOKENS, and weight `[N, K]` (`[2 * N, K]`, gate first, where `gate`).

    norm: weight and eps of an RMS norm of x first. residual `[T, N]`: the product, rounded to dtype, is added to it in place, and it is returned.
    """
    num_tokens, size = x.shape
    num_outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    if not 0 < num_tokens <= MAX_TOKENS:
        raise ValueError(f"skinny_linear takes 1 to {MAX_TOKENS} tokens, not {num_tokens}")
    if config is None:
        config = choose_config(num_tokens, num_outputs, size, gate, num_multiprocessors(x.device))
    out = x.new_empty((num_tokens, num_outputs)) if residual is None else residual
    tiles, splits = cdiv(num_outputs, config.block_n), config.num_splits
    if tiles > NUM_COUNTERS:
        splits = 1
    block_t = 1 if num_tokens == 1 and config.num_stages == 1 else MAX_TOKENS
    partial = out
    if splits > 1:
        partial = torch.empty(tiles * splits * (2 * config.block_n * block_t + block_t), dtype=torch.float32, device=x.device)
    _skinny_kernel[(tiles, splits)](
        out, partial, arrival_counters(x.device), x, weight, x if bias is None else bias, x if norm is None else norm[0], out,
        0.0 if norm is None else norm[1], num_tokens,
        BLOCK_T=block_t, N=num_outputs, K=size, BLOCK_N=config.block_n, BLOCK_K=config.block_k, NUM_SPLITS=splits,
        NORM=norm is not None, ADD=residual is not None, GATE=gate, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=config.num_warps, num_stages=config.num_stages,
        **dependent_launch(x.device),
    )  # fmt: skip
    return out
