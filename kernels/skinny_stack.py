"""A decoder's layers in six launches each, for steps of a few tokens: norm, residual and SwiGLU fold into the weight-streaming products.

Between them stand rope_store_kv and attention. Twin: the same layers one operation at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from appliance.kernels.linear import DenseLinear
from appliance.kernels.ops import AttentionBatch, LayerWeights, Linear, Ops
from appliance.kernels.skinny_linear import skinny_linear


class SkinnyStack:
    """Implements ops.DecoderStack over dense weights on the device. Stateless between calls."""

    def __init__(self, ops: Ops, layers: Sequence[LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        self._ops = ops
        self._layers = tuple(layers)
        self._shape = (num_heads, num_kv_heads, head_dim)
        self._eps = eps
        self._max_tokens = min((linear.skinny_tokens for layer in layers for linear in _linears(layer) if isinstance(linear, DenseLinear)), default=0)

    def accepts(self, num_tokens: int) -> bool:
        """Whether the weight-streaming kernel takes a step of this many tokens."""
        return 0 < num_tokens <= self._max_tokens

    def __call__(self, hidden: Tensor, cos_sin: Tensor, kv_caches: Sequence[tuple[Tensor, Tensor]], batch: AttentionBatch) -> Tensor:
        """See `DecoderStack`: `hidden` [T, H] is the residual stream and is overwritten layer by layer."""
        ops, eps, scale = self._ops, self._eps, self._shape[2] ** -0.5
        for layer, (keys, values) in zip(self._layers, kv_caches, strict=True):
            qkv = _product(hidden, layer.qkv, norm=(layer.attention_norm, eps))
            q = ops.rope_store_kv(qkv, cos_sin, keys, values, batch, layer.q_norm, layer.k_norm, eps)
            attended = ops.attention(q, keys, values, batch, scale, layer.sliding_window)
            _product(attended, layer.output, residual=hidden)
            inner = _product(hidden, layer.gate_up, norm=(layer.mlp_norm, eps), gate=True)
            _product(inner, layer.down, residual=hidden)
        return hidden


def can_stack(layers: Sequence[LayerWeights]) -> bool:
    """Whether every projection is dense and of a type that the weight-streaming kernel serves."""
    return all(isinstance(linear, DenseLinear) and linear.skinny_tokens > 0 for layer in layers for linear in _linears(layer))


def _product(x: Tensor, linear: Linear, *, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None, gate: bool = False) -> Tensor:
    assert isinstance(linear, DenseLinear)
    return skinny_linear(x, linear.weight, linear.bias, norm=norm, residual=residual, gate=gate)


def _linears(layer: LayerWeights) -> tuple[Linear, Linear, Linear, Linear]:
    return layer.qkv, layer.output, layer.gate_up, layer.down
