"""The weight-streaming linear of a few tokens against norm, product, SwiGLU and residual in turn."""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.reference import ReferenceOps, rms_norm
from appliance.kernels.skinny_linear import SkinnyConfig, arrival_counters, choose_config, skinny_linear

CONFIGS = [SkinnyConfig(4, 64, 1, 4, 1), SkinnyConfig(8, 32, 4, 4, 1), SkinnyConfig(16, 32, 2, 4, 3)]


@pytest.mark.parametrize("num_tokens", [1, 3, 16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("variant", ["plain", "norm", "add", "gate", "norm gate bias", "norm add bias"])
def test_fused_steps_equal_separate_ones(variant: str, config: SkinnyConfig, num_tokens: int, device: torch.device) -> None:
    """Every fusion, at sizes that no tile divides, with and without a split of K; counters end at zero."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    size, num_outputs, gate = 200, 37, "gate" in variant
    x, norm_weight, residual = normal(num_tokens, size), normal(size), normal(num_tokens, num_outputs)
    weight = normal(num_outputs * (1 + gate), size)
    bias = normal(weight.shape[0]) if "bias" in variant else None
    expected = rms_norm(x, norm_weight, 1e-5) if "norm" in variant else x
    expected = torch.nn.functional.linear(expected, weight, bias)
    expected = ReferenceOps().silu_mul(expected) if gate else expected
    expected = residual + expected if "add" in variant else expected
    result = skinny_linear(
        x, weight, bias, norm=(norm_weight, 1e-5) if "norm" in variant else None, residual=residual if "add" in variant else None, gate=gate,
        config=config,
    )  # fmt: skip
    assert float((result - expected).norm() / expected.norm()) < 1e-5
    assert (result is residual) == ("add" in variant)
    assert not arrival_counters(device).any()


def test_too_many_tokens_are_refused(device: torch.device) -> None:
    """The caller chooses by shape; a wrong choice is an error, not a wrong result."""
    with pytest.raises(ValueError, match="1 to 16 tokens, not 17"):
        skinny_linear(torch.zeros(17, 8, device=device), torch.zeros(4, 8, device=device), None)


def test_small_layers_are_split_and_large_ones_are_not() -> None:
    """Few output tiles leave multiprocessors idle unless K is split."""
    assert choose_config(1, 151936, 1024, False, 132).num_splits == 1
    assert choose_config(4, 1024, 4096, False, 132).num_splits == 4
