"""What the model's arithmetic takes and what the device could do at best: the denominators of the utilisation metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from appliance.events import StepCosts
from appliance.model.config import ModelConfig
from appliance.model.decoder import Decoder

# Part of the device's name -> dense bfloat16 FLOP/s and memory bandwidth in bytes/s, from NVIDIA's data sheets. The first match counts.
_KNOWN: tuple[tuple[str, float, float], ...] = (
    ("GH200", 989e12, 4.0e12),
    ("GB200", 2500e12, 8.0e12),
    ("B200", 2250e12, 7.7e12),
    ("H200", 989e12, 4.8e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100", 989e12, 3.35e12),
    ("H800", 989e12, 3.35e12),
    ("H20", 148e12, 4.0e12),
    ("A100-SXM4-80GB", 312e12, 2.039e12),
    ("A100 80GB PCIe", 312e12, 1.935e12),
    ("A100", 312e12, 1.555e12),
    ("L40S", 362e12, 0.864e12),
    ("L40", 181e12, 0.864e12),
    ("L4", 121e12, 0.3e12),
    ("A10G", 70e12, 0.6e12),
    ("A10", 125e12, 0.6e12),
    ("RTX 4090", 165e12, 1.008e12),
    ("RTX 3090", 71e12, 0.936e12),
)
_TRIES = 2
_CPU_SIZE, _CUDA_SIZE = 512, 4096  # of the square product that measures FLOP/s
_CPU_BYTES, _CUDA_BYTES = 64 << 20, 512 << 20  # read to measure bandwidth: beyond most last-level caches


def step_costs(decoder: Decoder, device: torch.device, kv_bytes_per_token: int) -> StepCosts:
    """The costs of `decoder` on `device`. Weights that a step does not read as a whole (an embedding that is not also the head) are left out.

    A device that is not in the table is measured, which takes some 0.1 s.
    """
    config = decoder.config
    layers, head = _layer_parameters(config) * config.num_layers, config.vocab_size * config.hidden_size
    peaks = _known_peaks(device, decoder.dtype)
    if peaks is None:
        peaks = _measured_peaks(device, decoder.dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return StepCosts(
        flops_per_token=2.0 * layers,
        flops_per_sample=2.0 * head,
        flops_per_pair=4.0 * config.num_layers * config.num_heads * config.head_dim,
        weight_bytes=round(decoder.weight_bytes * min(1.0, (layers + head) / decoder.num_parameters)),
        kv_bytes_per_token=kv_bytes_per_token,
        peak_flops=peaks[0],
        peak_bytes_per_second=peaks[1],
    )


def _layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def _known_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float] | None:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next(((flops, bandwidth) for part, flops, bandwidth in _KNOWN if part in name), None)


def _measured_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a square product and bytes/s of a sum over a large buffer: the best of a few tries."""
    is_cuda = device.type == "cuda"
    size, num_bytes = (_CUDA_SIZE, _CUDA_BYTES) if is_cuda else (_CPU_SIZE, _CPU_BYTES)
    square = torch.ones(size, size, dtype=dtype, device=device)
    flops = 2.0 * size**3 / _best_seconds(functools.partial(torch.matmul, square, square), device)
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return flops, num_bytes / _best_seconds(buffer.sum, device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_TRIES + 1):  # the first warms up
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
