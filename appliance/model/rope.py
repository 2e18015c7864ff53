"""Rotary frequencies and the table of their cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from appliance.model.config import RopeConfig


def cos_sin_table(rope: RopeConfig, num_positions: int, device: torch.device, frequency_factors: Tensor | None = None) -> Tensor:
    """`[num_positions, width]` float32: cosines in the first half, sines in the second.

    frequency_factors `[width / 2]` divide the frequencies, as GGUF's `rope_freqs.weight` does for Llama 3.
    """
    frequencies, scale = inverse_frequencies(rope)
    if frequency_factors is not None:
        frequencies = frequencies / frequency_factors.to("cpu", torch.float32)
    angles = torch.arange(num_positions, dtype=torch.float32, device=device).unsqueeze(1) * frequencies.to(device)
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(scale)


def inverse_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, `[width / 2]` float32, and the factor on cos and sin."""
    exponents = torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1, section 3.4.2 of arXiv 2407.21783)."""
    wavelengths = 2 * math.pi / plain
    longest, shortest = rope.original_max_positions / rope.low_freq_factor, rope.original_max_positions / rope.high_freq_factor
    share = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * plain / rope.factor + share * plain
    stretched = torch.where(wavelengths > longest, plain / rope.factor, plain)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), blended, stretched)


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Interpolated below `beta_slow` rotations over the original context, kept above `beta_fast`, a linear ramp between (arXiv 2309.00071)."""

    def dimension(num_rotations: float) -> float:
        return rope.width * math.log(rope.original_max_positions / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return plain / rope.factor * (1 - kept) + plain * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
