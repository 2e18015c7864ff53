"""A decoder's layers in six launches each, for steps of one to some tens of tokens: norm, residual and SwiGLU fold into the products.

Between them stand rope_store_kv and attention. One token takes the weight-streaming products of skinny_linear.py, more take those of
fused_linear.py. Twin: the same layers one operation at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from appliance.kernels import fused_linear
from appliance.kernels.launch import num_multiprocessors
from appliance.kernels.linear import DenseLinear
from appliance.kernels.ops import AttentionBatch, LayerWeights, Linear, Ops
from appliance.kernels.skinny_linear import skinny_linear


class FusedStack:
    """Implements ops.DecoderStack over dense weights on the device. Stateless between calls."""

    def __init__(self, ops: Ops, layers: Sequence[LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        self._ops = ops
        self._layers = tuple(layers)
        self._eps = eps
        self._head_dim = head_dim
        skinny = min((linear.skinny_tokens for layer in layers for linear in _linears(layer) if isinstance(linear, DenseLinear)), default=0)
        self._skinny_tokens = skinny
        self._max_tokens = min(map(_most_tokens, layers)) if skinny and all(map(_fits, layers)) else skinny

    def accepts(self, num_tokens: int) -> bool:
        """Whether the fused products take a step of this many tokens."""
        return 0 < num_tokens <= self._max_tokens

    def __call__(self, hidden: Tensor, cos_sin: Tensor, kv_caches: Sequence[tuple[Tensor, Tensor]], batch: AttentionBatch) -> Tensor:
        """See `DecoderStack`: `hidden` [T, H] is the residual stream and is overwritten layer by layer."""
        if hidden.shape[0] > self._skinny_tokens:
            return self._run_fused(hidden, cos_sin, kv_caches, batch)
        eps = self._eps
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            attended = self._attend(layer, _product(hidden, layer.qkv, norm=(layer.attention_norm, eps)), cos_sin, kv_cache, batch)
            _product(attended, layer.output, residual=hidden)
            inner = _product(hidden, layer.gate_up, norm=(layer.mlp_norm, eps), gate=True)
            _product(inner, layer.down, residual=hidden)
        return hidden

    def _run_fused(self, hidden: Tensor, cos_sin: Tensor, kv_caches: Sequence[tuple[Tensor, Tensor]], batch: AttentionBatch) -> Tensor:
        (num_tokens, size), eps, chip = hidden.shape, self._eps, num_multiprocessors(hidden.device)
        stream = fused_linear.enter(hidden, self._layers[0].attention_norm)
        for index, (layer, kv_cache) in enumerate(zip(self._layers, kv_caches, strict=True)):
            qkv_size, inner_size = _weight(layer.qkv).shape[0], _weight(layer.down).shape[1]
            cut = fused_linear.choose_config(num_tokens, qkv_size, size, chip, may_split=False)
            qkv = fused_linear.normed_product(stream, _weight(layer.qkv), _bias(layer.qkv), eps, cut)
            attended = self._attend(layer, qkv, cos_sin, kv_cache, batch)
            cut = fused_linear.choose_config(num_tokens, size, attended.shape[1], chip)
            fused_linear.added_product(attended, _weight(layer.output), _bias(layer.output), stream, layer.mlp_norm, cut)
            cut = fused_linear.choose_config(num_tokens, inner_size, size, chip, may_split=False)
            inner = fused_linear.normed_product(stream, _weight(layer.gate_up), _bias(layer.gate_up), eps, cut, gate=True)
            next_norm = self._layers[min(index + 1, len(self._layers) - 1)].attention_norm  # the last layer's is written and not used
            cut = fused_linear.choose_config(num_tokens, size, inner_size, chip)
            fused_linear.added_product(inner, _weight(layer.down), _bias(layer.down), stream, next_norm, cut)
        return hidden

    def _attend(self, layer: LayerWeights, qkv: Tensor, cos_sin: Tensor, kv_cache: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
        q = self._ops.rope_store_kv(qkv, cos_sin, *kv_cache, batch, layer.q_norm, layer.k_norm, self._eps)
        return self._ops.attention(q, *kv_cache, batch, self._head_dim**-0.5, layer.sliding_window)


def can_stack(layers: Sequence[LayerWeights]) -> bool:
    """Whether every projection is dense and of a type that the weight-streaming kernel serves."""
    return all(isinstance(linear, DenseLinear) and linear.skinny_tokens > 0 for layer in layers for linear in _linears(layer))


def _product(x: Tensor, linear: Linear, *, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None, gate: bool = False) -> Tensor:
    return skinny_linear(x, _weight(linear), _bias(linear), norm=norm, residual=residual, gate=gate)


def _fits(layer: LayerWeights) -> bool:
    """Whether the cuts of fused_linear.py divide the layer's weights."""
    halves = 1, 1, 2, 1
    return all(
        fused_linear.divides(_weight(linear).shape[0] // half, _weight(linear).shape[1]) for linear, half in zip(_linears(layer), halves, strict=True)
    )


def _most_tokens(layer: LayerWeights) -> int:
    widest = max(_weight(layer.qkv).shape[0], _weight(layer.gate_up).shape[0] // 2)
    return fused_linear.most_tokens(widest, num_multiprocessors(_weight(layer.qkv).device))


def _weight(linear: Linear) -> Tensor:
    assert isinstance(linear, DenseLinear)
    return linear.weight


def _bias(linear: Linear) -> Tensor | None:
    assert isinstance(linear, DenseLinear)
    return linear.bias


def _linears(layer: LayerWeights) -> tuple[Linear, Linear, Linear, Linear]:
    return layer.qkv, layer.output, layer.gate_up, layer.down
