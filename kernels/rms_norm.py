"""RMS norm, alone and with the residual added first.

y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in float32, rounded once. Twins: reference.rms_norm, reference.add_rms_norm.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.launch import dependent_launch, next_power_of_2


@triton.jit
def _rms_norm_kernel(out, x, residual, weight, eps, N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr):
    """One program a row; the row stays in registers between the sum of squares and the product."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + row * N + columns, mask=mask, other=0.0)
    if ADD:
        before = tl.load(residual + row * N + columns, mask=mask, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + row * N + columns, values, mask=mask)
    v = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / N + eps)
    tl.store(out + row * N + columns, (v * scale * w).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The norm of x `[T, N]`, or with `residual` that of residual += x (updated in place, rounded to its dtype)."""
    num_tokens, size = x.shape
    out = torch.empty_like(x)
    if num_tokens:
        block = next_power_of_2(size)
        _rms_norm_kernel[(num_tokens,)](
            out, x, x if residual is None else residual, weight, eps, N=size, BLOCK=block, ADD=residual is not None,
            num_warps=_num_warps(block), **dependent_launch(x.device),
        )  # fmt: skip
    return out


def _num_warps(block: int) -> int:
    """Eight values a thread are one 16-byte bf16 load; longer rows take two loads or more rather than past 16 warps."""
    return min(max(block // 256, 1), 16)
