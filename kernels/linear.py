"""Linear layers on a CUDA device: dense through cuBLAS, fp8 through torch._scaled_mm, a few rows through a weight-streaming kernel."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803 - constants of a kernel are upper case

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from appliance.kernels import ops
from appliance.kernels.gguf_blocks import dequantize
from appliance.kernels.launch import cdiv, next_power_of_2
from appliance.kernels.skinny_linear import skinny_linear

SKINNY_TOKENS: Final = 1  # up to this many tokens the weight-streaming kernel takes the place of cuBLAS ...
SKINNY_HEAD_TOKENS: Final = 16  # ... and for an output head (8 % faster at 8 tokens, 151,936 x 1,024 and 128,256 x 4,096, H100) ...
_SCALE_ROWS: Final = 256
_HEAD_OUTPUTS: Final = 32_768  # ... which is a weight of so many channels


@triton.jit
def _quantize_rows_kernel(out, scales, x, N: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: scale = max |x| / 448, out = x / scale in e4m3. Twin: reference.quantize_rows."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0) / 448.0, 1e-12)
    tl.store(scales + row, scale)
    scaled = tl.minimum(tl.maximum(values / scale, -448.0), 448.0)
    tl.store(out + row * N + columns, scaled.to(out.dtype.element_ty), mask=columns < N)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[T, N]` as float8_e4m3fn and its scales `[T, 1]` float32, one a row: x is about out * scale."""
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    # The row-wise kernel of some torch versions reads scales for whole tiles of rows (pytorch issue 133334): let what it reads be ours.
    scales = torch.empty((cdiv(num_rows, _SCALE_ROWS) * _SCALE_ROWS, 1), dtype=torch.float32, device=x.device)[:num_rows]
    if num_rows:
        block = next_power_of_2(size)
        _quantize_rows_kernel[(num_rows,)](out, scales, x, N=size, BLOCK=block, num_warps=min(max(block // 512, 1), 16))
    return out, scales


class DenseLinear:
    """x @ weight.T + bias. `weight` [out, in] may be shared with an embedding table. Through cuBLAS, but for up to `skinny_tokens` rows, which
    the weight-streaming kernel takes (0 switches it off; it is off in float32, whose results then vary less with the batch)."""

    __slots__ = ("bias", "skinny_tokens", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        most = SKINNY_HEAD_TOKENS if weight.shape[0] >= _HEAD_OUTPUTS else SKINNY_TOKENS
        self.skinny_tokens = most if weight.is_cuda and weight.element_size() == 2 else 0

    def __call__(self, x: Tensor) -> Tensor:
        if 0 < x.shape[0] <= self.skinny_tokens:
            return skinny_linear(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """The same into `out`, through cuBLAS."""
        return torch.mm(x, self.weight.t(), out=out) if self.bias is None else torch.addmm(self.bias, x, self.weight.t(), out=out)


class Fp8Linear:
    """Weights in e4m3 with one scale an output channel, activations quantised a row at a time as they come; products on the fp8 units.

    As torch._scaled_mm asks for row-wise scales: first operand row-major, second column-major, both contracted and output sizes multiples of 16,
    scales float32 [M, 1] and [1, N], contiguous, output bfloat16.
    """

    __slots__ = ("bias", "scales", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise `weight` [out, in]. Raises ValueError where a size is no multiple of 16."""
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(f"fp8 weights need both sizes to be multiples of 16, not {tuple(weight.shape)}; use quantization none for this model")
        quantized, scales = quantize_rows(weight.contiguous())
        self.weight = quantized.t()  # [in, out], column-major as _scaled_mm wants it
        self.scales = scales.t()  # [1, out]
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not x.shape[0]:  # row-wise scaling takes no empty operand on CUDA
            return x.new_empty((0, self.weight.shape[1]))
        quantized, scales = quantize_rows(x.contiguous())
        out = torch._scaled_mm(quantized, self.weight, scale_a=scales, scale_b=self.scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        out = out.to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)


def _dense(part: ops.WeightSource, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Dense on the device; blocks go there as they are and widen there."""
    if isinstance(part, ops.GgufTensor):
        return dequantize(ops.GgufTensor(part.kind, part.shape, part.data.to(device)), dtype)
    return part.to(device, dtype)


def make_linear(
    parts: Sequence[ops.WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
) -> tuple[ops.Linear, int]:
    """See `Ops.make_linear`. Quantised files widen to dtype ("auto" too: there is no kernel for their blocks here); "fp8" quantises."""
    if quantization not in ("auto", "none", "fp8"):
        raise ValueError(f"the GPU kernels know no {quantization} weights; use quantization auto, none or fp8")
    if quantization == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("fp8 weights need a GPU of compute capability 8.9 or later; use quantization none")
    dense = [_dense(part, device, dtype) for part in parts]
    weight = (dense[0] if len(dense) == 1 else torch.cat(dense)).contiguous()
    bias = None if bias is None else bias.to(device, dtype)
    bias_bytes = 0 if bias is None else bias.nbytes
    if quantization == "fp8":
        fp8 = Fp8Linear(weight, bias)
        return fp8, fp8.weight.nbytes + fp8.scales.nbytes + bias_bytes
    return DenseLinear(weight, bias), weight.nbytes + bias_bytes
