"""Context length, concurrency and the KV pool, chosen from the memory found; each with its reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from appliance.engine.wire import Start
from appliance.errors import ModelError

GIB = 1 << 30
CUDA_MAX_NUM_SEQS = 256
CPU_MAX_NUM_SEQS = 64
CUDA_STEP_TOKENS = 2048
CPU_STEP_TOKENS = 512
CUDA_MAX_CHUNKS = 16
CPU_MAX_CHUNKS = 8
_CPU_KV_SHARE = 0.25  # of what is free once the weights are loaded; pages are touched only as sequences fill them
_GRAPH_RESERVE_BYTES = 1 * GIB  # CUDA graphs, cuBLAS workspaces, allocator slack
_MIN_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the engine runs with."""

    context_length: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_chunks: int
    num_blocks: int
    reasons: tuple[str, ...]


def available_host_bytes() -> int:
    """Free host memory, the cgroup's limit included (systemd's MemoryMax, containers)."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(available, 0)


def step_limits(start: Start, device: torch.device) -> tuple[int, int, int]:
    """(max_num_seqs, max_num_batched_tokens, max_num_chunks), before memory is known."""
    is_cuda = device.type == "cuda"
    seqs = start.max_num_seqs or (CUDA_MAX_NUM_SEQS if is_cuda else CPU_MAX_NUM_SEQS)
    tokens = start.max_num_batched_tokens or max(CUDA_STEP_TOKENS if is_cuda else CPU_STEP_TOKENS, seqs)
    return seqs, max(tokens, seqs), CUDA_MAX_CHUNKS if is_cuda else CPU_MAX_CHUNKS


def choose(start: Start, device: torch.device, *, free_bytes: int, kv_block_bytes: int, model_context: int, activation_bytes: int) -> Sizes:
    """Divide `free_bytes` (measured after the weights were loaded). Raises ModelError where not even a short context fits."""
    seqs, tokens, chunks = step_limits(start, device)
    block_bytes = kv_block_bytes
    reasons = []
    if start.num_blocks is not None:
        num_blocks = start.num_blocks
        reasons.append(f"{num_blocks} KV blocks of {start.block_size} tokens, as configured")
    else:
        reserve = activation_bytes + (_GRAPH_RESERVE_BYTES if device.type == "cuda" and start.cuda_graphs else 0)
        share = start.memory_fraction if device.type == "cuda" else _CPU_KV_SHARE
        budget = max(int(free_bytes * share) - reserve, 0) if device.type == "cpu" else max(free_bytes - reserve, 0)
        num_blocks = budget // block_bytes
        wanted = -(-seqs * min(start.context_length or model_context, model_context) // start.block_size)
        kept = f"{free_bytes / GIB:.2f} GiB free, {reserve / GIB:.2f} GiB kept for activations and graphs"
        reasons.append(f"{num_blocks} KV blocks fit {budget / GIB:.2f} GiB ({kept})")
        if num_blocks > wanted:
            num_blocks = wanted
            reasons.append(f"{num_blocks} KV blocks suffice for {seqs} sequences of full length")
    capacity = num_blocks * start.block_size
    context = min(start.context_length or model_context, model_context)
    source = "as configured" if start.context_length and start.context_length <= model_context else "the model's own limit"
    if context > capacity:
        context = capacity
        source = f"all that {num_blocks} KV blocks hold for one sequence"
    if context < min(_MIN_CONTEXT, model_context, start.context_length or _MIN_CONTEXT):
        raise ModelError(
            f"only {capacity} tokens of KV cache fit ({free_bytes / GIB:.2f} GiB free, {block_bytes} bytes a block): "
            "free memory, take a smaller model or a stronger quantization"
        )
    reasons.append(f"context length {context}: {source}")
    seqs = min(seqs, num_blocks)
    reasons.append(f"{seqs} sequences at once, {tokens} tokens a step, {capacity} tokens of KV cache")
    return Sizes(context, seqs, max(tokens, seqs), chunks, num_blocks, tuple(reasons))
