"""The operations a decoder needs from a device, as one protocol with three implementations.

`reference.py` (plain torch, the oracle), `triton_ops.py` (NVIDIA GPUs; also under TRITON_INTERPRET=1) and `cpu_ops.py` (C++ extension).
Letters, everywhere: T tokens of a step, B batch entries (sequences) of a step, Hq query heads, Hkv key-value heads, D head size, R row slots.
KV cache of one layer: key and value, each `[num_blocks, Hkv, block_size, D]`.

A step's batch comes decodes first, then prefill chunks: entries [0, num_decodes) have exactly one token each, so entry i is token i; the rest are
chunks laid one after another. A CUDA graph replays a step in a bucket: unused decode entries name the dummy row (the last row slot, whose
num_tokens is 0) and get context length 0, position 0 and slot -1; unused prefill entries get query length 0 and context length 0; unused tokens
get slot -1. Kernels take sizes that vary between replays from device memory; the host ints of a batch are upper bounds that size grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

# Columns of RowState.params (int32; those marked f are float32 bits).
LAST_ID: Final = 0  # id of the newest token, not yet in the KV cache
NUM_TOKENS: Final = 1  # tokens of the sequence, the newest included
OUTPUT_INDEX: Final = 2  # index among the outputs of the next token to be sampled
SEED_LOW: Final = 3
SEED_HIGH: Final = 4
TEMPERATURE: Final = 5  # f; 0 is greedy
TOP_K: Final = 6  # 0 is off
TOP_P: Final = 7  # f
MIN_P: Final = 8  # f
REPETITION_PENALTY: Final = 9  # f
PRESENCE_PENALTY: Final = 10  # f
FREQUENCY_PENALTY: Final = 11  # f
NUM_PARAMS: Final = 16


@dataclass(slots=True)
class RowState:
    """What the device knows of each running sequence, one row slot each; the last slot is the dummy for padding. Lives as long as the engine.

    Mutated by `apply_updates` (host diffs) and `commit_sampled` (each step), in stream order.
    """

    params: Tensor  # [R, NUM_PARAMS] int32
    block_tables: Tensor  # [R, max_blocks] int32; entries past the context are arbitrary but valid block ids
    prompt_mask: Tensor | None = None  # [R, vocab] bool: id occurs in the prompt; allocated at the first request with penalties
    output_counts: Tensor | None = None  # [R, vocab] int32: times the id was output; likewise

    def ints(self, column: int) -> Tensor:
        """A strided [R] int32 view of one column."""
        return self.params[:, column]

    def floats(self, column: int) -> Tensor:
        """A strided [R] float32 view of one column."""
        return self.params.view(torch.float32)[:, column]


@dataclass(slots=True)
class StepInput:
    """What the host says of one step. Device tensors of fixed address (graphs replay over them); lengths are those of the bucket."""

    rows: Tensor  # [B] int32 row slot of each entry; the dummy for padding
    samples: Tensor  # [B] int32: 1 where the entry's sampled token counts (decodes and final chunks), else 0
    chunk_starts: Tensor  # [B - num_decodes] int32: tokens of the sequence before this chunk
    chunk_lens: Tensor  # [B - num_decodes] int32, 0 for padding
    chunk_ids: Tensor  # [T - num_decodes] int32: token ids of the chunks, one after another
    num_decodes: int


@dataclass(slots=True)
class AttentionBatch:
    """Where the tokens of one step lie; filled by `prepare_inputs`. Entry i owns query tokens `query_start[i]:query_start[i + 1]`, which are the
    last of its `context_lens[i]` tokens (this step's included). Token t goes to flat slot `slot_mapping[t]` = block * block_size + offset; a
    negative slot is not stored.
    """

    input_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slot_mapping: Tensor  # [T] int64
    query_start: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32
    rows: Tensor  # [B] int32: row of `block_tables`
    block_tables: Tensor  # [R, max_blocks] int32
    logit_index: Tensor  # [B] int64: the last token of each entry (0 for padding): the hidden states that reach the output head
    num_decodes: int
    max_query_len: int  # upper bound
    max_context_len: int  # upper bound


@dataclass(slots=True)
class SamplingBatch:
    """How the B rows of logits are sampled. The flags are host knowledge: a False (or None) feature costs nothing."""

    rows: Tensor  # [B] int32: row of `state` for each row of logits
    state: RowState
    all_greedy: bool = False
    use_top_k: bool = False
    use_top_p: bool = False
    use_min_p: bool = False
    use_penalties: bool = False  # then state.prompt_mask and state.output_counts exist
    bias_entries: Tensor | None = None  # [N] int64: entry of each logit-bias triple
    bias_ids: Tensor | None = None  # [N] int64
    bias_values: Tensor | None = None  # [N] float32; -inf forbids the id
    num_logprobs: int | None = None  # None: no logprobs; else how many top ones to return


@dataclass(slots=True)
class Sampled:
    """What was drawn for B rows, on the device."""

    token_ids: Tensor  # [B] int32
    logprobs: Tensor | None = None  # [B] float32: log-probability of the drawn id, after penalties and bias, before temperature and filters
    ranks: Tensor | None = None  # [B] int32: 1 + how many ids had a higher logit
    top_ids: Tensor | None = None  # [B, n] int32
    top_logprobs: Tensor | None = None  # [B, n] float32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A quantised weight as it lies in a GGUF file: rows of blocks."""

    kind: str  # "Q4_0", "Q4_1", "Q8_0", "Q6_K", ...
    shape: tuple[int, int]  # (out_features, in_features)
    data: Tensor  # [out_features, bytes_per_row] uint8, usually memory-mapped


WeightSource = Tensor | GgufTensor
Linear = Callable[[Tensor], Tensor]  # x [T, in] -> [T, out] of x.dtype


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer: pre-norm attention and gated SiLU MLP, both added to the residual stream. H hidden size, I inner size of the MLP."""

    attention_norm: Tensor  # [H]
    qkv: Linear  # [H -> (Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D], where q and k are normed per head
    k_norm: Tensor | None
    output: Linear  # [Hq D -> H]
    mlp_norm: Tensor  # [H]
    gate_up: Linear  # [H -> 2 I], gate first
    down: Linear  # [I -> H]
    sliding_window: int | None = None


class DecoderStack(Protocol):
    """All layers of a model fused for small steps, where launches and passes over activations cost more than arithmetic."""

    def accepts(self, num_tokens: int) -> bool:
        """Whether a step of this many tokens is faster here than layer by layer."""

    def __call__(self, hidden: Tensor, cos_sin: Tensor, kv_caches: Sequence[tuple[Tensor, Tensor]], batch: AttentionBatch) -> Tensor:
        """The residual stream after the last layer, `[T, H]`, from the embeddings `hidden` (which it may overwrite). Writes this step's K and V."""


class Ops(Protocol):
    """One device's kernels. All outputs are new tensors unless said otherwise; inputs are contiguous."""

    name: str

    def make_linear(
        self, parts: Sequence[WeightSource], bias: Tensor | None, *, device: torch.device, dtype: torch.dtype, quantization: str
    ) -> tuple[Linear, int]:
        """Pack `parts` (stacked along out_features: fused QKV, gate-up) for this device; returns the callable and the bytes it holds.

        quantization: "auto" keeps a GgufTensor's precision where the device has a kernel for it and dtype otherwise; "none" widens to
        dtype; "int8", "int4", "fp8" quantise dense weights. Raises ValueError where this device has no such kernel.
        """

    def make_decoder_stack(
        self, layers: Sequence[LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> DecoderStack | None:
        """The layers fused for small steps; None where this device has nothing better than layer by layer for such weights."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to x.dtype. x [T, N]."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (rounded to its dtype), then rms_norm of it. [T, N] each."""

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Per-head norm of q and k (where weights are given), rotary embedding of both, K and V written into the cache; returns q.

        qkv `[T, (Hq + 2 Hkv) * D]`; cos_sin `[max_position, W]` float32 where W <= D is the rotary width: cos in the first half, sin in the
        second, rotate-half convention (NeoX). Returns `[T, Hq, D]`.
        """

    def attention(self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None) -> Tensor:
        """Causal attention of q `[T, Hq, D]` over the paged cache (in which this step's K and V already are). Returns `[T, Hq * D]`.

        With a sliding window w, a query at position p sees keys at positions > p - w. Entries of context length 0 give zeros.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up `[T, 2 * I]` (gate first). Returns `[T, I]`."""

    def prepare_inputs(self, state: RowState, step: StepInput, batch: AttentionBatch, block_size: int) -> None:
        """Fill `batch` in place from the rows and the step. Decode entry i: id LAST_ID, position NUM_TOKENS - 1, context NUM_TOKENS."""

    def apply_updates(self, state: RowState, rows: Tensor, params: Tensor, blocks: Tensor) -> None:
        """Host diffs: `state.params[rows[i]] = params[i]` (rows [N] int32, params [N, NUM_PARAMS] int32), then for each (row, index, block) of
        `blocks` [M, 3] int32 `state.block_tables[row, index] = block`. N or M may be 0."""

    def take_updates(self, state: RowState, ring: Tensor, turn: Tensor, num_rows: int, num_blocks: int) -> None:
        """`apply_updates` of what the host left in slot `turn % R` of `ring` [R, num_rows * (1 + NUM_PARAMS) + 3 * num_blocks] int32, pinned.

        A slot holds row ids, their parameters, then (row, index, block) triples; unused places name the dummy row. `turn` [1] int32 is on the device,
        R a power of two.
        """

    def give_ids(self, token_ids: Tensor, ring: Tensor, turn: Tensor) -> None:
        """Write `token_ids` [B] int32 into slot `turn % R` of `ring` [R, >= B] int32, pinned, and count the turn."""

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """Penalties, bias, temperature, top-k, top-p, min-p, then argmax of logits + Gumbel noise. logits `[B, vocab]` float32 or bf16.

        Order and definitions are those of `reference.sample`. The noise of row r at id v is `philox.gumbel_noise`: a word of Philox4x32-10 that
        v, SEED_LOW, SEED_HIGH and OUTPUT_INDEX choose, so it depends on nothing else: not on the batch, not on the device.
        """

    def commit_sampled(self, state: RowState, step: StepInput, batch: AttentionBatch, token_ids: Tensor) -> None:
        """Where `step.samples` is 1: LAST_ID = token, NUM_TOKENS = context_lens + 1, OUTPUT_INDEX += 1, output_counts (if any) += 1."""


def select(device: torch.device, name: str = "auto") -> Ops:
    """The kernels for `device`: Triton on CUDA, the C++ extension on a CPU that can build it, else plain torch. `name` overrides."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name == "triton":
        from appliance.kernels.triton_ops import TritonOps

        return TritonOps()
    if name == "cpu":
        from appliance.kernels.cpu_ops import try_cpu_ops

        ops = try_cpu_ops()
        if ops is not None:
            return ops
    from appliance.kernels.reference import ReferenceOps

    return ReferenceOps()
