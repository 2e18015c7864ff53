"""A decoder's layers as one call: for steps in which every projection is a PackedLinear. See stack.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.kernels.cpu.library import DTYPES, AttentionShape, LayerShape, RopeShape
from appliance.kernels.cpu.linear import GROUP, PackedLinear
from appliance.kernels.ops import AttentionBatch, LayerWeights, Linear

KvCaches = Sequence[tuple[Tensor, Tensor]]


class DecoderStack:
    """All layers of a model. Not bound to a thread; steps must not overlap, as the caches they write do not."""

    def __init__(
        self, library: ctypes.CDLL, layers: Sequence[LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, scale: float
    ) -> None:
        self._library = library
        self._layers = tuple(layers)
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._eps = eps
        self._scale = scale
        self._keep: list[Tensor] = []
        self._array = (LayerShape * len(layers))(*(self._shape(layer) for layer in layers))
        self._caches: KvCaches = ()
        dense = [linear.dense for layer in layers for linear in _linears(layer) if isinstance(linear, PackedLinear) and linear.dense is not None]
        self._max_tokens = min((copy.min_tokens - 1 for copy in dense), default=None)

    def accepts(self, num_tokens: int) -> bool:
        """Whether a step of this many tokens is fastest here, rather than layer by layer with the dense copies."""
        return self._max_tokens is None or num_tokens <= self._max_tokens

    def __call__(self, hidden: Tensor, cos_sin: Tensor, kv_caches: KvCaches, batch: AttentionBatch) -> Tensor:
        """The residual stream after the last layer, `[T, H]` of hidden's dtype (float32 or bfloat16), in place of the embeddings `hidden`.

        Writes this step's K and V. Within, everything but the caches is float32, whatever the dtype.
        """
        if kv_caches is not self._caches:
            self._bind(kv_caches)
        num_heads, num_kv_heads, head_dim = self._heads
        keys = kv_caches[0][0]
        block_size, cache_dtype, num_tokens = keys.shape[2], DTYPES[keys.dtype], hidden.shape[0]
        rope = RopeShape(
            cos_sin.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(), None, None,
            num_tokens, num_heads, num_kv_heads, head_dim, cos_sin.shape[1], block_size, cache_dtype, self._eps,
        )  # fmt: skip
        attention = AttentionShape(
            batch.query_start.data_ptr(), batch.context_lens.data_ptr(), batch.rows.data_ptr(), batch.block_tables.data_ptr(),
            batch.block_tables.shape[1], batch.rows.shape[0], num_tokens, num_heads, num_kv_heads, head_dim, block_size,
            0, cache_dtype, self._scale, 0,
        )  # fmt: skip
        self._library.cpu_stack(
            self._array,
            len(self._array),
            ctypes.addressof(rope),
            ctypes.addressof(attention),
            hidden.data_ptr(),
            DTYPES[hidden.dtype],
            torch.get_num_threads(),
        )
        return hidden

    def _bind(self, kv_caches: KvCaches) -> None:
        for shape, (keys, values) in zip(self._array, kv_caches, strict=True):
            shape.keys, shape.values = keys.data_ptr(), values.data_ptr()
        self._caches = kv_caches

    def _shape(self, layer: LayerWeights) -> LayerShape:
        linears = [ctypes.addressof(linear.shape) for linear in _linears(layer) if isinstance(linear, PackedLinear)]
        norms = [self._float(weight) for weight in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)]
        return LayerShape(*linears, *norms, None, None, layer.sliding_window or 0, 0)

    def _float(self, weight: Tensor | None) -> int | None:
        if weight is None:
            return None
        wide = weight.to(torch.float32).contiguous()
        self._keep.append(wide)
        return wide.data_ptr()


def can_stack(layers: Sequence[LayerWeights], num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the fused kernel takes such layers."""
    for layer in layers:
        if not all(isinstance(linear, PackedLinear) for linear in _linears(layer)):
            return False
        gate_up, down = layer.gate_up, layer.down
        if isinstance(gate_up, PackedLinear) and isinstance(down, PackedLinear):
            inner = down.in_features
            if inner % GROUP or gate_up.out_features != 2 * inner or any(rows % inner for rows in gate_up.part_rows):
                return False
    return bool(layers) and head_dim % 16 == 0 and head_dim <= 512 and num_heads % num_kv_heads == 0 and num_heads * head_dim % GROUP == 0


def _linears(layer: LayerWeights) -> tuple[Linear, Linear, Linear, Linear]:
    return layer.qkv, layer.output, layer.gate_up, layer.down
