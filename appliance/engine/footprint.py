"""What a model takes of its device's memory, told from its configuration and its file's header: nothing is read or allocated.

`appliance plan` prints it, the engine refuses a start by it before it reads a weight, and then takes measured figures in place of what it can
measure; both divide the memory with `sizing.choose`, so what the plan says is what the engine does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.engine.wire import Start
from appliance.errors import ModelError
from appliance.model.config import ModelConfig, load_config

MIB: Final = 1 << 20
# Measured on Hopper with torch 2.11 would be better than estimated: benchmarks/memory_plan.py prints these beside what the card says.
CUDA_RUNTIME_BYTES: Final = 560 * MIB  # the driver's context with torch's, Triton's and cuBLAS' code
CUBLAS_WORKSPACE_BYTES: Final = 3 * 32 * MIB  # 32 MiB a stream on Hopper: steps, captures, and cublasLt's own
GRAPH_NODE_BYTES: Final = 6 << 10  # device memory of a captured launch
GRAPH_POOL_SLACK: Final = 1.3  # the capture pool's blocks are not those of one step, but of many shapes
LAUNCHES_OF_A_LAYER: Final = 10
_PAGES: Final = 8 * MIB  # rounding of the allocator in a step
# Bits a weight in the C++ kernels' packing of each GGUF kind; every other kind becomes int8 (kernels/cpu/linear.h).
_CPU_BITS: Final = {"Q4_0": 4.5, "Q4_1": 5.0, "Q4_K": 5.0, "int4": 5.0}
_CPU_INT8_BITS: Final = 8.5


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as far as its config and headers tell. `kinds` are a GGUF file's tensor kinds by the file's own names; empty for other files."""

    config: ModelConfig
    kinds: Mapping[str, str] = field(default_factory=dict)
    file_bytes: int = 0  # 0 for random weights


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes of the device's memory, all but the KV blocks."""

    weights: int
    runtime: int  # context, code, library workspaces
    buffers: int  # batch state, logits, the counts that penalties need
    activations: int  # peak of the largest step
    graphs: int
    kv_block: int  # of one block, keys and values of all layers

    @property
    def reserve(self) -> int:
        """What must stay free of KV blocks once the weights are loaded."""
        return self.buffers + self.activations + self.graphs


def read_facts(path: str) -> ModelFacts:
    """Of a `Start.model_path`. Reads config.json and file sizes, or a GGUF header. Raises ModelError."""
    if path.startswith("dummy:"):
        return ModelFacts(load_config(Path(path.removeprefix("dummy:"))))
    file = Path(path)
    if file.is_dir():
        return ModelFacts(load_config(file), file_bytes=sum(part.stat().st_size for part in file.glob("*.safetensors")))
    from appliance.model.config import parse_gguf_config
    from appliance.model.gguf_file import read_gguf_header

    header = read_gguf_header(file)
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{file}: there is no tensor token_embd.weight")
    vocab_size = header.tensors["token_embd.weight"].shape[0]
    config = parse_gguf_config(header.metadata, header.tensors.keys(), vocab_size, str(file))
    return ModelFacts(config, {name: info.kind for name, info in header.tensors.items()}, file.stat().st_size)


def predict(facts: ModelFacts, start: Start, *, is_cuda: bool, dtype_bytes: int, kv_block_bytes: int, limits: tuple[int, int, int]) -> Demand:
    """The demand of `facts` run as `start` says. limits: sequences, tokens and chunks of a step, as `sizing.step_limits` has them."""
    seqs, tokens, chunks = limits
    weights = weight_bytes(facts, is_cuda=is_cuda, dtype_bytes=dtype_bytes, quantization=start.quantization)
    if not is_cuda:
        return Demand(weights, 0, 0, 0, 0, kv_block_bytes)
    config = facts.config
    entries, buffer_tokens = seqs + chunks, tokens + (seqs if start.cuda_graphs else 0)
    activations = activation_bytes(config, dtype_bytes, tokens, entries, fp8=start.quantization == "fp8")
    graphs = 0
    if start.cuda_graphs:
        from appliance.engine.cuda_graphs import MAX_GRAPHS

        step = activation_bytes(config, dtype_bytes, buffer_tokens, 0, fp8=start.quantization == "fp8")
        graphs = round(step * GRAPH_POOL_SLACK) + MAX_GRAPHS * (LAUNCHES_OF_A_LAYER * config.num_layers + 20) * GRAPH_NODE_BYTES
    context = min(start.context_length or config.max_positions, config.max_positions)
    buffers = (
        4 * (seqs + 1) * (-(-context // start.block_size) + 16)  # block tables and row parameters
        + 40 * (buffer_tokens + entries)  # a step's ids, positions and slots
        + 5 * (seqs + 1) * config.vocab_size  # prompt mask and output counts, from the first request with penalties on
        + (entries * config.vocab_size * dtype_bytes if start.cuda_graphs else 0)  # where all graphs leave their logits
    )
    return Demand(weights, CUDA_RUNTIME_BYTES + CUBLAS_WORKSPACE_BYTES, buffers, activations, graphs, kv_block_bytes)


def weight_bytes(facts: ModelFacts, *, is_cuda: bool, dtype_bytes: int, quantization: str) -> int:
    """What the loaded weights hold, the rotary table included: `Decoder.weight_bytes` before there is a decoder.

    On a CPU without the dense copies that the calibration may add to packed weights.
    """
    config = facts.config
    hidden, norms = config.hidden_size, 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    total = dtype_bytes * (norms * config.num_layers + hidden) + 4 * config.max_positions * config.rope.width
    for projection in _projections(config):
        total += _projection_bytes(projection, facts, is_cuda=is_cuda, dtype_bytes=dtype_bytes, quantization=quantization)
    table_kind = facts.kinds.get("token_embd.weight")
    table, table_is_packed = _stored_bytes(config.vocab_size, hidden, table_kind, dtype_bytes)
    total += table
    if config.tie_word_embeddings:
        head = _Projection("token_embd", ("token_embd",), (config.vocab_size,), hidden, has_bias=False, is_head=True)
        head_bytes = _projection_bytes(head, facts, is_cuda=is_cuda, dtype_bytes=dtype_bytes, quantization=quantization)
        shared = head_bytes == table and not table_is_packed
        total += 0 if shared else head_bytes
    return total


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model, tied embeddings once."""
    hidden, norms = config.hidden_size, 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    matrices = sum(sum(p.rows) * (p.columns + p.has_bias) for p in _projections(config))
    return matrices + norms * config.num_layers + hidden + config.vocab_size * hidden


def activation_bytes(config: ModelConfig, dtype_bytes: int, num_tokens: int, num_entries: int, *, fp8: bool) -> int:
    """Peak of a step beyond what the engine holds: the MLP of a layer over all tokens, or the logits of its entries with penalties applied.

    In the MLP live the residual stream, two normed copies, the last layer's output, attention's output, gate and up, and their product; fp8
    weights add the quantised product.
    """
    hidden, inner, query = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    mlp = num_tokens * (dtype_bytes * (4 * hidden + query + 3 * inner) + (inner if fp8 else 0))
    logits = num_entries * config.vocab_size * (dtype_bytes + 4)
    return max(mlp, logits) + _PAGES


@dataclass(frozen=True, slots=True)
class _Projection:
    """One packed linear layer: GGUF names and rows of its parts."""

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    has_bias: bool
    is_head: bool = False


def _projections(config: ModelConfig) -> Iterator[_Projection]:
    query, key, hidden, inner = config.num_heads * config.head_dim, config.kv_heads_size, config.hidden_size, config.intermediate_size
    for layer in range(config.num_layers):
        base = f"blk.{layer}"
        yield _Projection("qkv", (f"{base}.attn_q", f"{base}.attn_k", f"{base}.attn_v"), (query, key, key), hidden, config.qkv_bias)
        yield _Projection("output", (f"{base}.attn_output",), (hidden,), query, config.output_bias)
        yield _Projection("gate_up", (f"{base}.ffn_gate", f"{base}.ffn_up"), (inner, inner), hidden, config.mlp_bias)
        yield _Projection("down", (f"{base}.ffn_down",), (hidden,), inner, config.mlp_bias)
    if not config.tie_word_embeddings:
        yield _Projection("lm_head", ("output",), (config.vocab_size,), hidden, has_bias=False, is_head=True)


def _projection_bytes(projection: _Projection, facts: ModelFacts, *, is_cuda: bool, dtype_bytes: int, quantization: str) -> int:
    rows, columns = sum(projection.rows), projection.columns
    if is_cuda or quantization == "none":
        if quantization == "fp8" and not projection.is_head:
            return rows * columns + 4 * rows + (dtype_bytes * rows if projection.has_bias else 0)
        return dtype_bytes * rows * (columns + projection.has_bias)
    kinds = [facts.kinds.get(f"{part}.weight", "F32") for part in projection.parts]
    packed = quantization in ("int8", "int4") or all(_is_block(kind) for kind in kinds)
    if not packed or columns % 32:
        return dtype_bytes * rows * (columns + projection.has_bias)
    total = 24 * (-(-rows // 16)) + (4 * rows if projection.has_bias else 0)  # a table of tiles, biases in float32
    for kind, part_rows in zip(kinds, projection.rows, strict=True):
        bits = _CPU_BITS.get(kind if _is_block(kind) else quantization, _CPU_INT8_BITS)
        total += round(-(-part_rows // 16) * 16 * columns * bits / 8)
    return total


def _stored_bytes(rows: int, columns: int, kind: str | None, dtype_bytes: int) -> tuple[int, bool]:
    """Of an embedding table, which keeps a file's blocks, and whether it does."""
    if kind is None or not _is_block(kind):
        return rows * columns * dtype_bytes, False
    from appliance.kernels.gguf_blocks import row_bytes

    return rows * row_bytes(kind, columns), True


def _is_block(kind: str) -> bool:
    return kind.startswith("Q")
