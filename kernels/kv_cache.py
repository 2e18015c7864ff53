"""The paged KV cache's memory: plain blocks in the model's dtype, or e4m3 values with a power-of-two scale for each token and head.

A cache tensor (keys or values of one layer) is `[num_blocks, Hkv, block_size, D]`. In fp8 a block's bytes are

    [Hkv][block_size][D] e4m3 | [Hkv][block_size] uint8, b | padding to 128 bytes

and value = e4m3 * 2**(b - 8). The tensor is a strided view of the first part, so kernels find the scales behind it from its pointer and strides.

Why a scale for each token and head, found as it is stored: nothing needs calibrating, no later token changes what is already there (as the maximum
of a whole block would), and outliers of one head cost the others nothing. With one fixed scale of 1, keys beyond 448 saturate (Qwen2.5's biased
keys) and small values fall among e4m3's subnormals (below 2**-6). Why powers of two: e4m3 is a floating-point format, so a finer scale gains
nothing; the byte costs 1/D of the cache; and a value's scale can be folded into its key's softmax weight in float16 without leaving its range.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
SCALE_BIAS: Final = 8  # scale = 2 ** (b - SCALE_BIAS)
MAX_SCALE: Final = 15  # of b: magnitudes up to 448 * 2**7 = 57,344; beyond it values saturate
_ALIGNMENT: Final = 128  # bytes; of a block in fp8


def block_bytes(num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block of keys (or of values) of one layer."""
    values = num_kv_heads * block_size * head_dim * dtype.itemsize
    if dtype != FP8:
        return values
    return -(-(values + num_kv_heads * block_size) // _ALIGNMENT) * _ALIGNMENT


def allocate_fp8(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """A zeroed cache of `shape` `[num_blocks, Hkv, block_size, D]` e4m3, with room for its scales behind each block."""
    num_blocks, num_kv_heads, block_size, head_dim = shape
    stride = block_bytes(num_kv_heads, block_size, head_dim, FP8)
    memory = torch.zeros(num_blocks * stride, dtype=torch.uint8, device=device)
    return memory.view(FP8).as_strided(shape, (stride, block_size * head_dim, head_dim, 1))


def scales_of(cache: Tensor) -> Tensor:
    """The scale bytes b of an fp8 cache, `[num_blocks, Hkv, block_size]` uint8, sharing its memory."""
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    start = cache.storage_offset() + num_kv_heads * block_size * head_dim
    return cache.view(torch.uint8).as_strided((num_blocks, num_kv_heads, block_size), (cache.stride(0), block_size, 1), start)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `[..., D]` as e4m3 `[..., D]` and scale bytes `[...]` uint8: the least power of two that brings the largest magnitude within 448.

    From the bits of the maximum: 448 is 1.75 * 2**8, so one adds what carries a mantissa above .75 into the exponent.
    """
    bits = values.abs().amax(dim=-1).to(torch.float32).view(torch.int32)
    scales = (((bits + 0x1F_FFFF) >> 23) - 127).clamp(0, MAX_SCALE)
    factors = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), SCALE_BIAS - scales)
    scaled = (values.to(torch.float32) * factors.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(FP8), scales.to(torch.uint8)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """`quantize` undone: float32 `[..., D]`."""
    return values.to(torch.float32) * torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.to(torch.int32) - SCALE_BIAS).unsqueeze(-1)
