"""Safetensors folders: the header is JSON, the rest is tensors that need no parsing. Memory-mapped for a CPU; for a GPU read by several threads.

Source: the format's specification (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from appliance.errors import ModelError
from appliance.model.config import load_config
from appliance.model.mapped_file import map_bytes
from appliance.model.parallel_read import ParallelReader, Span
from appliance.model.weights import check_shape

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit


class SafetensorsWeights:
    """All *.safetensors files of a folder, or those that its index names.

    With a `device`, weights come as tensors there, read in parallel and ahead of their use; without, as maps of the files.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.config = load_config(folder)
        self._folder = folder
        self._maps: list[Tensor] = []
        self._entries: dict[str, tuple[Path, Tensor, dict[str, Any]]] = {}
        for file in _files(folder):
            data, header = _read_header(file)
            self._maps.append(data)
            self._entries.update({name: (file, data, entry) for name, entry in header.items() if name != "__metadata__"})
        self.num_bytes = sum(data.nbytes for data in self._maps)
        self._reader = None if device is None else ParallelReader(self._spans(), device)

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
        raw = data[start:end] if self._reader is None else self._reader.take(name)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()  # files written before the format aligned its header
        return raw.view(dtype).view(shape)

    def maps(self) -> Sequence[Tensor]:
        return self._maps if self._reader is None else []

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _spans(self) -> list[Span]:
        """Where each weight lies, in the order in which a decoder is built. Those that `get` will refuse are left to it."""
        spans = []
        for name in sorted(self._entries, key=_build_order):
            file, data, entry = self._entries[name]
            start, end = entry["data_offsets"]
            if 0 <= start <= end <= data.nbytes and not (name == "lm_head.weight" and self.config.tie_word_embeddings):
                spans.append(Span(name, file, file.stat().st_size - data.nbytes + start, end - start))
        return spans


_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
_IN_LAYER: Final = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm", "self_attn.k_norm")
_AFTER: Final = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_PLACES: Final = {f"{name}.{kind}": place for place, name in enumerate(_IN_LAYER + _AFTER) for kind in ("weight", "bias")}


def _build_order(name: str) -> tuple[int, int, int]:
    match = _LAYER.fullmatch(name)
    if match is not None:
        return 1, int(match[1]), _PLACES.get(match[2], len(_PLACES))
    return {"model.embed_tokens.weight": (0, 0, 0), "model.norm.weight": (2, 0, 0), "lm_head.weight": (2, 1, 0)}.get(name, (3, 0, 0))


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
