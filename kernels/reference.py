"""Every kernel in plain torch: the oracle of the others, and the fallback of a machine without a compiler.

Arithmetic is float32 inside each operation and rounded once at its end. Nothing synchronises with a CUDA device but attention over chunks and
sampling, which read sizes on the host; so on CUDA these kernels are for tests, not for graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as functional
from torch import Tensor

from appliance.kernels import kv_cache
from appliance.kernels import ops as k
from appliance.kernels.gguf_blocks import dequantize
from appliance.kernels.kv_cache import FP8, FP8_MAX
from appliance.kernels.reference_sampling import sample

_GATHER_ELEMENTS: Final = 1 << 26  # key elements that one batched decode gathers at most; beyond it the decodes go in groups


class DenseLinear:
    """x @ weight.T + bias. `weight` [out, in] may be shared with an embedding table."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def make_linear(
    parts: Sequence[k.WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
) -> tuple[k.Linear, int]:
    """See Ops.make_linear. Always dense: quantised parts widen to dtype; one dense part of that device and dtype is used as it is."""
    if quantization not in ("auto", "none"):
        raise ValueError(f"the plain-torch kernels know no {quantization} weights; use quantization auto or none")
    dense = [dequantize(part, dtype).to(device) if isinstance(part, k.GgufTensor) else part.to(device, dtype) for part in parts]
    weight = dense[0] if len(dense) == 1 else torch.cat(dense)
    bias = None if bias is None else bias.to(device, dtype)
    num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
    return DenseLinear(weight.contiguous(), bias), num_bytes


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[T, N]` as float8_e4m3fn and its scales `[T, 1]` float32: scale = max |x| / 448 of the row, out = x / scale."""
    wide = x.to(torch.float32)
    scales = (wide.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
    return (wide / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight.to(torch.float32)).to(x.dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding of float32 x [T, H, D] by cos_sin [T, W] (arXiv 2104.09864): the first W of D are turned, halves against each other."""
    width = cos_sin.shape[1]
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=2)
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def store_kv(values: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot] = values[t] for values [T, Hkv, D]; negative slots are left out without reading the mapping on the host."""
    if cache.dtype != FP8:
        _store(values.to(cache.dtype), cache, slot_mapping)
        return
    quantized, scales = kv_cache.quantize(values)
    _store(quantized.view(torch.uint8), cache.view(torch.uint8), slot_mapping)
    _store(scales, kv_cache.scales_of(cache), slot_mapping)


def _store(values: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[block, :, offset] = values[t], dtypes equal.

    A token without a slot repeats the write of the first one that has a slot; where none has, block 0's first slot is written with itself.
    """
    if not slot_mapping.numel():
        return
    valid = slot_mapping >= 0
    source = torch.where(valid, torch.arange(slot_mapping.shape[0], device=valid.device), valid.int().argmax())
    slots = slot_mapping.index_select(0, source).clamp(min=0)
    block_size = cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    cache[blocks, :, offsets] = torch.where(valid.any(), values.index_select(0, source), cache[:1, :, 0])


def decode_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: k.AttentionBatch, scale: float, sliding_window: int | None) -> Tensor:
    """Attention of the batch's decodes, q [num_decodes, Hq, D]; returns the same shape. One gather of all contexts, padded to the longest."""
    lens = batch.context_lens[: batch.num_decodes]
    longest = int(lens.max()) if lens.device.type == "cpu" else batch.max_context_len
    span = longest if sliding_window is None else min(longest, sliding_window)
    group = max(1, _GATHER_ELEMENTS // max(1, span * key_cache.shape[1] * key_cache.shape[3]))
    out = torch.empty_like(q)
    for start in range(0, batch.num_decodes, group):
        part = slice(start, min(start + group, batch.num_decodes))
        out[part] = _decode_group(q[part], key_cache, value_cache, batch.block_tables, batch.rows[part], lens[part], span, scale, sliding_window)
    return out


def _decode_group(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    lens: Tensor,
    span: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    num, num_heads, head_dim = q.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    lens = lens.long()
    oldest = torch.zeros_like(lens) if sliding_window is None else (lens - sliding_window).clamp(min=0)  # first visible position
    positions = oldest.unsqueeze(1) + torch.arange(max(1, span), device=q.device)
    visible = positions < lens.unsqueeze(1)
    # Past a context its last token is read again: memory that was never written may hold NaN, which no weight of 0 makes harmless.
    positions = torch.minimum(positions, (lens - 1).clamp(min=0).unsqueeze(1))
    blocks = block_tables[rows.long().unsqueeze(1), positions // block_size]
    keys, values = (_gather(cache, blocks.long(), positions % block_size) for cache in (key_cache, value_cache))
    grouped = q.to(torch.float32).reshape(num, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None], scale=scale)
    return torch.where(lens[:, None, None, None] > 0, out, 0.0).reshape(num, num_heads, head_dim).to(q.dtype)


def chunk_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_len: int, scale: float, sliding_window: int | None
) -> Tensor:
    """Attention of one sequence's chunk, q [L, Hq, D], whose tokens are the last L of its context; returns the same shape."""
    length, num_heads, _ = q.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    first = context_len - length
    oldest = 0 if sliding_window is None else max(0, first - sliding_window + 1)
    positions = torch.arange(oldest, context_len, device=q.device)
    blocks = block_table.index_select(0, positions // block_size).long()
    keys, values = (_gather(cache, blocks.unsqueeze(0), (positions % block_size).unsqueeze(0)) for cache in (key_cache, value_cache))
    mask = None
    if first > 0 or sliding_window is not None:
        query_positions = torch.arange(first, context_len, device=q.device).unsqueeze(1)
        mask = positions <= query_positions
        if sliding_window is not None:
            mask &= positions > query_positions - sliding_window
    out = functional.scaled_dot_product_attention(
        q.to(torch.float32).transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out.squeeze(0).transpose(0, 1).to(q.dtype)


def _gather(cache: Tensor, blocks: Tensor, offsets: Tensor) -> Tensor:
    """The tokens at `offsets` [N, L] of `blocks` [N, L] of one cache, as float32 [N, Hkv, L, D]: one copy, in the order that attention reads."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    heads = torch.arange(num_kv_heads, device=cache.device).unsqueeze(1)
    if cache.dtype == FP8:
        where = blocks.unsqueeze(1), heads, offsets.unsqueeze(1)
        return kv_cache.dequantize(cache.view(torch.uint8)[where].view(FP8), kv_cache.scales_of(cache)[where])
    lines = (blocks.unsqueeze(1) * num_kv_heads + heads) * block_size + offsets.unsqueeze(1)
    return cache.view(-1, head_dim).index_select(0, lines.view(-1)).view(*lines.shape, head_dim).to(torch.float32)


class ReferenceOps:
    """The plain-torch implementation of `ops.Ops`."""

    name = "reference"

    def make_linear(
        self, parts: Sequence[k.WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
    ) -> tuple[k.Linear, int]:
        return make_linear(parts, bias, device=device, dtype=dtype, quantization=quantization)

    def make_decoder_stack(
        self, layers: Sequence[k.LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> k.DecoderStack | None:
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        return rms_norm(residual, weight, eps)

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
        num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, key, value = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        q, key = q.to(torch.float32), key.to(torch.float32)
        q = q if q_norm is None else rms_norm(q, q_norm, eps)
        key = key if k_norm is None else rms_norm(key, k_norm, eps)
        angles = cos_sin.index_select(0, batch.positions.long())
        store_kv(rotate(key, angles), key_cache, batch.slot_mapping)
        store_kv(value, value_cache, batch.slot_mapping)
        return rotate(q, angles).to(qkv.dtype)

    def attention(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: k.AttentionBatch, scale: float, sliding_window: int | None
    ) -> Tensor:
        out = torch.zeros_like(q)
        num_decodes = batch.num_decodes
        if num_decodes:
            out[:num_decodes] = decode_attention(q[:num_decodes], key_cache, value_cache, batch, scale, sliding_window)
        if num_decodes < batch.rows.shape[0]:
            starts = batch.query_start[num_decodes:].tolist()
            lens, rows = batch.context_lens[num_decodes:].tolist(), batch.rows[num_decodes:].tolist()
            for start, end, context_len, row in zip(starts, starts[1:], lens, rows, strict=False):
                if end > start and context_len:
                    out[start:end] = chunk_attention(
                        q[start:end], key_cache, value_cache, batch.block_tables[row], context_len, scale, sliding_window
                    )
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(gate_up.dtype)

    def prepare_inputs(self, state: k.RowState, step: k.StepInput, batch: k.AttentionBatch, block_size: int) -> None:
        num_decodes, num_tokens = step.num_decodes, batch.input_ids.shape[0]
        rows = step.rows.long()
        batch.rows.copy_(step.rows)
        ends = num_decodes + step.chunk_lens.cumsum(0)
        batch.query_start[: num_decodes + 1] = torch.arange(num_decodes + 1, device=rows.device)
        batch.query_start[num_decodes + 1 :] = ends
        decode_params = state.params.index_select(0, rows[:num_decodes])
        batch.context_lens[:num_decodes] = decode_params[:, k.NUM_TOKENS]
        batch.context_lens[num_decodes:] = torch.where(step.chunk_lens > 0, step.chunk_starts + step.chunk_lens, 0)
        batch.logit_index.copy_(torch.where(batch.context_lens > 0, batch.query_start[1:] - 1, 0))

        tokens = torch.arange(num_decodes, num_tokens, device=rows.device)
        chunk = torch.searchsorted(ends, tokens, right=True) if ends.numel() else tokens
        owned = chunk < ends.shape[0]
        chunk = chunk.clamp(max=max(0, ends.shape[0] - 1))
        entries = torch.cat((torch.arange(num_decodes, device=rows.device), num_decodes + chunk))
        behind = torch.cat((torch.ones_like(rows[:num_decodes]), (ends[chunk] - tokens) if ends.numel() else tokens))  # tokens from here to the end
        valid = torch.cat((batch.context_lens[:num_decodes] > 0, owned))
        positions = torch.where(valid, batch.context_lens.index_select(0, entries) - behind, 0)
        ids = torch.cat((decode_params[:, k.LAST_ID], step.chunk_ids))
        blocks = state.block_tables[rows.index_select(0, entries), positions // block_size].long()
        batch.input_ids.copy_(torch.where(valid, ids, 0))
        batch.positions.copy_(positions)
        batch.slot_mapping.copy_(torch.where(valid, blocks * block_size + positions % block_size, -1))

    def apply_updates(self, state: k.RowState, rows: Tensor, params: Tensor, blocks: Tensor) -> None:
        state.params[rows.long()] = params
        row, index, block = blocks.unbind(1)
        state.block_tables[row.long(), index.long()] = block

    def take_updates(self, state: k.RowState, ring: Tensor, turn: Tensor, num_rows: int, num_blocks: int) -> None:
        slot = ring[int(turn) % ring.shape[0]].to(state.params.device)
        rows, params, blocks = slot.split((num_rows, num_rows * k.NUM_PARAMS, 3 * num_blocks))
        self.apply_updates(state, rows, params.view(-1, k.NUM_PARAMS), blocks.view(-1, 3))

    def give_ids(self, token_ids: Tensor, ring: Tensor, turn: Tensor) -> None:
        ring[int(turn) % ring.shape[0], : token_ids.shape[0]] = token_ids.to(ring.device)
        turn += 1

    def sample(self, logits: Tensor, batch: k.SamplingBatch) -> k.Sampled:
        return sample(logits, batch)

    def commit_sampled(self, state: k.RowState, step: k.StepInput, batch: k.AttentionBatch, token_ids: Tensor) -> None:
        rows, counts = step.rows.long(), step.samples
        params = state.params.index_select(0, rows)
        drawn = counts > 0
        params[:, k.LAST_ID] = torch.where(drawn, token_ids, params[:, k.LAST_ID])
        params[:, k.NUM_TOKENS] = torch.where(drawn, batch.context_lens + 1, params[:, k.NUM_TOKENS])
        params[:, k.OUTPUT_INDEX] += counts
        state.params[rows] = params
        if state.output_counts is not None:
            state.output_counts.index_put_((rows, token_ids.long()), counts.to(state.output_counts.dtype), accumulate=True)
