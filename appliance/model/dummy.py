"""Random weights from a config.json alone, drawn on the device: to measure a model whose weights are not at hand."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from appliance.model.config import load_config


class DummyWeights:
    """Normal weights of standard deviation 1 / sqrt(in_features), so that activations keep their size from layer to layer; the projections that
    add to the residual stream are smaller by sqrt(2 * num_layers), so that it does not grow. Norms are 1, biases 0.

    A weight depends on seed, name, shape, device kind and dtype alone.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.config = load_config(folder)
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self.num_bytes = 0

    def has(self, name: str) -> bool:
        return name != "rope_freqs.weight"

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        deviation = shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation *= (2 * self.config.num_layers) ** -0.5
        # 32 bits: torch's generator on CPU ignores the rest of its seed.
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0.0, deviation, generator=generator)

    def maps(self) -> Sequence[Tensor]:
        return []

    def close(self) -> None:
        pass
