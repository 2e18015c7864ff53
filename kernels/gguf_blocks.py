"""GGUF's quantised blocks in vectorised torch: sizes, and the values that rows of them stand for.

The layouts are those of ggml's `block_q4_0` and its kin (ggml-common.h); rounding follows the `gguf` package's own dequantisation operation
by operation, so that float32 results are bit-equal to it and to whatever loads a file through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from appliance.kernels.ops import GgufTensor

# kind -> (values in a block, bytes of a block)
BLOCK_SIZES: Final[dict[str, tuple[int, int]]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
_CHUNK_BYTES: Final = 4 << 20  # rows are widened in pieces of about this many bytes, so that intermediates stay in cache


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of one row. Raises ValueError for an unknown kind or a row that is no whole number of blocks."""
    if kind not in BLOCK_SIZES:
        raise ValueError(f"GGUF block kind {kind} is not supported; supported are {', '.join(BLOCK_SIZES)}")
    values, size = BLOCK_SIZES[kind]
    if in_features % values:
        raise ValueError(f"a row of {in_features} values is no whole number of {kind} blocks of {values}")
    return in_features // values * size


def dequantize(weight: GgufTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense `[out_features, in_features]` weight, on the device of its data; computed in float32, rounded once to `dtype`."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    step = max(1, _CHUNK_BYTES // weight.data.shape[1])
    for start in range(0, weight.shape[0], step):
        result[start : start + step] = dequantize_rows(weight.kind, weight.data[start : start + step])
    return result


def dequantize_rows(kind: str, rows: Tensor) -> Tensor:
    """float32 values `[num_rows, in_features]` of rows `[num_rows, bytes_per_row]` uint8. Raises ValueError for an unknown kind."""
    if kind not in BLOCK_SIZES:
        raise ValueError(f"GGUF block kind {kind} is not supported; supported are {', '.join(BLOCK_SIZES)}")
    blocks = rows.reshape(-1, BLOCK_SIZES[kind][1])
    return _DEQUANTIZERS[kind](blocks).reshape(rows.shape[0], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as `[num_blocks, 1]` float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of 16 bytes, then their high halves: `[num_blocks, 32]` uint8."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _bits(packed: Tensor) -> Tensor:
    """The 32 bits of 4 little-endian bytes, lowest first: `[num_blocks, 32]` uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).reshape(packed.shape[0], 32)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).to(torch.float32) - 8.0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).to(torch.float32) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (values.to(torch.float32) - 16.0)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * values.to(torch.float32) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32) * _half(blocks, 0)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minima of a K block's 12 bytes, each `[num_blocks, 8]` float32.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3 (low six bits); bytes 8-11 the low four bits of scales and minima 4-7, whose upper two
    bits are the upper two of bytes 0-7.
    """
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=1)
    mins = torch.cat((middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)), dim=1)
    return scales.to(torch.float32), mins.to(torch.float32)


def _k_nibbles(packed: Tensor) -> Tensor:
    """Four groups of 32 bytes, each the low then the high halves of 32 values: `[num_blocks, 8, 32]` uint8."""
    groups = packed.reshape(-1, 4, 1, 32)
    return torch.cat((groups & 0x0F, groups >> 4), dim=2).reshape(-1, 8, 32)


def _k_affine(blocks: Tensor, values: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales = (_half(blocks, 0) * scales).unsqueeze(2)
    mins = (_half(blocks, 2) * mins).unsqueeze(2)
    return scales * values.to(torch.float32) - mins


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_affine(blocks, _k_nibbles(blocks[:, 16:144]))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).reshape(1, 8, 1)
    high = (blocks[:, 16:48].reshape(-1, 1, 32) >> shifts) & 1
    return _k_affine(blocks, _k_nibbles(blocks[:, 48:176]) | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, 0:128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 0x0F, low >> 4), dim=2).reshape(-1, 8, 32)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device).reshape(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 8, 32)
    values = ((low | (high << 4)).to(torch.float32) - 32.0).reshape(-1, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).to(torch.float32)
    return scales.unsqueeze(2) * values


_DEQUANTIZERS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
