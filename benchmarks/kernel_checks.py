"""Every Triton kernel on the GPU against float64 twins: fresh random data, poisoned outputs, padded buckets, captured and replayed graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_cases import SHAPES, Shape, exact_attention, make_batch, make_caches, make_fp8_caches, relative_error
from torch import Tensor

from appliance.kernels import kv_cache, linear, ops, paged_decode, paged_prefill
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.skinny_linear import skinny_linear
from appliance.kernels.triton_ops import TritonOps

TRITON, TWIN = TritonOps(), ReferenceOps()
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
Result = tuple[str, float, float]  # what, error, limit


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def replayed(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` captured once (after an eager call that compiles); the graph and what the captured call returned."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def check_decode() -> Iterator[Result]:
    """Batches of 1 to 256, mixed contexts, zeros, windows; every split count; a replay with other lengths than those captured."""
    for name in ("0.6b", "8b", "3b", "7b", "0.5b", "135m"):
        shape = SHAPES[name]
        for dtype, limit in LIMITS.items():
            key, value = make_caches(6000, shape, dtype)
            for size in (1, 7, 256) if dtype == torch.bfloat16 and name in ("0.6b", "8b") else (5,):
                contexts = torch.randint(1, 300 if size > 100 else 3000, (size,)).tolist()
                if size > 1:
                    contexts[size // 2] = 0
                for window in (None, 129):
                    batch = make_batch(contexts, [], 6000)
                    q = torch.randn(size, shape.num_heads, shape.head_dim, device="cuda", dtype=dtype)
                    expected = exact_attention(q, key, value, batch, shape.head_dim**-0.5, window)
                    auto = paged_decode.choose_config(size, shape.num_kv_heads, shape.head_dim, 3000, q.element_size(), 132)
                    for splits in (None, 1, 8) if size < 100 else (None,):
                        out = poisoned(*expected.shape, dtype=dtype)
                        config = None if splits is None else dataclasses.replace(auto, num_splits=splits)
                        paged_decode.paged_decode(q, key, value, batch, shape.head_dim**-0.5, window, out, config)
                        yield f"decode {name} {str(dtype)[6:]} batch {size} window {window} splits {splits}", relative_error(out, expected), limit
    shape = SHAPES["8b"]
    key, value = make_caches(6000, shape, torch.bfloat16)
    batch = make_batch([3000, 0, 17, 1], [], 6000)
    q = torch.randn(4, 32, 128, device="cuda", dtype=torch.bfloat16)
    graph, out = replayed(lambda: TRITON.attention(q, key, value, batch, 0.088, None))
    for lens in ([1, 16, 1, 0], [2999, 0, 4, 1]):
        batch.context_lens.copy_(torch.tensor(lens))
        q.normal_()
        graph.replay()
        yield f"decode replayed with contexts {lens}", relative_error(out, exact_attention(q, key, value, batch, 0.088, None)), 1e-2


def check_prefill() -> Iterator[Result]:
    """Chunks with and without context beside decodes, empty entries and padding tokens, windows, every tile size of the sweep."""
    chunks = [(0, 700), (1000, 129), (0, 0), (64, 64), (37, 1), (0, 0)]
    for name in ("0.6b", "8b", "3b", "7b", "0.5b", "135m"):
        shape = SHAPES[name]
        for dtype, limit in LIMITS.items():
            key, value = make_caches(1000, shape, dtype)
            for window in (None, 200):
                batch = make_batch([300, 0, 1], chunks, 1000, padding=11)
                q = torch.randn(batch.input_ids.shape[0], shape.num_heads, shape.head_dim, device="cuda", dtype=dtype)
                expected = exact_attention(q, key, value, batch, shape.head_dim**-0.5, window)
                out = TRITON.attention(q, key, value, batch, shape.head_dim**-0.5, window)
                yield f"mixed {name} {str(dtype)[6:]} window {window}", relative_error(out, expected), limit
                short = make_batch([], [(90, 3), (400, 2), (0, 1)], 1000)
                few = q[:6].contiguous()
                out = TRITON.attention(few, key, value, short, shape.head_dim**-0.5, window)
                yield (
                    f"short chunks {name} {str(dtype)[6:]} window {window}",
                    relative_error(out, exact_attention(few, key, value, short, shape.head_dim**-0.5, window)),
                    limit,
                )
    shape = SHAPES["8b"]
    key, value = make_caches(1000, shape, torch.bfloat16)
    batch = make_batch([], chunks, 1000)
    q = torch.randn(batch.input_ids.shape[0], 32, 128, device="cuda", dtype=torch.bfloat16)
    expected = exact_attention(q, key, value, batch, 0.088, None)
    for config in PREFILL_CONFIGS:
        out = poisoned(*expected.shape, dtype=torch.bfloat16)
        try:
            paged_prefill.paged_prefill(q, key, value, batch, 0.088, None, out, config)
        except Exception as error:  # one configuration that does not fit must not hide the others
            print(f"  prefill {config}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        yield f"prefill {config}", relative_error(out, expected), 1e-2


PREFILL_CONFIGS = [
    paged_prefill.PrefillConfig(128, 64, 8, 3),
    paged_prefill.PrefillConfig(128, 64, 8, 5),
    paged_prefill.PrefillConfig(128, 128, 8, 3),
    paged_prefill.PrefillConfig(64, 64, 4, 3),
    paged_prefill.PrefillConfig(64, 128, 4, 3),
]


def check_fp8_cache() -> Iterator[Result]:
    """Decodes, chunks and the KV write over an e4m3 cache, against float64 on the values that it stands for."""
    chunks = [(0, 700), (1000, 129), (0, 0), (37, 1)]
    for name in ("0.6b", "8b", "0.5b", "135m"):
        shape = SHAPES[name]
        key, value, exact_key, exact_value = make_fp8_caches(3000, shape)
        scale = shape.head_dim**-0.5
        for window in (None, 200):
            batch = make_batch([300, 0, 1, 2000, 17], chunks, 3000, padding=5)
            q = torch.randn(batch.input_ids.shape[0], shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
            expected = exact_attention(q, exact_key, exact_value, batch, scale, window)
            yield f"fp8 mixed {name} window {window}", relative_error(TRITON.attention(q, key, value, batch, scale, window), expected), 5e-3
            for size in (1, 64, 256):
                contexts = torch.randint(1, 180, (size,)).tolist()
                batch = make_batch(contexts, [], 3000)
                q = torch.randn(size, shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
                expected = exact_attention(q, exact_key, exact_value, batch, scale, window)
                found = TRITON.attention(q, key, value, batch, scale, window)
                yield f"fp8 decode {name} batch {size} window {window}", relative_error(found, expected), 5e-3
        batch = make_batch([5, 900], [(0, 33)], 200, padding=3)
        qkv = torch.randn(batch.input_ids.shape[0], (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, device="cuda", dtype=torch.bfloat16)
        angles = torch.arange(1024, device="cuda").unsqueeze(1) * torch.rand(shape.head_dim // 2, device="cuda")
        cos_sin, size = torch.cat((angles.cos(), angles.sin()), dim=1), (200, shape.num_kv_heads, 16, shape.head_dim)
        caches = [[kv_cache.allocate_fp8(size, qkv.device) for _ in range(2)] for _ in range(2)]
        for run, pair in zip((TRITON, TWIN), caches, strict=True):
            run.rope_store_kv(qkv, cos_sin, pair[0], pair[1], batch, None, None, 1e-6)
        for what, found, twin in zip(("keys", "values"), *caches, strict=True):
            yield f"fp8 {what} {name}: bytes that differ", float((found.view(torch.uint8) != twin.view(torch.uint8)).float().mean()), 1e-3
            yield f"fp8 {what} {name}: scales that differ", float((kv_cache.scales_of(found) != kv_cache.scales_of(twin)).float().mean()), 1e-3


def check_elementwise() -> Iterator[Result]:
    """Norms, rotary embedding with the KV write, SwiGLU, activation quantisation."""
    for dtype, limit in LIMITS.items():
        for num_tokens, size in ((1, 1024), (3, 576), (300, 4096), (2, 3584)):
            x, weight = (torch.randn(s, device="cuda", dtype=dtype) for s in ((num_tokens, size), (size,)))
            residual = torch.randn_like(x)
            summed = (x.float() + residual.float()).to(dtype)
            for what, out, source in (
                ("rms_norm", TRITON.rms_norm(x, weight, 1e-5), x),
                ("add_rms_norm", TRITON.add_rms_norm(x, residual, weight, 1e-5), summed),
            ):
                exact = source.double() * (source.double().square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
                yield f"{what} {str(dtype)[6:]} {num_tokens}x{size}", relative_error(out, exact), limit
            yield f"residual {str(dtype)[6:]} {num_tokens}x{size}", relative_error(residual, summed), 1e-9
            gate, up = x.double().chunk(2, dim=1)
            yield f"silu_mul {num_tokens}x{size}", relative_error(TRITON.silu_mul(x), gate * gate.sigmoid() * up), limit
        for name, shape in SHAPES.items():
            yield from _check_rope(name, shape, dtype, limit)
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16) * 3
    quantised, scales = linear.quantize_rows(x)
    yield "quantised rows", relative_error(quantised.double() * scales, x), 4e-2
    yield "quantised as torch does", relative_error(quantised.float(), (x.float() / scales).to(torch.float8_e4m3fn).float()), 5e-3


def _check_rope(name: str, shape: Shape, dtype: torch.dtype, limit: float) -> Iterator[Result]:
    batch = make_batch([5, 900, 0], [(0, 33), (64, 200)], 200, padding=3)
    num_tokens = batch.input_ids.shape[0]
    qkv = torch.randn(num_tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, device="cuda", dtype=dtype)
    angles = torch.arange(1024, device="cuda").unsqueeze(1) * torch.rand(shape.head_dim // 2, device="cuda")
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    norms = [torch.randn(shape.head_dim, device="cuda", dtype=dtype) if shape.qk_norm else None for _ in range(2)]
    caches = [torch.zeros(200, shape.num_kv_heads, 16, shape.head_dim, device="cuda", dtype=dtype) for _ in range(2)]
    q = TRITON.rope_store_kv(qkv, cos_sin, *caches, batch, *norms, 1e-6)
    wide = [None if norm is None else norm.double() for norm in norms]
    exact_caches = [torch.zeros_like(cache, dtype=torch.float32) for cache in caches]
    exact = TWIN.rope_store_kv(qkv.float(), cos_sin, *exact_caches, batch, *wide, 1e-6)
    yield f"rope q {name} {str(dtype)[6:]}", relative_error(q, exact), limit
    for what, cache, expected in zip(("keys", "values"), caches, exact_caches, strict=True):
        yield f"rope {what} {name} {str(dtype)[6:]}", relative_error(cache, expected), limit


def check_linear() -> Iterator[Result]:
    """The weight-streaming linear with all it folds in, the fp8 linear."""
    for num_outputs, size in ((4096, 4096), (1024, 3072), (3072, 1024), (6144, 896), (1000, 576)):
        for num_tokens in (1, 2, 8, 16):
            x, weight, norm = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((num_tokens, size), (2 * num_outputs, size), (size,)))
            residual = torch.randn(num_tokens, num_outputs, device="cuda", dtype=torch.bfloat16)
            wide = x.double()
            normed = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.double()
            plain = wide @ weight[:num_outputs].double().T
            gate, up = (normed @ weight.double().T).chunk(2, dim=1)
            what = f"skinny {num_outputs}x{size} tokens {num_tokens}"
            yield what, relative_error(skinny_linear(x, weight[:num_outputs], None), plain), 1e-2
            yield f"{what} norm gate", relative_error(skinny_linear(x, weight, None, norm=(norm, 1e-5), gate=True), gate * gate.sigmoid() * up), 1e-2
            expected = plain + residual.double()
            yield f"{what} add", relative_error(skinny_linear(x, weight[:num_outputs], None, residual=residual), expected), 1e-2
    for num_tokens in (1, 17, 512):
        x, weight = torch.randn(num_tokens, 1024, device="cuda").bfloat16(), torch.randn(2048, 1024, device="cuda").bfloat16()
        layer, _ = TRITON.make_linear([weight], None, device=x.device, dtype=torch.bfloat16, quantization="fp8")
        yield f"fp8 linear tokens {num_tokens}", relative_error(layer(x), x.double() @ weight.double().T), 5e-2


def check_step() -> Iterator[Result]:
    """prepare_inputs, commit_sampled and apply_updates in a graph, replayed with other contents; a result other than the twin's counts 1."""
    device = torch.device("cuda")
    state = ops.RowState(torch.randint(1, 900, (65, 16), dtype=torch.int32, device=device), torch.randint(0, 99, (65, 300), dtype=torch.int32).cuda())
    state.params[-1] = 0
    state.output_counts = torch.zeros(65, 1000, dtype=torch.int32, device=device)
    num_decodes, num_chunks, num_tokens = 32, 8, 2048

    def ints(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int32, device=device)

    step = ops.StepInput(ints(40), ints(40), ints(8), ints(8), ints(num_tokens - num_decodes), num_decodes)
    batch = ops.AttentionBatch(
        ints(num_tokens), ints(num_tokens), ints(num_tokens).long(), ints(41), ints(40), ints(40), state.block_tables, ints(40).long(), num_decodes,
        2048, 4800,
    )  # fmt: skip
    token_ids = ints(40)

    def run() -> None:
        TRITON.prepare_inputs(state, step, batch, 16)
        TRITON.commit_sampled(state, step, batch, token_ids)

    step.rows.fill_(64)
    graph, _ = replayed(run)
    for used in (3, 32):
        rows = torch.randperm(64)[: used + num_chunks].int()
        step.rows.fill_(64)
        step.rows[:used], step.rows[num_decodes:] = rows[:used].cuda(), rows[used:].cuda()
        step.samples.copy_((step.rows != 64).int())
        step.chunk_lens.copy_(torch.randint(0, 250, (8,)))
        step.chunk_starts.copy_(torch.randint(0, 4000, (8,)))
        step.chunk_ids.random_(0, 1000)
        token_ids.random_(0, 1000)
        twin = ops.RowState(state.params.clone(), state.block_tables, None, state.output_counts.clone())
        other = dataclasses.replace(batch, **{f.name: torch.empty_like(getattr(batch, f.name)) for f in dataclasses.fields(batch)[:6]})
        other.logit_index = torch.empty_like(batch.logit_index)
        TWIN.prepare_inputs(twin, step, other, 16)
        TWIN.commit_sampled(twin, step, other, token_ids)
        graph.replay()
        for name in ("input_ids", "positions", "slot_mapping", "query_start", "context_lens", "rows", "logit_index"):
            yield f"step {used} {name}", float(not torch.equal(getattr(batch, name), getattr(other, name))), 0.5
        yield f"step {used} params", float(not torch.equal(state.params, twin.params)), 0.5
        yield f"step {used} counts", float(not torch.equal(state.output_counts, twin.output_counts)), 0.5  # type: ignore[arg-type]
    new_rows, params = torch.randperm(65)[:9].int().cuda(), torch.randint(0, 9, (9, 16), dtype=torch.int32).cuda()
    blocks = torch.stack((torch.arange(50) % 60, torch.arange(50) * 5, torch.arange(50)), 1).int().cuda()
    twin = ops.RowState(state.params.clone(), state.block_tables.clone())
    TRITON.apply_updates(state, new_rows, params, blocks)
    TWIN.apply_updates(twin, new_rows, params, blocks)
    yield "apply_updates params", float(not torch.equal(state.params, twin.params)), 0.5
    yield "apply_updates blocks", float(not torch.equal(state.block_tables, twin.block_tables)), 0.5


def check_sampling() -> Iterator[Result]:
    """Ids drawn against the reference's on the CPU: the share that differs (near-ties aside there is none), for every kind of row."""
    num_rows = 64
    for vocab in (151936, 49152):
        params = torch.zeros(num_rows, 16, dtype=torch.int32)
        floats = params.view(torch.float32)
        params[:, ops.SEED_LOW : ops.SEED_HIGH + 1].random_(-(2**31), 2**31 - 1)
        params[:, ops.OUTPUT_INDEX].random_(0, 1000)
        floats[:, ops.TEMPERATURE] = torch.rand(num_rows) * 1.5 * (torch.arange(num_rows) % 5 > 0)
        params[:, ops.TOP_K] = torch.tensor([0, 1, 50, 700, 20000]).repeat(13)[:num_rows]
        floats[:, ops.TOP_P] = torch.tensor([1.0, 0.9, 0.5, 0.999]).repeat(16)
        floats[:, ops.MIN_P] = torch.tensor([0.0, 0.05, 0.0]).repeat(22)[:num_rows]
        floats[:, ops.REPETITION_PENALTY] = 1.2
        floats[:, ops.FREQUENCY_PENALTY] = 0.1
        for dtype, spread in ((torch.bfloat16, 3.0), (torch.float32, 0.3), (torch.float32, 6.0)):
            logits = (torch.randn(num_rows, vocab) * spread).to(dtype)
            mask, counts = torch.rand(num_rows, vocab) < 0.01, (torch.rand(num_rows, vocab) < 0.01).int()
            for flags in (
                {"all_greedy": True},
                {},
                {"use_top_k": True},
                {"use_top_p": True},
                {"use_min_p": True},
                {"use_top_k": True, "use_top_p": True, "use_min_p": True, "use_penalties": True, "num_logprobs": 5},
            ):
                ids: list[ops.Sampled] = []
                for device in ("cuda", "cpu"):
                    state = ops.RowState(
                        params.to(device), torch.zeros(num_rows, 1, dtype=torch.int32, device=device), mask.to(device), counts.to(device)
                    )
                    batch = ops.SamplingBatch(torch.arange(num_rows, dtype=torch.int32, device=device), state, **flags)  # type: ignore[arg-type]
                    ids.append((TRITON if device == "cuda" else TWIN).sample(logits.to(device), batch))
                differing = float((ids[0].token_ids.cpu() != ids[1].token_ids).float().mean())
                yield f"sample {vocab} {str(dtype)[6:]} spread {spread} {' '.join(flags)}", differing, 1 / num_rows
                if ids[1].logprobs is not None and ids[0].logprobs is not None:
                    same = ids[0].token_ids.cpu() == ids[1].token_ids
                    yield "  logprobs", relative_error(ids[0].logprobs.cpu()[same], ids[1].logprobs[same]), 1e-5
                    yield "  ranks", float((ids[0].ranks.cpu() != ids[1].ranks)[same].float().mean()), 0.0  # type: ignore[union-attr]
                    yield "  top ids", float((ids[0].top_ids.cpu() != ids[1].top_ids).float().mean()), 1e-3  # type: ignore[union-attr]


CHECKS: dict[str, Callable[[], Iterator[Result]]] = {
    "elementwise": check_elementwise,
    "step": check_step,
    "decode": check_decode,
    "prefill": check_prefill,
    "fp8_cache": check_fp8_cache,
    "linear": check_linear,
    "sampling": check_sampling,
}
