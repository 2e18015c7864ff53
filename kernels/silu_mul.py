"""SwiGLU's product: out = silu(gate) * up, in float32, rounded once (Shazeer 2020). Twin: reference.silu_mul."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from appliance.kernels.launch import cdiv, dependent_launch


@triton.jit
def _silu_mul_kernel(out, gate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[T, I]` from `[T, 2 * I]`, gate first."""
    num_tokens, double = gate_up.shape
    size = double // 2
    out = gate_up.new_empty((num_tokens, size))
    if num_tokens:
        block = 1024  # 4 warps of 8 values: one 16-byte load each of gate and up
        _silu_mul_kernel[(num_tokens, cdiv(size, block))](out, gate_up, SIZE=size, BLOCK=block, num_warps=4, **dependent_launch(gate_up.device))
    return out
