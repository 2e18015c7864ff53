"""Products with norm, SwiGLU and residual folded in, against their twins in turn."""

from __future__ import annotations

import pytest
import torch

from appliance.kernels.fused_linear import FusedConfig, added_product, choose_config, divides, enter, most_tokens, normed_product
from appliance.kernels.launch import arrival_counters
from appliance.kernels.linear import DenseLinear
from appliance.kernels.reference import ReferenceOps

EPS = 1e-5
OPS = ReferenceOps()


@pytest.mark.parametrize("num_splits", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 16, 37])
@pytest.mark.parametrize("has_bias", [False, True])
def test_two_products_equal_their_twins_in_turn(num_tokens: int, num_splits: int, has_bias: bool, device: torch.device) -> None:
    """Norm and gate-up with SwiGLU, down with the residual, the next norm and product: within float32's rounding; counters end at zero."""
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * 0.5).to(device)

    hidden, inner = 192, 128
    qkv, gate_up, down = random(64, hidden), random(2 * inner, hidden), random(hidden, inner)
    first, second = random(hidden), random(hidden)
    biases = (random(2 * inner), random(hidden)) if has_bias else (None, None)
    residual = random(num_tokens, hidden)
    expected = residual.clone()
    middle = OPS.silu_mul(DenseLinear(gate_up, biases[0])(OPS.rms_norm(expected, first, EPS)))
    last = DenseLinear(qkv, None)(OPS.add_rms_norm(DenseLinear(down, biases[1])(middle), expected, second, EPS))

    cut = FusedConfig(block_n=64, block_t=16, block_k=16, num_splits=num_splits, num_warps=4, num_stages=2)
    stream = enter(residual, first)
    product = normed_product(stream, gate_up, biases[0], EPS, cut, gate=True)
    torch.testing.assert_close(product, middle, rtol=1e-4, atol=1e-4)
    added_product(product, down, biases[1], stream, second, cut)
    torch.testing.assert_close(stream.residual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed_product(stream, qkv, None, EPS, cut), last, rtol=1e-4, atol=1e-3)
    assert not arrival_counters(device).any()


@pytest.mark.parametrize("num_tokens", [2, 17, 64, 100])
def test_chosen_cuts_divide_what_they_say_they_do(num_tokens: int) -> None:
    """Also widths that are no power of two; a split only where programs are few."""
    for outputs, size in ((1024, 2048), (896, 896), (896, 4864), (576, 1536), (4096, 14336)):
        assert divides(outputs, size)
        config = choose_config(num_tokens, outputs, size, 132)
        assert outputs % config.block_n == 0
        assert size % (config.block_k * config.num_splits) == 0
    assert not divides(100, 64)
    assert choose_config(32, 1024, 2048, 132).num_splits == 4
    assert choose_config(64, 4096, 4096, 132).num_splits == 1


def test_wider_models_leave_fewer_tokens_to_it() -> None:
    """0.6B up to 128 tokens, 3B 64, 8B 32."""
    assert [most_tokens(width, 132) for width in (4096, 8192, 14336)] == [128, 64, 32]


def test_a_cut_that_does_not_divide_the_weight_is_refused(device: torch.device) -> None:
    """Neither masks in the loop nor wrong results: the caller chooses another path."""
    stream = enter(torch.zeros(3, 64, device=device), torch.ones(64, device=device))
    with pytest.raises(ValueError, match="no multiple"):
        normed_product(stream, torch.zeros(40, 64, device=device), None, EPS, FusedConfig(64, 16, 16, 1, 4, 2))
    with pytest.raises(ValueError, match="tiles of 64"):
        added_product(
            torch.zeros(3, 64, device=device), torch.zeros(64, 64, device=device), None, stream, stream.residual[0], FusedConfig(32, 16, 16, 1, 4, 2)
        )
