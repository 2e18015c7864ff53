"""The parts of a decoder: embedding table and transformer layer, over one device's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from appliance.kernels.gguf_blocks import dequantize_rows
from appliance.kernels.ops import AttentionBatch, GgufTensor, LayerWeights, Linear, Ops


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token embeddings: a dense table in the model's dtype, or quantised rows of which only those asked for are widened."""

    table: Tensor | GgufTensor
    dtype: torch.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] int32 -> [T, hidden_size] of the model's dtype, a new tensor."""
        if isinstance(self.table, GgufTensor):
            return dequantize_rows(self.table.kind, self.table.data.index_select(0, ids)).to(self.dtype)
        return functional.embedding(ids, self.table)

    @property
    def num_bytes(self) -> int:
        return self.table.data.nbytes if isinstance(self.table, GgufTensor) else self.table.nbytes


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention needs to know beside its weights; one for all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm attention and SwiGLU. Norm weights [hidden_size], q_norm and k_norm [head_dim] or None."""

    shape: AttentionShape
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    sliding_window: int | None

    def weights(self) -> LayerWeights:
        """The same as the kernels' fused stack takes it."""
        return LayerWeights(
            attention_norm=self.input_norm,
            qkv=self.qkv,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            output=self.output,
            mlp_norm=self.post_norm,
            gate_up=self.gate_up,
            down=self.down,
            sliding_window=self.sliding_window,
        )

    def attend(self, ops: Ops, hidden: Tensor, cos_sin: Tensor, kv_cache: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
        """Attention of normed hidden states [T, hidden_size], before the output projection: [T, Hq * D]. Writes K and V into the cache."""
        keys, values = kv_cache
        q = ops.rope_store_kv(self.qkv(hidden), cos_sin, keys, values, batch, self.q_norm, self.k_norm, self.shape.eps)
        return ops.attention(q, keys, values, batch, self.shape.scale, self.sliding_window)

    def finish(self, ops: Ops, attended: Tensor, residual: Tensor) -> Tensor:
        """Output projection and MLP of `attended` [N, Hq * D]; updates `residual` [N, hidden_size] in place and returns what is still to be added."""
        hidden = ops.add_rms_norm(self.output(attended), residual, self.post_norm, self.shape.eps)
        return self.down(ops.silu_mul(self.gate_up(hidden)))
