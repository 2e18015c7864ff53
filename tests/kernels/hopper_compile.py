"""Compiles every Triton kernel for sm_90 as the operations would launch it, without a GPU: Triton's own ptxas assembles, nothing runs.

The interpreter accepts programs that the compiler does not (names bound in one branch only, arguments that clash with the launcher's own).
Usage: python tests/kernels/hopper_compile.py; prints a line a launch and leaves with 1 if any failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from appliance.kernels import fused_linear, host_ring
from appliance.kernels import ops as k
from appliance.kernels.kv_cache import allocate_fp8
from appliance.kernels.linear import quantize_rows
from appliance.kernels.skinny_linear import skinny_linear
from appliance.kernels.triton_ops import TritonOps


class _Sm90(CudaDriver):
    """A driver of a GPU that is not there: the compiler asks it for the target and nothing else."""

    def __init__(self) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _compile_only() -> list[str]:
    """Make every launch compile and return; the list collects the kernels' names."""
    compiled: list[str] = []
    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm
    return compiled


def _batch(num_decodes: int, num_chunks: int, num_tokens: int) -> tuple[k.RowState, k.StepInput, k.AttentionBatch]:
    entries = num_decodes + num_chunks
    state = k.RowState(params=torch.zeros(17, k.NUM_PARAMS, dtype=torch.int32), block_tables=torch.zeros(17, 64, dtype=torch.int32))
    ints = {name: torch.zeros(size, dtype=torch.int32) for name, size in (("e", entries), ("c", num_chunks), ("t", num_tokens))}
    step = k.StepInput(
        ints["e"], ints["e"].clone(), ints["c"], ints["c"].clone(), torch.zeros(num_tokens - num_decodes, dtype=torch.int32), num_decodes
    )
    batch = k.AttentionBatch(
        input_ids=ints["t"],
        positions=ints["t"].clone(),
        slot_mapping=torch.zeros(num_tokens, dtype=torch.int64),
        query_start=torch.zeros(entries + 1, dtype=torch.int32),
        context_lens=ints["e"].clone(),
        rows=step.rows,
        block_tables=state.block_tables,
        logit_index=torch.zeros(entries, dtype=torch.int64),
        num_decodes=num_decodes,
        max_query_len=max(num_tokens - num_decodes, 1),
        max_context_len=1024,
    )
    return state, step, batch


def _model_ops(ops: TritonOps, dtype: torch.dtype, hq: int, hkv: int, d: int, *, qk_norm: bool, window: int | None, fp8: bool = False) -> None:
    for shape in ((1, 0, 1), (16, 0, 16), (0, 2, 64), (8, 4, 200)):
        state, step, batch = _batch(*shape)
        tokens = shape[2]
        norm = torch.ones(d, dtype=dtype) if qk_norm else None
        cache = allocate_fp8((8, hkv, 16, d), torch.device("cpu")) if fp8 else torch.zeros(8, hkv, 16, d, dtype=dtype)
        qkv = torch.zeros(tokens, (hq + 2 * hkv) * d, dtype=dtype)
        ops.prepare_inputs(state, step, batch, 16)
        q = ops.rope_store_kv(qkv, torch.zeros(64, d), cache, cache, batch, norm, norm, 1e-6)
        ops.attention(q, cache, cache, batch, d**-0.5, window)
        hidden = torch.zeros(tokens, hq * d, dtype=dtype)
        ops.rms_norm(hidden, torch.ones(hq * d, dtype=dtype), 1e-6)
        ops.add_rms_norm(hidden, hidden.clone(), torch.ones(hq * d, dtype=dtype), 1e-6)
        ops.silu_mul(torch.zeros(tokens, 2 * 3 * d, dtype=dtype))
        ids, turn = torch.zeros(shape[0] + shape[1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        ops.commit_sampled(state, step, batch, ids)
        host_ring.take_updates(state, torch.zeros(4, 3 * (1 + k.NUM_PARAMS) + 3 * 40, dtype=torch.int32), turn, 3, 40)
        host_ring.give_ids(ids, torch.zeros(4, 300, dtype=torch.int32), turn)


def _skinny_products(dtype: torch.dtype) -> None:
    """The four projections of a layer at the sizes of a 0.6B and an 8B model, and an odd one."""
    for tokens in (1, 3, 16):
        for hidden, inner in ((1024, 3072), (4096, 14336), (576, 1536)):
            x, norm = torch.zeros(tokens, hidden, dtype=dtype), (torch.ones(hidden, dtype=dtype), 1e-6)
            skinny_linear(x, torch.zeros(hidden * 2, hidden, dtype=dtype), None, norm=norm)
            skinny_linear(x, torch.zeros(hidden, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype), residual=x.clone())
            skinny_linear(x, torch.zeros(2 * inner, hidden, dtype=dtype), None, norm=norm, gate=True)
            skinny_linear(torch.zeros(tokens, inner, dtype=dtype), torch.zeros(hidden, inner, dtype=dtype), None, residual=x)
            quantize_rows(torch.zeros(tokens, inner, dtype=dtype))


def _fused_products(dtype: torch.dtype) -> None:
    """The same of tens of tokens."""
    for tokens, hidden, inner in ((2, 1024, 3072), (33, 4096, 14336), (64, 896, 4864)):
        stream, norm = fused_linear.enter(torch.zeros(tokens, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)), torch.ones(hidden, dtype=dtype)
        plain, split = (fused_linear.choose_config(tokens, hidden, size, 132, may_split=size == inner) for size in (hidden, inner))
        fused_linear.normed_product(stream, torch.zeros(hidden, hidden, dtype=dtype), None, 1e-6, plain)
        made = fused_linear.normed_product(stream, torch.zeros(2 * inner, hidden, dtype=dtype), None, 1e-6, plain, gate=True)
        fused_linear.added_product(made, torch.zeros(hidden, inner, dtype=dtype), torch.zeros(hidden, dtype=dtype), stream, norm, split)


def _sampling_ops(ops: TritonOps, dtype: torch.dtype) -> None:
    for entries, vocab in ((1, 49152), (8, 151936), (200, 128256), (3, 301)):
        state, step, _ = _batch(entries, 0, entries)
        logits = torch.zeros(entries, vocab, dtype=dtype)
        for options in (
            {"all_greedy": True},
            {},
            {"use_top_k": True},
            {"use_top_p": True, "use_min_p": True},
            {"use_penalties": True},
            {"num_logprobs": 5},
        ):
            if "use_penalties" in options:
                state.prompt_mask = torch.zeros(17, vocab, dtype=torch.bool)
                state.output_counts = torch.zeros(17, vocab, dtype=torch.int32)
            ops.sample(logits, k.SamplingBatch(rows=step.rows, state=state, **options))
        triple = torch.zeros(3, dtype=torch.int64)
        ops.sample(logits, k.SamplingBatch(rows=step.rows, state=state, bias_entries=triple, bias_ids=triple, bias_values=torch.zeros(3)))
        ops.apply_updates(state, step.rows[:1], state.params[:1].clone(), torch.zeros(2, 3, dtype=torch.int32))


def main() -> int:
    """Compile for the shapes of the model families; the exit status."""
    driver.set_active(_Sm90())
    compiled = _compile_only()
    ops, failures = TritonOps(), 0
    works: list[tuple[str, Callable[[], None]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for hq, hkv, d, qk_norm, window in ((16, 8, 128, True, None), (32, 8, 128, False, None), (9, 3, 64, False, None), (8, 2, 128, False, 48)):
            work = f"decoder {dtype} {hq}/{hkv}/{d} qk_norm={qk_norm} window={window}"
            works.append((work, lambda t=dtype, a=(hq, hkv, d), n=qk_norm, w=window: _model_ops(ops, t, *a, qk_norm=n, window=w)))
            fp8 = f"{work} fp8 cache"
            works.append((fp8, lambda t=dtype, a=(hq, hkv, d), n=qk_norm, w=window: _model_ops(ops, t, *a, qk_norm=n, window=w, fp8=True)))
        works.append((f"skinny products {dtype}", lambda t=dtype: _skinny_products(t)))
        works.append((f"fused products {dtype}", lambda t=dtype: _fused_products(t)))
        works.append((f"sampling {dtype}", lambda t=dtype: _sampling_ops(ops, t)))
    for name, work in works:
        before = len(compiled)
        try:
            work()
            print(f"ok     {name}: {len(compiled) - before} launches", flush=True)
        except Exception:
            failures += 1
            print(f"FAILED {name} in {compiled[-1] if compiled else '?'}", flush=True)
            traceback.print_exc(limit=-3, file=sys.stdout)
    print(f"{len(set(compiled))} kernels, {failures} failures: {', '.join(sorted(set(compiled)))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
