"""Norms, rotary embedding with the KV write, SwiGLU and activation quantisation in Triton against their twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from appliance.kernels import linear
from appliance.kernels.ops import AttentionBatch, GgufTensor
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

TRITON, TWIN = TritonOps(), ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16]


def close(result: Tensor, expected: Tensor) -> bool:
    """Equal up to one rounding of the dtype on values of order one (float32: a few)."""
    tolerance = 1e-5 if result.dtype == torch.float32 else 1.6e-2
    return bool(torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=tolerance / 4))


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (3, 576), (2, 1000), (0, 64)])
def test_norms_match_their_twins(num_tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Both norms agree with the twin at sizes that are no power of two; the residual is updated in place and rounded to its dtype."""
    x, weight = normal(num_tokens, size, dtype=dtype, device=device), normal(size, dtype=dtype, device=device, seed=1)
    assert close(TRITON.rms_norm(x, weight, 1e-5), TWIN.rms_norm(x, weight, 1e-5))
    residual = normal(num_tokens, size, dtype=dtype, device=device, seed=2)
    other = residual.clone()
    assert close(TRITON.add_rms_norm(x, residual, weight, 1e-5), TWIN.add_rms_norm(x, other, weight, 1e-5))
    assert close(residual, other)  # the interpreter cuts where the GPU rounds to bf16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 7), (3, 1536), (0, 8)])
def test_silu_mul_matches_its_twin(num_tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """SwiGLU agrees with the twin, large negative gates included."""
    gate_up = normal(num_tokens, 2 * size, dtype=dtype, device=device) * 20
    assert close(TRITON.silu_mul(gate_up), TWIN.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "width"), [(4, 2, 16, 16), (3, 1, 24, 24), (9, 3, 32, 16), (2, 2, 20, 12)])
def test_rope_store_kv_matches_its_twin(
    num_heads: int, num_kv_heads: int, head_dim: int, width: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """q, and every slot of both caches, agree with the twin; a negative slot is not stored; a rotary width below the head size leaves the rest."""
    num_tokens, block_size = 5, 8
    qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    angles = torch.arange(40).unsqueeze(1) * torch.arange(1, width // 2 + 1) * 0.07
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    index = torch.tensor([0, 5, 5, 39, 0], dtype=torch.int32, device=device)
    batch = AttentionBatch(
        input_ids=index,
        positions=index,
        slot_mapping=torch.tensor([9, 0, 31, 17, -1], device=device),
        query_start=index,
        context_lens=index,
        rows=index,
        block_tables=index.unsqueeze(0),
        logit_index=index,
        num_decodes=0,
        max_query_len=5,
        max_context_len=40,
    )
    weights = [normal(head_dim, dtype=dtype, device=device, seed=seed) if norm else None for seed in (3, 4)]
    caches = [torch.full((4, num_kv_heads, block_size, head_dim), 7.0, dtype=dtype, device=device) for _ in range(4)]
    q = TRITON.rope_store_kv(qkv, cos_sin, caches[0], caches[1], batch, *weights, 1e-6)
    expected = TWIN.rope_store_kv(qkv, cos_sin, caches[2], caches[3], batch, *weights, 1e-6)
    assert close(q, expected)
    assert close(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_quantised_rows_have_their_own_scale(device: torch.device) -> None:
    """Rows of e4m3 values times a power of two come back exactly; a row of zeros is zeros. (Rounding is checked on the GPU: the interpreter loses
    the carry into the exponent.)"""
    values = torch.randint(0, 127, (3, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int8).view(torch.float8_e4m3fn).float()
    values[:, ::3] *= -1
    values[:, 5] = 448.0
    x = (values * torch.tensor([[2.0**-20], [4.0], [0.0]])).to(device)
    quantised, scales = linear.quantize_rows(x)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scales[:2, 0].tolist() == [2.0**-20, 4.0]
    assert torch.equal(quantised.float() * scales, x)


def test_dense_linears_stack_their_parts(device: torch.device) -> None:
    """Parts stack along the outputs, a GGUF part among them; the bytes are those of weight and bias."""
    first = normal(4, 64, dtype=torch.float32, device=device)
    blocks = torch.zeros(2, 2 * 34, dtype=torch.uint8)
    blocks[:, [1, 35]] = 0x3C  # float16 1.0, the scale of both Q8_0 blocks of a row
    blocks[0, 2:10] = torch.arange(8, dtype=torch.uint8)
    bias = normal(6, dtype=torch.float32, device=device, seed=1)
    layer, num_bytes = TRITON.make_linear([first, GgufTensor("Q8_0", (2, 64), blocks)], bias, device=device, dtype=torch.float32, quantization="auto")
    x = normal(3, 64, dtype=torch.float32, device=device, seed=2)
    weight = torch.zeros(6, 64, device=device)
    weight[:4] = first
    weight[4, :8] = torch.arange(8)
    assert close(layer(x), x @ weight.T + bias)
    assert num_bytes == 6 * 64 * 4 + 6 * 4


def test_an_unknown_quantisation_is_refused(device: torch.device) -> None:
    """The message names what there is."""
    with pytest.raises(ValueError, match="auto, none or fp8"):
        TRITON.make_linear([torch.zeros(16, 16)], None, device=device, dtype=torch.float32, quantization="int4")
    with pytest.raises(ValueError, match="multiples of 16"):
        TRITON.make_linear([torch.zeros(17, 16)], None, device=device, dtype=torch.float32, quantization="fp8")
