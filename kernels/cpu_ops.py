"""The CPU's kernels: C++ over torch's memory, called through ctypes; plain torch where no path is hot."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from appliance.kernels import ops as k
from appliance.kernels import reference
from appliance.kernels.cpu.build import BuildError, built_library, load_library
from appliance.kernels.cpu.calibration import Calibrator
from appliance.kernels.cpu.library import (
    DTYPES,
    AttentionShape,
    BatchShape,
    DrawShape,
    RopeShape,
    RowsShape,
    StepShape,
    address,
    declare,
)
from appliance.kernels.cpu.linear import CopyBudget, CopyLimit, DenseCopy, PackedLinear, can_pack, dense_weight, pack
from appliance.kernels.cpu.stack import DecoderStack, can_stack

log = logging.getLogger(__name__)

_MAX_HEAD: Final = 512
_INT4_KINDS: Final = ("Q4_0", "Q4_1", "Q4_K")


def built_cpu_ops(copy_bytes: CopyLimit = 0) -> CpuOps | None:
    """The C++ kernels if they are compiled already. Raises BuildError where they cannot be."""
    library = built_library()
    return None if library is None else CpuOps(library, copy_bytes)


def try_cpu_ops(copy_bytes: CopyLimit = 0, *, in_background: bool = False) -> CpuOps | None:
    """The C++ kernels, compiled if need be (some 10 s, once per CPU, compiler and version); None, with the reason logged, where that fails.

    copy_bytes bounds the dense copies of weights. in_background: compile at the lowest priority.
    """
    try:
        return CpuOps(load_library(in_background=in_background), copy_bytes)
    except BuildError as error:
        log.warning("plain torch instead of the C++ kernels (several times slower): %s", error)
        return None


class CpuOps(reference.ReferenceOps):
    """Ops on a CPU. float32 and bfloat16 have kernels; another dtype, or a head size that is no multiple of 16, goes to plain torch.

    Threads are torch's: the same OpenMP pool, as many as `torch.get_num_threads()`.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL, copy_bytes: CopyLimit = 0) -> None:
        self._library = declare(library)
        self._budget = CopyBudget(copy_bytes)
        self.calibrator = Calibrator(self._library)
        self._floats: dict[int, tuple[Tensor, Tensor]] = {}

    def make_linear(
        self, parts: Sequence[k.WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
    ) -> tuple[k.Linear, int]:
        if quantization not in ("auto", "none", "int8", "int4"):
            raise ValueError(f"the CPU kernels know no {quantization} weights; use quantization auto, none, int8 or int4")
        packed_kinds = all(isinstance(part, k.GgufTensor) for part in parts) if quantization == "auto" else quantization in ("int8", "int4")
        if not packed_kinds or not can_pack(parts) or dtype not in DTYPES:
            return super().make_linear(parts, bias, device=device, dtype=dtype, quantization="none" if quantization == "none" else "auto")
        packed = [pack(self._library, part, quantization) for part in parts]
        layer = PackedLinear(self._library, packed, int(parts[0].shape[1]), bias, self._dense_copy(parts, bias, quantization))
        return layer, layer.num_bytes

    def _dense_copy(self, parts: Sequence[k.WeightSource], bias: Tensor | None, quantization: str) -> DenseCopy | None:
        four_bits = quantization == "int4" or all(isinstance(part, k.GgufTensor) and part.kind in _INT4_KINDS for part in parts)
        min_tokens = self.calibrator.min_dense_tokens("int4" if four_bits else "int8")
        num_bytes = 2 * sum(int(part.shape[0]) * int(part.shape[1]) for part in parts)
        if min_tokens is None or not self._budget.take(num_bytes):
            return None
        return DenseCopy(dense_weight(parts, torch.bfloat16), None if bias is None else bias.to(torch.bfloat16), min_tokens)

    def make_decoder_stack(
        self, layers: Sequence[k.LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, scale: float | None = None
    ) -> DecoderStack | None:
        """All layers as one call, or None where some projection is not packed. scale: of the scores, default head_dim ** -0.5."""
        if not can_stack(layers, num_heads, num_kv_heads, head_dim):
            return None
        scale = head_dim**-0.5 if scale is None else scale
        return DecoderStack(self._library, layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, eps=eps, scale=scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype not in DTYPES:
            return super().rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._library.cpu_rms_norm(
            x.data_ptr(), self._float(weight).data_ptr(), out.data_ptr(), x.numel() // width, width, eps, DTYPES[x.dtype], torch.get_num_threads()
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype not in DTYPES or residual.dtype != x.dtype:
            return super().add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._library.cpu_add_rms_norm(
            x.data_ptr(), residual.data_ptr(), self._float(weight).data_ptr(), out.data_ptr(),
            x.numel() // width, width, eps, DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype not in DTYPES:
            return super().silu_mul(gate_up)
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, width, dtype=gate_up.dtype)
        self._library.cpu_silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, width, DTYPES[gate_up.dtype], torch.get_num_threads())
        return out

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: k.AttentionBatch,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        _, num_kv_heads, block_size, head_dim = key_cache.shape
        if qkv.dtype not in DTYPES or key_cache.dtype not in DTYPES or head_dim > _MAX_HEAD:
            return super().rope_store_kv(qkv, cos_sin, key_cache, value_cache, batch, q_norm, k_norm, eps)
        num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads
        q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
        shape = RopeShape(
            cos_sin.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(),
            address(None if q_norm is None else self._float(q_norm)), address(None if k_norm is None else self._float(k_norm)),
            num_tokens, num_heads, num_kv_heads, head_dim, cos_sin.shape[1], block_size, DTYPES[key_cache.dtype], eps,
        )  # fmt: skip
        self._library.cpu_rope_store_kv(
            ctypes.addressof(shape),
            qkv.data_ptr(),
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            DTYPES[qkv.dtype],
            torch.get_num_threads(),
        )
        return q

    def attention(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: k.AttentionBatch, scale: float, sliding_window: int | None
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        if q.dtype not in DTYPES or key_cache.dtype not in DTYPES or head_dim % 16:
            return super().attention(q, key_cache, value_cache, batch, scale, sliding_window)
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype)
        shape = AttentionShape(
            batch.query_start.data_ptr(), batch.context_lens.data_ptr(), batch.rows.data_ptr(), batch.block_tables.data_ptr(),
            batch.block_tables.shape[1], batch.rows.shape[0], num_tokens, num_heads, key_cache.shape[1], head_dim, key_cache.shape[2],
            sliding_window or 0, DTYPES[key_cache.dtype], scale, 0,
        )  # fmt: skip
        self._library.cpu_attention(
            ctypes.addressof(shape),
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            DTYPES[q.dtype],
            torch.get_num_threads(),
        )
        return out

    def sample(self, logits: Tensor, batch: k.SamplingBatch) -> k.Sampled:
        """See Ops.sample; the usual case, greedy or temperature alone, is one C++ call."""
        filtered = not batch.all_greedy and (batch.use_top_k or batch.use_top_p or batch.use_min_p)
        if filtered or batch.use_penalties or batch.bias_ids is not None or batch.num_logprobs is not None or logits.dtype not in DTYPES:
            return super().sample(logits, batch)
        num_rows, vocab = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int32)
        shape = DrawShape(
            batch.rows.data_ptr(),
            batch.state.params.data_ptr(),
            vocab,
            num_rows,
            k.NUM_PARAMS,
            k.SEED_LOW,
            k.SEED_HIGH,
            k.OUTPUT_INDEX,
            k.TEMPERATURE,
        )
        logits = logits.contiguous()
        self._library.cpu_draw(ctypes.addressof(shape), logits.data_ptr(), token_ids.data_ptr(), DTYPES[logits.dtype], torch.get_num_threads())
        return k.Sampled(token_ids)

    def prepare_inputs(self, state: k.RowState, step: k.StepInput, batch: k.AttentionBatch, block_size: int) -> None:
        rows = _rows_shape(state)
        shape = _step_shape(step, batch, block_size)
        target = BatchShape(
            batch.input_ids.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(), batch.query_start.data_ptr(),
            batch.context_lens.data_ptr(), batch.rows.data_ptr(), batch.logit_index.data_ptr(),
        )  # fmt: skip
        self._library.cpu_prepare_inputs(ctypes.addressof(rows), ctypes.addressof(shape), ctypes.addressof(target))

    def apply_updates(self, state: k.RowState, rows: Tensor, params: Tensor, blocks: Tensor) -> None:
        shape = _rows_shape(state)
        self._library.cpu_apply_updates(
            ctypes.addressof(shape), rows.data_ptr(), params.data_ptr(), rows.shape[0], blocks.contiguous().data_ptr(), blocks.shape[0]
        )

    def commit_sampled(self, state: k.RowState, step: k.StepInput, batch: k.AttentionBatch, token_ids: Tensor) -> None:
        rows = _rows_shape(state)
        shape = _step_shape(step, batch, 1)
        counts = state.output_counts
        self._library.cpu_commit_sampled(
            ctypes.addressof(rows), ctypes.addressof(shape), batch.context_lens.data_ptr(), token_ids.data_ptr(),
            address(counts), 0 if counts is None else counts.shape[1],
        )  # fmt: skip

    def _float(self, weight: Tensor) -> Tensor:
        """A norm's weight in float32, converted once."""
        if weight.dtype == torch.float32:
            return weight
        known = self._floats.get(weight.data_ptr())
        if known is None or known[0] is not weight:
            known = self._floats[weight.data_ptr()] = (weight, weight.to(torch.float32))
        return known[1]


def _rows_shape(state: k.RowState) -> RowsShape:
    return RowsShape(
        state.params.data_ptr(), state.block_tables.data_ptr(), state.block_tables.shape[1], k.NUM_PARAMS, k.LAST_ID, k.NUM_TOKENS, k.OUTPUT_INDEX
    )


def _step_shape(step: k.StepInput, batch: k.AttentionBatch, block_size: int) -> StepShape:
    return StepShape(
        step.rows.data_ptr(), step.samples.data_ptr(), step.chunk_starts.data_ptr(), step.chunk_lens.data_ptr(), step.chunk_ids.data_ptr(),
        step.rows.shape[0], step.num_decodes, batch.input_ids.shape[0], block_size,
    )  # fmt: skip
