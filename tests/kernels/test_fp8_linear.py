"""fp8 weights: rows quantised as their twin does, and products through torch._scaled_mm in the layouts it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from appliance.kernels import linear, reference
from appliance.kernels.linear import Fp8Linear
from appliance.kernels.ops import GgufTensor


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of the result."""
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (5, 700), (2, 4096)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_rows_are_quantised_as_their_twin_does(shape: tuple[int, int], scale: float, device: torch.device) -> None:
    """Scales are equal to float32's rounding, the largest value of a row becomes 448, and a row of zeros stays one."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device) * scale
    x[-1] = 0 if shape[0] > 1 else x[-1]
    values, scales = linear.quantize_rows(x)
    wanted, wanted_scales = reference.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (shape[0], 1)
    assert scales.is_contiguous()
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-6, atol=0)
    bits, wanted_bits = values.view(torch.uint8).int(), wanted.view(torch.uint8).int()
    differ = bits != wanted_bits
    if device.type == "cpu":  # the interpreter flushes e4m3's subnormals to zero and loses the carry of a mantissa that rounds up to 2
        differ &= (wanted_bits & 0x78 != 0) & (wanted_bits & 7 != 0)
    assert bool(((bits - wanted_bits).abs()[differ] <= 1).all())
    assert float(differ.float().mean()) < 1e-2
    assert float(values[0].float().abs().max()) == 448.0
    if shape[0] > 1:
        assert not values[-1].float().any()


@pytest.fixture
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin's rounding where the interpreter's is wrong, which is what the product's accuracy would show."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(linear, "quantize_rows", reference.quantize_rows)


@pytest.mark.usefixtures("exact_rounding")
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
@pytest.mark.parametrize(("num_outputs", "size"), [(48, 64), (256, 1040)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_close_to_exact_ones(num_tokens: int, num_outputs: int, size: int, with_bias: bool, device: torch.device) -> None:
    """Two roundings to three bits of mantissa: an error of some 4 %, and no more where rows and channels differ in magnitude by thousands."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, size, generator=generator) * torch.exp2(torch.rand(num_tokens, 1, generator=generator) * 20 - 10)
    weight = torch.randn(num_outputs, size, generator=generator) * torch.exp2(torch.rand(num_outputs, 1, generator=generator) * 20 - 10)
    bias = torch.randn(num_outputs, generator=generator).bfloat16().to(device) if with_bias else None
    x, weight = x.bfloat16().to(device), weight.bfloat16().to(device)
    layer = Fp8Linear(weight, bias)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert relative_error(out, exact) < 0.05
    size_of = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + (0 if bias is None else bias.double().abs())
    assert relative_error(out.double() / size_of, exact / size_of) < 0.05


@pytest.mark.usefixtures("exact_rounding")
def test_operands_lie_as_scaled_mm_asks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Row-major times column-major, scales [M, 1] and [1, N] contiguous in float32, bfloat16 out; rows that are no view of whole memory included."""
    seen: dict[str, Any] = {}
    product = torch._scaled_mm

    def recorded(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        seen.update(options, a=a, b=b)
        return product(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", recorded)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)[:, :48]
    layer = Fp8Linear(torch.randn(32, 48).to(device, torch.bfloat16), None)
    assert layer(x).shape == (5, 32)
    assert seen["a"].stride() == (48, 1)
    assert seen["b"].shape == (48, 32)
    assert seen["b"].stride() == (1, 48)
    assert (seen["scale_a"].shape, seen["scale_b"].shape) == ((5, 1), (1, 32))
    assert seen["scale_a"].is_contiguous()
    assert seen["scale_b"].is_contiguous()
    assert seen["scale_a"].dtype == seen["scale_b"].dtype == torch.float32
    assert seen["out_dtype"] == torch.bfloat16


def test_a_step_without_tokens_gives_none(device: torch.device) -> None:
    """Row-wise scaling takes no empty operand."""
    layer = Fp8Linear(torch.ones(16, 32, device=device, dtype=torch.bfloat16), torch.ones(16, device=device, dtype=torch.bfloat16))
    assert layer(torch.empty(0, 32, device=device, dtype=torch.bfloat16)).shape == (0, 16)


@pytest.mark.parametrize("shape", [(24, 32), (32, 40)])
def test_sizes_that_the_units_do_not_take_are_refused(shape: tuple[int, int], device: torch.device) -> None:
    """In words that say what to do."""
    with pytest.raises(ValueError, match=r"multiples of 16.*quantization none"):
        linear.make_linear([torch.ones(shape)], None, device=device, dtype=torch.bfloat16, quantization="fp8")


@pytest.mark.usefixtures("exact_rounding")
def test_parts_and_quantised_blocks_are_stacked(device: torch.device) -> None:
    """A fused projection of dense and GGUF parts holds a byte a weight and four a channel."""
    blocks = torch.zeros(16, 34, dtype=torch.uint8)
    blocks[:, :2] = torch.full((16, 1), 0.5, dtype=torch.float16).view(torch.uint8)
    blocks[:, 2:] = torch.arange(32, dtype=torch.uint8)
    layer, num_bytes = linear.make_linear(
        [torch.ones(32, 32), GgufTensor("Q8_0", (16, 32), blocks)], None, device=device, dtype=torch.bfloat16, quantization="fp8"
    )
    assert num_bytes == 48 * 32 + 48 * 4
    out = layer(torch.ones(1, 32, device=device, dtype=torch.bfloat16)).float().flatten()
    assert out[:32].tolist() == [32.0] * 32
    assert float(out[-1]) == pytest.approx(0.5 * 31 * 16, rel=0.05)
