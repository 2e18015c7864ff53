"""GGUF files, memory-mapped. Only the header is parsed, and the tokenizer's long string arrays in it are stepped over: 0.05 s for a vocabulary
of 49,152 where the gguf package's reader takes 2.6 s.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from appliance.errors import ModelError
from appliance.kernels.gguf_blocks import BLOCK_SIZES, row_bytes
from appliance.kernels.ops import GgufTensor, WeightSource
from appliance.model.config import parse_gguf_config
from appliance.model.mapped_file import map_bytes
from appliance.model.weights import check_shape

# ggml_type -> name (ggml.h)
_KINDS: Final = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}
_DENSE: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_LIST: Final = 1024  # lists of numbers up to this length are read: per-layer settings, not token types and scores

_TOP_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "rope_freqs.weight": "rope_freqs.weight",
}
_LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: kind ("F32", "Q4_1", ...; "type 16" where unknown), shape with the fastest dimension last, offset in bytes from data_start."""

    kind: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata without its arrays, the tensors, and where their data starts."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_start: int


class GgufWeights:
    """The weights of one GGUF file, quantised ones in their own form."""

    def __init__(self, file: Path) -> None:
        self._file = file
        header = read_gguf_header(file)
        self._tensors = header.tensors
        if "token_embd.weight" not in header.tensors:
            raise ModelError(f"{file}: there is no tensor token_embd.weight")
        vocab_size = header.tensors["token_embd.weight"].shape[0]
        self.config = parse_gguf_config(header.metadata, header.tensors.keys(), vocab_size, str(file))
        whole = map_bytes(file)
        self._data = whole[header.data_start :]
        self.num_bytes = self._data.nbytes

    def has(self, name: str) -> bool:
        return gguf_name(name) in self._tensors

    def get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        info = self._tensors.get(gguf_name(name))
        if info is None:
            raise ModelError(f"{self._file}: there is no tensor {gguf_name(name)}")
        check_shape(gguf_name(name), info.shape, shape, self._file)
        if info.kind in _DENSE:
            dtype = _DENSE[info.kind]
            dense = self._bytes(name, info, torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)
            return self._in_order(name, dense)
        if info.kind not in BLOCK_SIZES or len(shape) != 2:
            raise ModelError(f"{self._file}: {gguf_name(name)} is of kind {info.kind}; supported are {', '.join((*_DENSE, *BLOCK_SIZES))}")
        try:
            width = row_bytes(info.kind, shape[1])
        except ValueError as error:
            raise ModelError(f"{self._file}: {gguf_name(name)}: {error}") from error
        rows = self._bytes(name, info, shape[0] * width).view(shape[0], width)
        return GgufTensor(info.kind, (shape[0], shape[1]), self._in_order(name, rows))

    def maps(self) -> Sequence[Tensor]:
        return [self._data]

    def close(self) -> None:
        pass

    def _bytes(self, name: str, info: TensorInfo, size: int) -> Tensor:
        if info.offset + size > self._data.shape[0]:
            raise ModelError(f"{self._file}: {gguf_name(name)} ends behind the file, which is cut short")
        return self._data[info.offset : info.offset + size]

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Undo the row order of Q and K in files of the llama architecture.

        Their converter interleaves the two rotary halves of each head (row 2i is dimension i, row 2i + 1 is dimension i + D/2). Rows are
        whole in quantised form too, because blocks lie along the input dimension. The result is a copy, off the map.
        """
        if self.config.family != "llama" or not any(part in name for part in (".self_attn.q_proj.", ".self_attn.k_proj.")):
            return rows
        half = self.config.head_dim // 2
        return rows.view(-1, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    """The file's name of a weight, e.g. `blk.0.attn_q.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise KeyError(name)
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises ModelError for what is no GGUF file of a known version, or is cut short."""
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderReader(data).read()
    except (OSError, ValueError, struct.error, IndexError) as error:
        raise ModelError(f"{file}: not a readable GGUF file: {error}") from error


class _HeaderReader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"it starts with {self._data[:4]!r}, not b'GGUF'")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported; supported are 2 and 3, little-endian")
        num_tensors, num_pairs = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            value = self._value(self._number("<I"))
            if value is not None:
                metadata[key] = value
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        return GgufHeader(metadata, tensors, -(-self._at // alignment) * alignment)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        raw = self._data[self._at : self._at + length]
        if len(raw) != length:
            raise ValueError("a string ends behind the file")
        self._at += length
        return raw.decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """A scalar, string or short list of numbers; None for any other array, which is stepped over."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._code(kind))
        item, count = self._number("<I"), self._number("<Q")
        if item == _STRING:
            self._skip_strings(count)
        elif item == _ARRAY:
            for _ in range(count):
                self._value(_ARRAY)
        elif count <= _MAX_LIST:
            return [self._number(self._code(item)) for _ in range(count)]
        else:
            self._at += count * struct.calcsize(self._code(item))
        return None

    def _skip_strings(self, count: int) -> None:
        unpack, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, TensorInfo]:
        name = self._string()
        shape = tuple(self._number("<Q") for _ in range(self._number("<I")))
        kind, offset = self._number("<I"), self._number("<Q")
        return name, TensorInfo(_KINDS.get(kind, f"type {kind}"), shape[::-1], offset)
