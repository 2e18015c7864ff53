"""Where a model's weights come from: one interface over safetensors folders, GGUF files and random numbers.

Names are those of transformers' checkpoints (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from appliance.errors import ModelError
from appliance.kernels.ops import WeightSource
from appliance.model.config import ModelConfig


class Weights(Protocol):
    """Named weights, read when asked for. `get` may be called once or often; tensors are maps of the file where they can be."""

    config: ModelConfig
    num_bytes: int  # of all weights in their files; 0 where there is no file

    def has(self, name: str) -> bool:
        """Is there such a weight?"""

    def get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        """The weight. Raises ModelError where it is missing or has another shape."""

    def maps(self) -> Sequence[Tensor]:
        """Byte maps that `get` will read, in order; for reading ahead."""

    def close(self) -> None:
        """Stop reading. What `get` gave stays valid."""


def open_weights(path: str, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """The weights of a folder with config.json and safetensors, a GGUF file, or `dummy:FOLDER` (random ones from its config.json).

    dtype and seed are those of random weights only. On a CUDA device safetensors arrive there; else weights lie in host memory. Raises ModelError.
    """
    from appliance.model.dummy import DummyWeights
    from appliance.model.gguf_file import GgufWeights
    from appliance.model.safetensors import SafetensorsWeights

    if path.startswith("dummy:"):
        return DummyWeights(Path(path.removeprefix("dummy:")), device=device, dtype=dtype, seed=seed)
    file = Path(path)
    if file.is_dir():
        return SafetensorsWeights(file, device if device.type == "cuda" else None)
    if not file.exists():
        raise ModelError(f"{file} does not exist; a model is a folder with config.json and *.safetensors, a GGUF file, or dummy:FOLDER")
    return GgufWeights(file)


def check_shape(name: str, found: Sequence[int], wanted: Sequence[int], source: object) -> None:
    """Raises ModelError where a weight is not of the shape that the config says."""
    if tuple(found) != tuple(wanted):
        raise ModelError(f"{source}: {name} has shape {tuple(found)}, but the model's configuration asks for {tuple(wanted)}")
