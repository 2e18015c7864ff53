"""Linear layers on a CPU: packed integer weights for any number of tokens, and a dense copy for large steps where that was measured to be faster."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as functional
from torch import Tensor

from appliance.kernels.cpu.library import DTYPES, LinearShape, Tile
from appliance.kernels.gguf_blocks import dequantize, dequantize_rows
from appliance.kernels.ops import GgufTensor, WeightSource

log = logging.getLogger(__name__)

GROUP: Final = 32  # input features that share a scale
_TILE_ROWS: Final = 16
_FROM_FLOATS: Final = {"int8": 4, "int4": 5}  # Source of packing.cpp
# What a GGUF kind is packed from (Source of packing.cpp). These are taken as they are; in Q4_K the products of two scales round to float16
# (relative error 2^-11 of a scale). Every other kind goes through float32 to int8 in groups of 32: an error of at most 1/254 of the group's
# largest weight, 0.5 % of a normally distributed weight in the norm.
_FROM_BLOCKS: Final = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2, "Q4_K": 3, "Q5_0": 6}
_CHUNK_ROWS: Final = 2048  # rows widened at a time


CopyLimit = int | Callable[[], int]


class CopyBudget:
    """Bytes that dense copies of packed weights may take, over all layers; asked for when the first copy is. The first refusal is logged."""

    def __init__(self, limit_bytes: CopyLimit) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0
        self._warned = False

    def take(self, num_bytes: int) -> bool:
        """Whether there was room; if so it is taken."""
        if not isinstance(self._limit_bytes, int):
            self._limit_bytes = self._limit_bytes()
        if self.used_bytes + num_bytes > self._limit_bytes:
            if not self._warned:
                log.warning(
                    "dense weight copies stop at %d of %d bytes; the other layers use integer weights for large steps too",
                    self.used_bytes,
                    self._limit_bytes,
                )
                self._warned = True
            return False
        self.used_bytes += num_bytes
        return True


@dataclass(frozen=True, slots=True)
class DenseCopy:
    """A dense twin of a packed weight for steps of `min_tokens` tokens or more."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    min_tokens: int


class PackedLinear:
    """x [T, in] -> [T, out] of x's dtype (float32 or bfloat16), activations quantised to int8 in groups of 32, in two terms for
    steps of a few tokens. See linear.h.

    A token's result is the same whatever else is in the step, below `dense.min_tokens`.
    """

    __slots__ = ("_keep", "_library", "dense", "in_features", "num_bytes", "out_features", "part_rows", "shape")

    computes_float32 = True  # whatever comes in and goes out

    def __init__(
        self, library: ctypes.CDLL, packed: Sequence[tuple[Tensor, int, int]], in_features: int, bias: Tensor | None, dense: DenseCopy | None
    ) -> None:
        """`packed`: for each part its tiles, their format and the part's number of rows."""
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        tiles: list[Tile] = []
        row = 0
        for data, kind, num_rows in packed:
            size = data.numel() // -(-num_rows // _TILE_ROWS)
            for first in range(0, num_rows, _TILE_ROWS):
                at = data.data_ptr() + first // _TILE_ROWS * size
                tiles.append(Tile(at, kind, row + first, min(_TILE_ROWS, num_rows - first), 0))
            row += num_rows
        array = (Tile * len(tiles))(*tiles)
        self._keep = (array, [data for data, _, _ in packed], bias)
        self._library = library
        self.shape = LinearShape(array, None if bias is None else bias.data_ptr(), len(tiles), in_features, row, 0)
        self.in_features = in_features
        self.out_features = row
        self.part_rows = tuple(num_rows for _, _, num_rows in packed)
        self.dense = dense
        held = [data for data, _, _ in packed] + [] if dense is None else [data for data, _, _ in packed] + [dense.weight]
        self.num_bytes = sum(tensor.nbytes for tensor in held) + (0 if bias is None else bias.nbytes) + ctypes.sizeof(array)

    def __call__(self, x: Tensor) -> Tensor:
        dense = self.dense
        if dense is not None and x.shape[0] >= dense.min_tokens:
            return functional.linear(x.to(dense.weight.dtype), dense.weight, dense.bias).to(x.dtype)
        return self.write(x, torch.empty(x.shape[0], self.out_features, dtype=x.dtype))

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """The integer layer's result in `out` `[T, out]` of x's dtype, which is returned."""
        if x.shape[0]:
            x = x.contiguous()
            self._library.cpu_linear(ctypes.addressof(self.shape), x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], x.shape[0], torch.get_num_threads())
        return out


def can_pack(parts: Sequence[WeightSource]) -> bool:
    """Whether the integer kernels take these weights: rows of whole groups of 32 (of 256 for K quants)."""
    return all(part.shape[1] % GROUP == 0 for part in parts)


def pack(library: ctypes.CDLL, part: WeightSource, quantization: str) -> tuple[Tensor, int, int]:
    """Tiles of one part, their format, and its number of rows. `quantization`: int8 or int4 for dense parts; GGUF parts keep their own."""
    num_rows, in_features = int(part.shape[0]), int(part.shape[1])
    threads = torch.get_num_threads()
    direct = _FROM_BLOCKS.get(part.kind) if isinstance(part, GgufTensor) else None
    source = direct if direct is not None else _FROM_FLOATS["int8" if isinstance(part, GgufTensor) else quantization]
    tiles = torch.empty(library.cpu_packed_bytes(source, num_rows, in_features), dtype=torch.uint8)
    kind = int(library.cpu_packed_format(source))
    if direct is not None and isinstance(part, GgufTensor):
        data = part.data.contiguous()
        library.cpu_pack(source, data.data_ptr(), data.shape[1], num_rows, in_features, tiles.data_ptr(), threads)
        return tiles, kind, num_rows
    tile_bytes = tiles.numel() // -(-num_rows // _TILE_ROWS)
    for first in range(0, num_rows, _CHUNK_ROWS):
        rows = slice(first, min(first + _CHUNK_ROWS, num_rows))
        wide = dequantize_rows(part.kind, part.data[rows]) if isinstance(part, GgufTensor) else part[rows].to(torch.float32)
        wide = wide.contiguous()
        target = tiles.data_ptr() + first // _TILE_ROWS * tile_bytes
        library.cpu_pack(source, wide.data_ptr(), wide.shape[1] * 4, wide.shape[0], in_features, target, threads)
    return tiles, kind, num_rows


def dense_weight(parts: Sequence[WeightSource], dtype: torch.dtype) -> Tensor:
    """The parts as one dense `[out, in]` weight."""
    return torch.cat([dequantize(part, dtype) if isinstance(part, GgufTensor) else part.to(dtype) for part in parts])
