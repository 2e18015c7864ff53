"""From a Start message to an engine that serves: device, kernels, weights, sizes, first compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from appliance.engine import sizing
from appliance.engine.block_pool import BlockPool
from appliance.engine.chunk_policy import ChunkPolicy
from appliance.engine.cuda_graphs import CHUNK_TOKEN_SIZES
from appliance.engine.device_peaks import step_costs
from appliance.engine.engine import Engine
from appliance.engine.footprint import CUDA_RUNTIME_BYTES, Demand, read_facts
from appliance.engine.gpu_memory import gpu_memory
from appliance.engine.memory_plan import DeviceMemory, MemoryPlan, Storage, make_plan
from appliance.engine.model_runner import ModelRunner
from appliance.engine.scheduler import SchedulerLimits
from appliance.engine.wire import Events, Ready, Start
from appliance.errors import ModelError
from appliance.kernels import ops as kernel_ops
from appliance.kernels.kv_cache import FP8, block_bytes
from appliance.model.config import ModelConfig
from appliance.model.decoder import Decoder, load_model

CUDA_ITL_TARGET_SECONDS = 0.03
CPU_ITL_TARGET_SECONDS = 0.15
CPU_RESIDENT_BYTES = 1_123_000_000  # what llama.cpp takes for the embedded model with 16,384 tokens of KV: engine and server stay below it
CPU_RESIDENT_KV_TOKENS = 16_384
CPU_RUNTIME_BYTES = 360_000_000  # interpreter, torch and server: PSS of both processes without weights and KV


class PhaseReporter(Protocol):
    """Where the load says what it is doing."""

    def enter(self, name: str, detail: str = "") -> None: ...

    def progress(self, share: float) -> None: ...


def choose_device(name: str) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`. Raises ModelError where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, and torch finds no CUDA device (driver missing or too old?)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtypes(start: Start, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of activations with unquantised weights, and of the KV cache.

    `auto` on CUDA is bfloat16. On CPU a quantised file runs with float32 activations, which its integer kernels compute in anyway (rounding them
    to bfloat16 between layers cost 1.7 % of greedy agreement at large steps), and other weights in bfloat16 where the CPU multiplies it fast. The
    cache is bfloat16 wherever the C++ kernels read it: half the bytes for a change below that of the weights.
    """
    if start.dtype != "auto":
        dtype = getattr(torch, start.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype, dtype
    if device.type == "cuda":
        return torch.bfloat16, torch.bfloat16
    if start.quantization == "auto" and start.kernels in ("auto", "cpu") and start.model_path.endswith(".gguf"):
        return torch.float32, torch.bfloat16
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_fast_bf16() else torch.float32
    return dtype, dtype


def _has_fast_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def build_engine(start: Start, phase: PhaseReporter, announce: Callable[[Events], None]) -> tuple[Engine, Ready]:
    """Load and size everything; reports phases as it goes. Raises ModelError with words for the user."""
    started = time.monotonic()
    device = choose_device(start.device)
    if device.type == "cpu":
        torch.set_num_threads(start.num_threads or len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    ops, is_interim = _choose_kernels(start, device)
    dtype, kv_dtype = choose_dtypes(start, device)
    kv_dtype = choose_cache_dtype(start, "cpu" if is_interim else ops.name, dtype, kv_dtype)
    plan = plan_start(start, device) if device.type == "cuda" else None

    def load(kernels: kernel_ops.Ops, progress: Callable[[float], None] | None = None) -> Decoder:
        return load_model(
            start.model_path, ops=kernels, device=device, dtype=dtype, quantization=start.quantization, progress=progress, seed=start.seed
        )

    decoder = _load_interim(start, ops, dtype, phase.progress) if is_interim else load(ops, phase.progress)
    phase.enter("compile", "first run of the kernels")
    kv_bytes_per_token = kv_block_bytes(decoder.config, kv_dtype, start.block_size) // start.block_size
    costs = step_costs(decoder, device, kv_bytes_per_token)  # before the cache takes the memory
    limits, sizes = _size(start, device, decoder, ops, kv_dtype, plan)
    pool = BlockPool(sizes.num_blocks)
    runner = ModelRunner(
        decoder,
        ops,
        device,
        limits,
        sizes.num_blocks,
        kv_dtype=kv_dtype,
        use_graphs=start.cuda_graphs,
        max_num_tokens=_graph_tokens(limits, device, start),
    )
    runner.warm_up()
    if device.type == "cpu" and (is_interim or ops.name == "cpu"):
        from appliance.engine.cpu_upgrade import Improver

        runner.improver = Improver(load, decoder, ops, functools.partial(copy_limit, start))
    target = start.itl_target_seconds or (CUDA_ITL_TARGET_SECONDS if device.type == "cuda" else CPU_ITL_TARGET_SECONDS)
    policy = ChunkPolicy(target, limits.max_num_batched_tokens)
    engine = Engine(
        runner,
        limits,
        pool,
        policy,
        depth=1 if device.type == "cuda" else 0,
        announce=announce,
        free_bytes=lambda: torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
    )
    ready = Ready(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        quantization=start.quantization,
        vocab_size=decoder.config.vocab_size,
        context_length=sizes.context_length,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        block_size=start.block_size,
        num_blocks=sizes.num_blocks,
        num_parameters=decoder.num_parameters,
        weight_bytes=decoder.weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        load_seconds=time.monotonic() - started,
        reasons=sizes.reasons
        if device.type == "cuda"
        else (*sizes.reasons, _resident_memory(sizes.num_blocks * start.block_size * kv_bytes_per_token)),
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        prefix_caching=start.prefix_caching,
        costs=costs,
    )
    return engine, ready


def _choose_kernels(start: Start, device: torch.device) -> tuple[kernel_ops.Ops, bool]:
    """The kernels to start with, and whether they are plain torch only until the compiled ones are there."""
    if device.type == "cpu" and start.kernels in ("auto", "cpu"):
        from appliance.kernels.cpu.build import BuildError
        from appliance.kernels.cpu_ops import built_cpu_ops

        with contextlib.suppress(BuildError):  # said, with what would help, where plain torch is chosen for good
            built = built_cpu_ops(functools.partial(copy_limit, start))
            return (built, False) if built is not None else (kernel_ops.select(device, "reference"), True)
    return kernel_ops.select(device, start.kernels), False


def _load_interim(start: Start, ops: kernel_ops.Ops, dtype: torch.dtype, progress: Callable[[float], None]) -> Decoder:
    """The model in plain torch, in the form that is loaded soonest: weights that wait for integer kernels widen to bfloat16 where that is fast."""
    quantized = start.quantization in ("int8", "int4") or (start.quantization == "auto" and start.model_path.endswith(".gguf"))
    dtype = torch.bfloat16 if quantized and start.dtype == "auto" and _has_fast_bf16() else dtype
    return load_model(start.model_path, ops=ops, device=torch.device("cpu"), dtype=dtype, quantization="none", progress=progress, seed=start.seed)


def _resident_memory(kv_bytes: int) -> str:
    """What both processes take now, in words. Pages of the KV cache are taken as they are written, so those still come."""
    engine, server = pss_bytes("self"), pss_bytes(str(os.getppid()))
    return (
        f"memory (PSS): engine {engine / 1e6:.0f} MB and server {server / 1e6:.0f} MB now, up to {kv_bytes / 1e6:.0f} MB more as the KV cache fills"
    )


def pss_bytes(process: str) -> int:
    """Proportional set size of a process by its folder in /proc; 0 where it cannot be read."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def copy_limit(start: Start) -> int:
    """Bytes for dense copies of quantised weights on a CPU: what is left of CPU_RESIDENT_BYTES, or a quarter of the rest in larger models."""
    facts = read_facts(start.model_path)
    _, kv_dtype = choose_dtypes(start, torch.device("cpu"))
    tokens = min(CPU_RESIDENT_KV_TOKENS, (start.num_blocks or CPU_RESIDENT_KV_TOKENS) * start.block_size)
    rest = CPU_RUNTIME_BYTES + facts.file_bytes + tokens * kv_block_bytes(facts.config, kv_dtype, start.block_size) // start.block_size
    return max(CPU_RESIDENT_BYTES, rest * 5 // 4) - rest


def choose_cache_dtype(start: Start, kernels: str, dtype: torch.dtype, automatic: torch.dtype) -> torch.dtype:
    """Of the KV cache: `automatic` where the settings leave it open and the kernels store it. Raises ModelError where they cannot store fp8."""
    if start.kv_cache_dtype == "fp8":
        if kernels not in ("triton", "reference"):
            raise ModelError(f"an fp8 KV cache needs a GPU; the {kernels} kernels have none (kv_cache_dtype = auto)")
        if kernels == "triton" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            raise ModelError("an fp8 KV cache needs a GPU of compute capability 8.9 or later (kv_cache_dtype = auto)")
        return FP8
    return dtype if kernels == "reference" else automatic


def storage_rule(config: ModelConfig, device: torch.device) -> Callable[[Start], Storage]:
    """How settings store a model of `config` on `device`, for a memory plan."""
    name = "triton" if device.type == "cuda" else "cpu"

    def storage(start: Start) -> Storage:
        dtype, kv_dtype = choose_dtypes(start, device)
        kernels = name if start.kernels == "auto" else start.kernels
        kv_dtype = choose_cache_dtype(start, kernels, dtype, kv_dtype)
        return Storage(dtype.itemsize, kv_block_bytes(config, kv_dtype, start.block_size))

    return storage


def plan_start(start: Start, device: torch.device) -> MemoryPlan:
    """What the model will take, before any of it is read. Raises ModelError, with what to change, where it does not fit."""
    facts = read_facts(start.model_path)
    memory = gpu_memory()
    if memory is None:
        free, total = torch.cuda.mem_get_info(device)
        memory = DeviceMemory(torch.cuda.get_device_name(device), True, total, min(free + CUDA_RUNTIME_BYTES, total))
    plan = make_plan(facts, start, memory, storage_rule(facts.config, device))
    if plan.sizes is None:
        raise ModelError(f"{plan.problem}. {plan.advice}")
    return plan


def kv_block_bytes(config: ModelConfig, kv_dtype: torch.dtype, block_size: int) -> int:
    """Bytes of K and V of one block in all layers."""
    return 2 * config.num_layers * block_bytes(config.num_kv_heads, block_size, config.head_dim, kv_dtype)


def _graph_tokens(limits: SchedulerLimits, device: torch.device, start: Start) -> int:
    """Tokens of the largest buffer: a graph's bucket pads decodes and chunks, each at most to the limit."""
    padding = limits.max_num_seqs if device.type == "cuda" and start.cuda_graphs else 0
    return limits.max_num_batched_tokens + padding


def _size(
    start: Start, device: torch.device, decoder: Decoder, ops: kernel_ops.Ops, kv_dtype: torch.dtype, plan: MemoryPlan | None
) -> tuple[SchedulerLimits, sizing.Sizes]:
    seqs, tokens, chunks = sizing.step_limits(start, is_cuda=device.type == "cuda")
    model_context = decoder.config.max_positions
    reasons: tuple[str, ...] = ()
    if plan is not None:
        provisional = _limits(start, seqs, tokens, chunks, min(start.context_length or model_context, model_context))
        probe = ModelRunner(decoder, ops, device, provisional, 1, kv_dtype=kv_dtype, use_graphs=False, max_num_tokens=tokens)
        activation_bytes = probe.measure_activation_bytes()
        del probe
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        free_bytes = int(free - total * (1 - start.memory_fraction))
        demand = dataclasses.replace(plan.demand, activations=max(activation_bytes, plan.demand.activations))
        reasons = (
            f"weights {decoder.weight_bytes / 1e9:.3f} GB (predicted {plan.demand.weights / 1e9:.3f}), "
            f"a step's activations {activation_bytes / 1e9:.3f} GB (predicted {plan.demand.activations / 1e9:.3f}), "
            f"free for the KV cache {(free_bytes - demand.reserve) / 1e9:.3f} GB (predicted {plan.free_for_kv / 1e9:.3f})",
        )
    else:
        free_bytes = sizing.available_host_bytes()
        demand = Demand(decoder.weight_bytes, 0, 0, 0, 0, kv_block_bytes(decoder.config, kv_dtype, start.block_size))
    sizes = sizing.choose(start, is_cuda=plan is not None, free_bytes=free_bytes, demand=demand, model_context=model_context)
    sizes = dataclasses.replace(sizes, reasons=reasons + sizes.reasons)
    use_graphs = start.cuda_graphs and device.type == "cuda" and sizes.max_num_batched_tokens <= CHUNK_TOKEN_SIZES[-1]
    limits = _limits(start, sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_num_chunks, sizes.context_length, use_graphs=use_graphs)
    return limits, sizes


def _limits(start: Start, seqs: int, tokens: int, chunks: int, context: int, *, use_graphs: bool = False) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_chunks=chunks,
        block_size=start.block_size,
        context_length=context,
        max_waiting=start.max_waiting,
        prefix_caching=start.prefix_caching,
        chunk_token_sizes=CHUNK_TOKEN_SIZES if use_graphs else (),
    )
