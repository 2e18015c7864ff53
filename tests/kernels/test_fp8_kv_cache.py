"""The fp8 KV cache: how values are stored, and the Triton kernels that write and read it against float64 on the dequantised values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appliance.kernels import kv_cache, paged_decode, paged_prefill, shared_decode
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

BLOCK_SIZE = 16
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies bf16 matrices as if they were integers
CASES = [  # query heads, KV heads, head size, dtype of q, window
    pytest.param(4, 2, 16, torch.float32, None, id="group of 2"),
    pytest.param(3, 1, 32, HALF, 19, id="group of 3 with a window"),
    pytest.param(2, 2, 24, HALF, None, id="no group, head size no power of two"),
    pytest.param(14, 2, 64, HALF, None, id="group of 7"),
    pytest.param(2, 2, 24, torch.float32, 19, id="all of it"),
]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of the result; infinite where anything is NaN."""
    error = (result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=float("inf")))


def make_batch(decode_lens: list[int], chunks: list[tuple[int, int]], device: torch.device, *, num_padding: int = 0) -> AttentionBatch:
    """Contexts of decodes, then (tokens before, length) of chunks, over shuffled blocks; `num_padding` tokens of no entry at the end."""
    generator = torch.Generator().manual_seed(len(decode_lens) * 100 + len(chunks))
    contexts = decode_lens + [before + length if length else 0 for before, length in chunks]
    lengths = [1] * len(decode_lens) + [length for _, length in chunks]
    num_entries, max_blocks = len(contexts), max(-(-context // BLOCK_SIZE) for context in [*contexts, 1]) + 1
    tables = torch.randperm(num_entries * max_blocks, generator=generator).reshape(num_entries, max_blocks).int() + 1
    rows = torch.randperm(num_entries, generator=generator).int()
    positions, slots = [], []
    for entry, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        for position in range(context - length, context):
            positions.append(max(position, 0))
            slots.append(int(tables[rows[entry], position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE if context else -1)
    positions += [0] * num_padding
    slots += [-1] * num_padding
    query_start = torch.tensor([0, *lengths]).cumsum(0).int()
    return AttentionBatch(
        input_ids=torch.zeros(len(slots), dtype=torch.int32, device=device),
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_start=query_start.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        rows=rows.to(device),
        block_tables=tables.to(device),
        logit_index=(query_start[1:] - 1).clamp(min=0).long().to(device),
        num_decodes=len(decode_lens),
        max_query_len=max(lengths),
        max_context_len=max(contexts),
    )


def make_caches(batch: AttentionBatch, num_kv_heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp8 caches filled with values of many magnitudes (what lies past a context is NaN), and what they stand for in float64."""
    generator = torch.Generator().manual_seed(3)
    shape = (batch.block_tables.numel() + 1, num_kv_heads, BLOCK_SIZE, head_dim)
    made: list[Tensor] = []
    for largest in (30.0, 5.0):
        magnitudes = torch.exp2(torch.rand(shape[:3], generator=generator) * 8 - 8) * largest
        values, scales = kv_cache.quantize(torch.randn(shape, generator=generator) * magnitudes.unsqueeze(-1))
        values = values.view(torch.uint8)
        for entry, context in enumerate(batch.context_lens.tolist()):
            past = torch.arange(context, batch.block_tables.shape[1] * BLOCK_SIZE)
            blocks = batch.block_tables[batch.rows[entry]].cpu()[past // BLOCK_SIZE].long()
            values[blocks, :, past % BLOCK_SIZE] = 0x7F
        cache = kv_cache.allocate_fp8(shape, device)
        cache.view(torch.uint8).copy_(values)
        kv_cache.scales_of(cache).copy_(scales)
        made += [cache, kv_cache.dequantize(values.view(kv_cache.FP8), scales).nan_to_num().double().to(device)]
    return made[0], made[2], made[1], made[3]


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
    """Softmax attention in float64 over plain caches, one query token at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // keys.shape[1]
    for entry, context in enumerate(batch.context_lens.tolist()):
        start, end = batch.query_start[entry : entry + 2].tolist()
        blocks = batch.block_tables[batch.rows[entry]].long()
        k, v = (cache[blocks].transpose(1, 2).flatten(0, 1).repeat_interleave(group, dim=1) for cache in (keys, values))
        for token in range(start, end if context else start):
            seen = slice(max(0, context - end + token + 1 - window) if window else 0, context - end + token + 1)
            weights = torch.einsum("hd,nhd->hn", q[token].double(), k[seen]).mul(scale).softmax(1)
            out[token] = torch.einsum("hn,nhd->hd", weights, v[seen])
    return out.flatten(1)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 20), st.integers(0, 1000))
def test_a_stored_value_errs_by_half_a_step_of_e4m3(exponent: float, seed: int) -> None:
    """From 2**-14 to 57,344 the error is at most 1/16 of the value; smaller values err by at most 2**-18, larger ones saturate."""
    values = torch.randn(7, 24, generator=torch.Generator().manual_seed(seed)) * 2**exponent
    stored = kv_cache.dequantize(*kv_cache.quantize(values))
    limit = 448.0 * 2**7
    wanted = values.clamp(-limit, limit)
    largest = wanted.abs().amax(dim=1, keepdim=True)
    allowed = torch.maximum(wanted.abs() / 16, torch.maximum(largest * 2**-17, torch.tensor(2.0**-18)))
    assert bool(((stored - wanted).abs() <= allowed).all())


@pytest.mark.parametrize(("largest", "byte"), [(0.0, 0), (1.75, 0), (1.7501, 1), (3.5, 1), (448.0, 8), (448.1, 9), (57344.0, 15), (1e9, 15)])
def test_the_scale_is_the_least_power_of_two_that_holds_the_maximum(largest: float, byte: int) -> None:
    """1.75 * 2**b is the largest value that byte b stores."""
    values, scales = kv_cache.quantize(torch.tensor([[0.1 * largest, -largest, 0.0]]))
    assert scales.tolist() == [byte]
    assert float(kv_cache.dequantize(values, scales)[0, 1]) == pytest.approx(-min(largest, 57344.0), rel=1 / 16)


def test_scales_lie_behind_each_block_and_nowhere_else(device: torch.device) -> None:
    """Values and scale bytes of a cache share memory without overlap, and take what `block_bytes` says."""
    cache = kv_cache.allocate_fp8((5, 3, BLOCK_SIZE, 24), device)
    num_bytes = kv_cache.block_bytes(3, BLOCK_SIZE, 24, kv_cache.FP8)
    assert cache.untyped_storage().nbytes() == 5 * num_bytes
    assert 3 * BLOCK_SIZE * 25 <= num_bytes < 3 * BLOCK_SIZE * 25 + 128
    cache.view(torch.uint8).fill_(1)
    kv_cache.scales_of(cache).fill_(2)
    memory = torch.empty(0, dtype=torch.uint8, device=device).set_(cache.untyped_storage())
    assert [int((memory == value).sum()) for value in (1, 2)] == [5 * 3 * BLOCK_SIZE * 24, 5 * 3 * BLOCK_SIZE]
    assert kv_cache.block_bytes(8, 16, 128, torch.bfloat16) == 8 * 16 * 128 * 2


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "dtype", "window"), CASES)
def test_attention_reads_fp8(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None, device: torch.device) -> None:
    """Decodes, chunks with and without context, empty entries: the kernels and their twin against float64 on the dequantised cache."""
    batch = make_batch([1, 17, 0, 40], [(0, 1), (30, 19), (0, 0), (3, 5)], device)
    key, value, exact_key, exact_value = make_caches(batch, num_kv_heads, head_dim, device)
    q = torch.randn(batch.input_ids.shape[0], num_heads, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = exact_attention(q, exact_key, exact_value, batch, head_dim**-0.5, window)
    limit = 2e-6 if dtype == torch.float32 else 5e-3
    assert relative_error(TritonOps().attention(q, key, value, batch, head_dim**-0.5, window), expected) < limit
    clean = [cache.view(torch.uint8).where(cache.view(torch.uint8) != 0x7F, 0).view(kv_cache.FP8) for cache in (key, value)]
    for cache, source in zip(clean, (key, value), strict=True):
        fresh = kv_cache.allocate_fp8(tuple(cache.shape), device)  # type: ignore[arg-type]
        fresh.view(torch.uint8).copy_(cache.view(torch.uint8))
        kv_cache.scales_of(fresh).copy_(kv_cache.scales_of(source))
        source.set_(fresh)  # type: ignore[call-overload]
    assert relative_error(ReferenceOps().attention(q, key, value, batch, head_dim**-0.5, window), expected) < limit


@pytest.mark.parametrize(("num_splits", "window"), [(1, None), (2, 33), (8, None)])
def test_splits_of_an_fp8_decode_combine(num_splits: int, window: int | None, device: torch.device) -> None:
    """The scales are applied once, whatever the number of splits."""
    batch = make_batch([5, 100, 0, 49], [], device)
    key, value, exact_key, exact_value = make_caches(batch, 2, 16, device)
    q = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1)).to(device)
    out = torch.full((4, 96), float("nan"), device=device)
    config = paged_decode.DecodeConfig(block_n=16, num_splits=num_splits, num_warps=4, num_stages=2)
    paged_decode.paged_decode(q, key, value, batch, 0.25, window, out, config)
    assert relative_error(out, exact_attention(q, exact_key, exact_value, batch, 0.25, window)) < 2e-6
    out.fill_(float("nan"))
    shared = shared_decode.SharedConfig(block_n=16, num_programs=3 * num_splits, pieces=2, num_warps=4, num_stages=2)
    shared_decode.shared_decode(q, key, value, batch, 0.25, window, out, shared)
    assert relative_error(out, exact_attention(q, exact_key, exact_value, batch, 0.25, window)) < 2e-6


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (64, 64)])
def test_prefill_tiles_of_any_size_read_fp8(block_m: int, block_n: int, device: torch.device) -> None:
    """Masked and unmasked tiles take the same scales."""
    for window in (None, 5):
        batch = make_batch([], [(0, 50), (90, 3), (0, 0), (61, 20)], device)
        key, value, exact_key, exact_value = make_caches(batch, 2, 16, device)
        q = torch.randn(73, 6, 16, generator=torch.Generator().manual_seed(1)).to(device)
        out = torch.zeros(73, 96, device=device)
        paged_prefill.paged_prefill(q, key, value, batch, 0.25, window, out, paged_prefill.PrefillConfig(block_m, block_n, 4, 1))
        assert relative_error(out, exact_attention(q, exact_key, exact_value, batch, 0.25, window)) < 2e-6


@pytest.mark.parametrize(("dtype", "normed", "width"), [(torch.float32, False, 24), (torch.float32, True, 16), (HALF, True, 24), (HALF, False, 16)])
def test_rope_stores_fp8_as_its_twin_does(dtype: torch.dtype, normed: bool, width: int, device: torch.device) -> None:
    """Scale bytes are equal; values are those of the twin but where a rounding fell the other way; slots of no token keep their bytes."""
    batch = make_batch([6, 2, 0], [(9, 4), (0, 21)], device, num_padding=2)
    num_tokens, hq, hkv, d = batch.input_ids.shape[0], 6, 2, 24
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(num_tokens, hq + 2 * hkv, d, generator=generator) * torch.exp2(torch.rand(num_tokens, 1, 1, generator=generator) * 12 - 2)
    qkv[0, hq] *= 1e6 / qkv[0, hq].abs().max()  # saturates
    qkv[1, hq:] = 0
    if dtype == torch.float16:
        qkv = qkv.clamp(-4e4, 4e4)
    qkv = qkv.flatten(1).to(device, dtype)
    norms = [torch.rand(d, generator=generator).to(device, dtype) + 0.5 if normed else None for _ in range(2)]
    angles = torch.outer(torch.arange(64.0), torch.rand(width // 2, generator=generator))
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(device)
    shape = (batch.block_tables.numel() + 1, hkv, BLOCK_SIZE, d)
    results = []
    for ops in (TritonOps(), ReferenceOps()):
        caches = [kv_cache.allocate_fp8(shape, device) for _ in range(2)]
        for cache in caches:
            torch.empty(0, dtype=torch.uint8, device=device).set_(cache.untyped_storage()).fill_(5)
        q = ops.rope_store_kv(qkv, cos_sin, caches[0], caches[1], batch, *norms, 1e-6)
        results.append((q, caches))
    (q, caches), (twin_q, twin_caches) = results
    assert relative_error(q, twin_q) < (1e-6 if dtype == torch.float32 else 1e-3)
    for cache, twin in zip(caches, twin_caches, strict=True):
        assert torch.equal(kv_cache.scales_of(cache), kv_cache.scales_of(twin))
        found, wanted = (c.view(torch.uint8).int() for c in (cache, twin))
        differ = found != wanted
        if device.type == "cpu":  # the interpreter flushes e4m3's subnormals to zero and loses the carry of a mantissa that rounds up to 2
            differ &= (wanted & 0x78 != 0) & (wanted & 7 != 0)
        assert bool(((found - wanted).abs()[differ] <= 1).all())
        assert float(differ.float().mean()) < 1e-3
        untouched = torch.ones(shape[0] * BLOCK_SIZE, dtype=torch.bool, device=device)
        untouched[batch.slot_mapping[batch.slot_mapping >= 0]] = False
        assert bool((cache.view(torch.uint8).transpose(1, 2).flatten(0, 1)[untouched] == 5).all())
        assert bool((kv_cache.scales_of(cache).transpose(1, 2).flatten(0, 1)[untouched] == 5).all())


def test_tokens_of_no_entry_get_zeros_in_fp8(device: torch.device) -> None:
    """A bucket longer than its chunks yields finite rows past them."""
    batch = dataclasses.replace(make_batch([3], [(0, 4)], device), max_query_len=10)
    key, value, exact_key, exact_value = make_caches(batch, 1, 16, device)
    q = torch.randn(11, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    q[5:] = float("nan")
    out = TritonOps().attention(q, key, value, batch, 0.25, None)
    assert relative_error(out[:5], exact_attention(q[:5], exact_key, exact_value, batch, 0.25, None)) < 2e-6
    assert not out[5:].any()
