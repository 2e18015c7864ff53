"""A decoder's layers in six launches against the same layers one operation at a time."""

from __future__ import annotations

import pytest
import torch
from attention_batches import make_batch

from appliance.kernels.fused_stack import FusedStack, can_stack
from appliance.kernels.linear import DenseLinear
from appliance.kernels.ops import LayerWeights
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EPS = 64, 4, 2, 16, 128, 1e-5


def make_layers(device: torch.device, *, has_bias: bool) -> list[LayerWeights]:
    generator = torch.Generator().manual_seed(2)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(device)

    def linear(outputs: int, size: int) -> DenseLinear:
        made = DenseLinear(random(outputs, size), random(outputs) if has_bias else None)
        made.skinny_tokens = 1  # as for bfloat16 on a GPU
        return made

    return [
        LayerWeights(
            attention_norm=1 + random(HIDDEN),
            qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            q_norm=None if has_bias else 1 + random(HEAD_DIM),
            k_norm=None if has_bias else 1 + random(HEAD_DIM),
            output=linear(HIDDEN, HEADS * HEAD_DIM),
            mlp_norm=1 + random(HIDDEN),
            gate_up=linear(2 * INNER, HIDDEN),
            down=linear(HIDDEN, INNER),
            sliding_window=None,
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("decodes", "chunks"), [([9], []), ([5, 33, 0, 17], []), ([3, 20], [(4, 15), (0, 0)])], ids=["one", "some", "mixed"])
def test_the_stack_equals_its_operations_in_turn(decodes: list[int], chunks: list[tuple[int, int]], has_bias: bool, device: torch.device) -> None:
    """Residual stream and caches, with and without biases and head norms, for a token, some, and a mixed step with an empty chunk."""
    _, key, value, batch = make_batch(decodes, chunks, HEADS, KV_HEADS, HEAD_DIM, torch.float32, device)
    num_tokens = batch.input_ids.shape[0]
    batch.positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    batch.slot_mapping = torch.arange(num_tokens, device=device)
    layers, ops, twin = make_layers(device, has_bias=has_bias), TritonOps(), ReferenceOps()
    assert can_stack(layers)
    stack = FusedStack(ops, layers, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, eps=EPS)
    assert stack.accepts(num_tokens)
    assert not stack.accepts(129)
    hidden = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    cos_sin = torch.randn(64, HEAD_DIM, generator=torch.Generator().manual_seed(3)).to(device)
    clean = [(key.nan_to_num(), value.nan_to_num()) for _ in layers]
    caches = [(keys.clone(), values.clone()) for keys, values in clean]
    expected = hidden.clone()
    for layer, (keys, values) in zip(layers, clean, strict=True):
        qkv = layer.qkv(twin.rms_norm(expected, layer.attention_norm, EPS))
        q = twin.rope_store_kv(qkv, cos_sin, keys, values, batch, layer.q_norm, layer.k_norm, EPS)
        expected += layer.output(twin.attention(q, keys, values, batch, HEAD_DIM**-0.5, None))
        expected += layer.down(twin.silu_mul(layer.gate_up(twin.rms_norm(expected, layer.mlp_norm, EPS))))
    result = stack(hidden, cos_sin, caches, batch)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for (keys, values), (keys_expected, values_expected) in zip(caches, clean, strict=True):
        torch.testing.assert_close(keys, keys_expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, values_expected, rtol=1e-4, atol=1e-4)
