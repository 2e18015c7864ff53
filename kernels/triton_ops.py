"""The operations of `ops.Ops` on an NVIDIA GPU through Triton and cuBLAS; the same kernels on CPU tensors under TRITON_INTERPRET=1.

Every method can be captured in a CUDA graph once it has run eagerly in the same shape (which compiles its kernels): none reads the device, and
the sizes that vary between replays come from device memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from appliance.kernels import fused_stack, host_ring, linear, ops, paged_decode, paged_prefill, rms_norm, rope_kv, sampling, silu_mul, step_input


class TritonOps:
    """The Triton implementation of `ops.Ops`. Stateless: what the kernels keep (arrival counters) belongs to the device."""

    name = "triton"

    def make_linear(
        self, parts: Sequence[ops.WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
    ) -> tuple[ops.Linear, int]:
        return linear.make_linear(parts, bias, device=device, dtype=dtype, quantization=quantization)

    def make_decoder_stack(
        self, layers: Sequence[ops.LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> ops.DecoderStack | None:
        if not fused_stack.can_stack(layers):
            return None
        return fused_stack.FusedStack(self, layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, eps=eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm.rms_norm(x, weight, eps, residual)

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: ops.AttentionBatch,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        return rope_kv.rope_store_kv(qkv, cos_sin, key_cache, value_cache, batch, q_norm, k_norm, eps)

    def attention(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: ops.AttentionBatch, scale: float, sliding_window: int | None
    ) -> Tensor:
        # Tokens that no entry owns get zeros, not what the allocation held: nothing downstream may meet a NaN. They exist in mixed steps only.
        make = torch.zeros_like if batch.num_decodes < q.shape[0] else torch.empty_like
        out = make(q).flatten(1)
        paged_decode.paged_decode(q, key_cache, value_cache, batch, scale, sliding_window, out)
        paged_prefill.paged_prefill(q, key_cache, value_cache, batch, scale, sliding_window, out)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul.silu_mul(gate_up)

    def prepare_inputs(self, state: ops.RowState, step: ops.StepInput, batch: ops.AttentionBatch, block_size: int) -> None:
        step_input.prepare_inputs(state, step, batch, block_size)

    def apply_updates(self, state: ops.RowState, rows: Tensor, params: Tensor, blocks: Tensor) -> None:
        step_input.apply_updates(state, rows, params, blocks)

    def take_updates(self, state: ops.RowState, ring: Tensor, turn: Tensor, num_rows: int, num_blocks: int) -> None:
        host_ring.take_updates(state, ring, turn, num_rows, num_blocks)

    def give_ids(self, token_ids: Tensor, ring: Tensor, turn: Tensor) -> None:
        host_ring.give_ids(token_ids, ring, turn)

    def sample(self, logits: Tensor, batch: ops.SamplingBatch) -> ops.Sampled:
        return sampling.sample(logits, batch)

    def commit_sampled(self, state: ops.RowState, step: ops.StepInput, batch: ops.AttentionBatch, token_ids: Tensor) -> None:
        step_input.commit_sampled(state, step, batch, token_ids)
