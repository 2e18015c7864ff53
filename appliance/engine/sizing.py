"""Context length, concurrency and the KV pool, chosen from the memory found; each with its reason in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from appliance.engine.footprint import Demand
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
_MIN_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the engine runs with."""

    context_length: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_chunks: int
    num_blocks: int
    fitting_blocks: int  # that there was room for; num_blocks may be fewer, where no more are of use, or as many as configured
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


def step_limits(start: Start, *, is_cuda: bool) -> tuple[int, int, int]:
    """(max_num_seqs, max_num_batched_tokens, max_num_chunks), before memory is known."""
    seqs = start.max_num_seqs or (CUDA_MAX_NUM_SEQS if is_cuda else CPU_MAX_NUM_SEQS)
    tokens = start.max_num_batched_tokens or max(CUDA_STEP_TOKENS if is_cuda else CPU_STEP_TOKENS, seqs)
    return seqs, max(tokens, seqs), CUDA_MAX_CHUNKS if is_cuda else CPU_MAX_CHUNKS


def fitting_blocks(start: Start, *, is_cuda: bool, free_bytes: int, demand: Demand) -> int:
    """KV blocks that `free_bytes`, what is free once the weights are loaded, have room for beside the rest of the demand."""
    budget = free_bytes - demand.reserve if is_cuda else int(free_bytes * _CPU_KV_SHARE)
    return max(budget, 0) // demand.kv_block


def choose(start: Start, *, is_cuda: bool, free_bytes: int, demand: Demand, model_context: int) -> Sizes:
    """Divide `free_bytes` (after the weights were loaded). Raises ModelError where the context length asked for does not fit, or not even a short
    one does."""
    seqs, tokens, chunks = step_limits(start, is_cuda=is_cuda)
    fitting = fitting_blocks(start, is_cuda=is_cuda, free_bytes=free_bytes, demand=demand)
    wanted_context = min(start.context_length or model_context, model_context)
    reasons = []
    if start.num_blocks is not None:
        num_blocks = start.num_blocks
        reasons.append(f"{num_blocks} KV blocks of {start.block_size} tokens, as configured")
    else:
        num_blocks = fitting
        kept = f", {demand.reserve / GIB:.2f} GiB of it for activations, buffers and graphs" if is_cuda else ", a quarter of it for the cache"
        reasons.append(f"{num_blocks} KV blocks fit ({free_bytes / GIB:.2f} GiB free{kept})")
        wanted = seqs * -(-wanted_context // start.block_size)
        if num_blocks > wanted:
            num_blocks = wanted
            reasons.append(f"{num_blocks} KV blocks suffice for {seqs} sequences of full length")
    capacity = num_blocks * start.block_size
    context = min(wanted_context, capacity)
    if context < min(_MIN_CONTEXT, wanted_context):
        raise ModelError(f"only {capacity} tokens of KV cache fit ({free_bytes / GIB:.2f} GiB free, {demand.kv_block} bytes a block)")
    if context < wanted_context and start.context_length is not None and start.num_blocks is None:
        raise ModelError(f"a context length of {wanted_context} was asked for, and the KV cache has room for {capacity} tokens")
    source = "as configured" if start.context_length and start.context_length <= model_context else "the model's own limit"
    if context < wanted_context:
        source = f"all that {num_blocks} KV blocks hold for one sequence"
    reasons.append(f"context length {context}: {source}")
    seqs = min(seqs, num_blocks)
    reasons.append(f"{seqs} sequences at once, {tokens} tokens a step, {capacity} tokens of KV cache")
    return Sizes(context, seqs, max(tokens, seqs), chunks, num_blocks, max(fitting, num_blocks) if start.num_blocks else fitting, tuple(reasons))
