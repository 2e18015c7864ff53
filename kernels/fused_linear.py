"""Linear layers of a step of some tens to hundreds of tokens, with what stands around them in a decoder layer folded in.

y = norm(x) W^T, where the norm is split between two kernels so that the product itself stays plain: whoever writes the residual stream also writes
it times the next norm's weight and its sums of squares, tile by tile; the product takes the former, and its last act is to scale each row by
1 / sqrt(mean of squares + eps), a factor that leaves the sum. Other last acts: silu(gate) * up of a stacked gate-up weight; the residual added.
At these sizes cuBLAS is as fast (a layer's four products 27-31 us at 1,024 wide, H100), but five launches fewer a layer are not. K may be split over
programs; the last one to arrive adds the parts up in order, so the result does not depend on timing.

Twins: reference.rms_norm, DenseLinear, silu_mul in turn (which round to dtype in between; these kernels round x * weight instead of the norm).
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

from appliance.kernels.launch import arrival_counters, cdiv, dependent_launch, next_power_of_2

BLOCK_N: Final = 64  # output channels of a tile, and of one sum of squares


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """How a launch is cut: output channels, tokens and input values of a tile, splits of K, warps of a program, tiles in flight."""

    block_n: int
    block_t: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(slots=True)
class Stream:
    """The residual stream between two products: `residual` [T, H]; `scaled` [T, H], the same times the next norm's weight, rounded to dtype;
    `squares` float32 [P, T], whose sum over P is that of residual^2 over H: a row for each tile of BLOCK_N channels, zeros up to a power of two."""

    residual: Tensor
    scaled: Tensor
    squares: Tensor


@triton.jit(do_not_specialize=["num_tokens"])  # a compilation for multiples of 16 would come while serving
def _enter_kernel(scaled, squares, residual, norm_weight, num_tokens, H: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    parts = tl.arange(0, PARTS)
    mask = columns < H
    w = tl.load(norm_weight + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(residual + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled + row * H + columns, (v * w).to(scaled.dtype.element_ty), mask=mask)
    tl.store(squares + parts * num_tokens + row, tl.where(parts == 0, tl.sum(v * v, axis=0), 0.0))


@triton.jit(do_not_specialize=["num_tokens"])  # a compilation for multiples of 16 would come while serving
def _fused_linear_kernel(
    out, scaled, squares_out, partial, counters, x, weight, bias, squares, norm_weight, eps, num_tokens,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, NUM_SPLITS: tl.constexpr,
    PARTS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BLOCK_T tokens, tile of BLOCK_N outputs, split of K). Tokens vary fastest: programs of one weight tile run together."""
    token_tile = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes = tl.arange(0, BLOCK_K)
    SPAN: tl.constexpr = K // NUM_SPLITS
    w_at = weight + channels[:, None].to(tl.int64) * K + split * SPAN + lanes[None, :]
    # Rows past the last token read the last one's: nothing to mask in the loop, and nothing of them is written.
    x_at = x + tl.minimum(tokens, num_tokens - 1)[:, None].to(tl.int64) * K + split * SPAN + lanes[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = y
    for _ in range(0, SPAN, BLOCK_K):
        v = tl.load(x_at)
        y = tl.dot(tl.load(w_at), tl.trans(v), y, input_precision=PRECISION)
        if GATE:
            up = tl.dot(tl.load(w_at + N * K), tl.trans(v), up, input_precision=PRECISION)
        w_at += BLOCK_K
        x_at += BLOCK_K

    last = True
    if NUM_SPLITS > 1:
        PART: tl.constexpr = BLOCK_N * BLOCK_T
        place = tile * tl.num_programs(0) + token_tile
        parts = partial + place.to(tl.int64) * (NUM_SPLITS * (2 if GATE else 1) * PART)
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        tl.store(parts + split * PART + cell, y)
        if GATE:
            tl.store(parts + (NUM_SPLITS + split) * PART + cell, up)
        tl.debug_barrier()  # every thread's parts before the one thread's release
        last = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == NUM_SPLITS - 1
        if last:
            tl.debug_barrier()
            tl.store(counters + place, 0)
            y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            up = y
            for s in tl.static_range(NUM_SPLITS):
                y += tl.load(parts + s * PART + cell, cache_modifier=".cg")
                if GATE:
                    up += tl.load(parts + (NUM_SPLITS + s) * PART + cell, cache_modifier=".cg")
    if last:
        inside = tokens < num_tokens
        if NORM:
            part = tl.arange(0, PARTS)
            total = tl.sum(tl.load(squares + part[:, None] * num_tokens + tokens[None, :], mask=inside[None, :], other=1.0), axis=0)
            scale = tl.rsqrt(total / K + eps)[None, :]
            y = y * scale
            up = up * scale
        if BIAS:
            y += tl.load(bias + channels).to(tl.float32)[:, None]
            if GATE:
                up += tl.load(bias + N + channels).to(tl.float32)[:, None]
        if GATE:
            y = y / (1.0 + tl.exp(-y)) * up
        at = tokens[None, :].to(tl.int64) * N + channels[:, None]
        if ADD:
            y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(out + at, mask=inside[None, :], other=0.0).to(tl.float32)
            rounded = y.to(out.dtype.element_ty)
            tl.store(out + at, rounded, mask=inside[None, :])
            y = rounded.to(tl.float32)
            w_norm = tl.load(norm_weight + channels).to(tl.float32)[:, None]
            tl.store(scaled + at, (y * w_norm).to(scaled.dtype.element_ty), mask=inside[None, :])
            tl.store(squares_out + tile * num_tokens + tokens, tl.sum(y * y, axis=0), mask=inside)
        else:
            tl.store(out + at, y.to(out.dtype.element_ty), mask=inside[None, :])


def enter(residual: Tensor, norm_weight: Tensor) -> Stream:
    """The stream at the first norm."""
    num_tokens, size = residual.shape
    num_parts = next_power_of_2(cdiv(size, BLOCK_N))
    stream = Stream(residual, torch.empty_like(residual), torch.empty((num_parts, num_tokens), dtype=torch.float32, device=residual.device))
    block = next_power_of_2(size)
    _enter_kernel[(num_tokens,)](
        stream.scaled, stream.squares, residual, norm_weight, num_tokens, H=size, BLOCK=block, PARTS=num_parts,
        num_warps=min(max(block // 256, 1), 16), **dependent_launch(residual.device),
    )  # fmt: skip
    return stream


def divides(num_outputs: int, size: int) -> bool:
    """Whether `choose_config` has a cut for a weight [num_outputs, size]: the loop masks nothing."""
    return num_outputs % BLOCK_N == 0 and size % 64 == 0


def choose_config(num_tokens: int, num_outputs: int, size: int, multiprocessors: int, *, may_split: bool = True) -> FusedConfig:
    """A cut by shape, swept on an H100 at 1,024 wide: tiles of 32 tokens and 128 values, five in flight (past 64 tokens 64 and four); K in up to four
    splits until half the multiprocessors have a program (1,024 x 2,048, 32 tokens: 5.8 us, unsplit 6.5)."""
    block_t = 16 if num_tokens <= 16 else 32 if num_tokens <= 64 else 64
    block_k = 128 if size % 128 == 0 else 64
    programs, num_splits = cdiv(num_tokens, block_t) * (num_outputs // BLOCK_N), 1
    while may_split and num_splits < 4 and programs * num_splits * 2 <= multiprocessors and size % (block_k * num_splits * 2) == 0:
        num_splits *= 2
    return FusedConfig(BLOCK_N, block_t, block_k, num_splits, num_warps=4, num_stages=5 if block_t < 64 else 4)


def most_tokens(num_outputs: int, multiprocessors: int) -> int:
    """Up to how many tokens a step is faster here than through cuBLAS, by the widest weight's outputs (of its gate alone).

    A layer's products with norms and SwiGLU, H100, against cuBLAS's: 1,024 wide 24.4 us against 30.1 at 32 tokens, 24.9 against 30.9 at 64, 31.8
    against 33.4 at 128; 3,072 wide 84.6 against 92.5 at 32 and level at 64; 4,096 wide 164.5 against 175.3 at 32, slower at 64.
    """
    tiles = cdiv(num_outputs, BLOCK_N)
    return 128 if tiles * 5 <= multiprocessors * 3 else 64 if tiles <= multiprocessors else 32


def normed_product(stream: Stream, weight: Tensor, bias: Tensor | None, eps: float, config: FusedConfig, *, gate: bool = False) -> Tensor:
    """`[T, N]` from the norm of the stream; weight `[N, H]`, or `[2 * N, H]`, gate first, and then silu(gate) * up."""
    num_outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    out = stream.residual.new_empty((stream.residual.shape[0], num_outputs))
    _launch(out, stream.scaled, weight, bias, config, stream.squares, None, None, eps, gate=gate)
    return out


def added_product(x: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream, norm_weight: Tensor, config: FusedConfig) -> None:
    """stream.residual += x W^T in place, rounded once to dtype before the sum; the rest of the stream follows for the norm that comes next."""
    _launch(stream.residual, x, weight, bias, config, None, stream, norm_weight, 0.0, gate=False)


def _launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: FusedConfig,
    squares: Tensor | None,
    stream: Stream | None,
    norm_weight: Tensor | None,
    eps: float,
    *,
    gate: bool,
) -> None:
    num_tokens, size = x.shape
    num_outputs = out.shape[1]
    if num_outputs % config.block_n or size % (config.block_k * config.num_splits):
        raise ValueError(f"{num_outputs} x {size} is no multiple of {config}")
    grid = cdiv(num_tokens, config.block_t), num_outputs // config.block_n, config.num_splits
    partial = out
    if config.num_splits > 1:
        cells = grid[0] * grid[1] * grid[2] * config.block_n * config.block_t * (2 if gate else 1)
        partial = torch.empty(cells, dtype=torch.float32, device=x.device)
    parts = squares if squares is not None else stream.squares if stream is not None else out
    if stream is not None and config.block_n != BLOCK_N:
        raise ValueError(f"sums of squares are kept by tiles of {BLOCK_N} channels, not {config.block_n}")
    _fused_linear_kernel[grid](
        out, out if stream is None else stream.scaled, parts, partial, arrival_counters(x.device), x, weight, x if bias is None else bias, parts,
        x if norm_weight is None else norm_weight, eps, num_tokens,
        N=num_outputs, K=size, BLOCK_N=config.block_n, BLOCK_T=config.block_t, BLOCK_K=config.block_k, NUM_SPLITS=config.num_splits,
        PARTS=parts.shape[0] if squares is not None else 1, NORM=squares is not None, ADD=stream is not None, GATE=gate, BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=config.num_warps, num_stages=config.num_stages,
        **dependent_launch(x.device),
    )  # fmt: skip
