"""Safetensors folders, memory-mapped: the header is JSON, the rest is tensors that need no parsing.

Source: the format's specification (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from appliance.errors import ModelError
from appliance.model.config import load_config
from appliance.model.mapped_file import map_bytes
from appliance.model.weights import check_shape

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit


class SafetensorsWeights:
    """All *.safetensors files of a folder, or those that its index names."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(folder)
        self._folder = folder
        self._maps: list[Tensor] = []
        self._entries: dict[str, tuple[Path, Tensor, dict[str, Any]]] = {}
        for file in _files(folder):
            data, header = _read_header(file)
            self._maps.append(data)
            self._entries.update({name: (file, data, entry) for name, entry in header.items() if name != "__metadata__"})

    def has(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._entries:
            raise ModelError(f"{self._folder}: no safetensors file holds {name}")
        file, data, entry = self._entries[name]
        check_shape(name, entry["shape"], shape, file)
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"{file}: {name} has dtype {entry['dtype']}; supported are {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= data.shape[0] or end - start != math.prod(shape) * dtype.itemsize:
            raise ModelError(f"{file}: {name} lies at bytes {start}-{end} of {data.shape[0]}; the file is cut short or damaged")
        raw = data[start:end]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()  # files written before the format aligned its header
        return raw.view(dtype).view(shape)

    def maps(self) -> Sequence[Tensor]:
        return self._maps


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors file")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}") from error
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ModelError(f"{folder}: {len(missing)} files named by {index.name} are missing, the first is {missing[0]}")
    return [folder / name for name in names]


def _read_header(file: Path) -> tuple[Tensor, dict[str, Any]]:
    """The bytes behind the header, and the header's entries."""
    data = map_bytes(file)
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    if data.shape[0] < 8 or length > min(_MAX_HEADER_BYTES, data.shape[0] - 8):
        raise ModelError(f"{file} is no safetensors file, or is cut short")
    try:
        header = json.loads(data[8 : 8 + length].numpy().tobytes())
    except ValueError as error:
        raise ModelError(f"{file}: the safetensors header is damaged: {error}") from error
    return data[8 + length :], header
