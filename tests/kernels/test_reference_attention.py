"""The plain-torch rope, KV store and paged attention against loops over single queries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appliance.kernels import ops as k
from appliance.kernels.reference import ReferenceOps, rotate, store_kv

HQ, HKV, D, BLOCK = 6, 2, 16, 4
OPS = ReferenceOps()


def make_batch(decodes: list[int], chunks: list[tuple[int, int]], *, num_padding: int = 0, seed: int = 0) -> k.AttentionBatch:
    """A batch over random blocks: contexts of `decodes`, then (context, query length) of `chunks`; padding after each kind, and after all tokens."""
    generator = torch.Generator().manual_seed(seed)
    padding = [0] * num_padding
    contexts = decodes + padding + [context for context, _ in chunks] + padding
    lengths = [1] * (len(decodes) + num_padding) + [length for _, length in chunks] + padding
    max_blocks = max(1, -(-max([*contexts, 1]) // BLOCK))
    num_tokens = sum(lengths) + num_padding
    tables = torch.randperm(len(contexts) * max_blocks, generator=generator).to(torch.int32).view(len(contexts), max_blocks)
    rows = torch.randperm(len(contexts), generator=generator).to(torch.int32)
    positions, slots = torch.zeros(num_tokens, dtype=torch.int32), torch.full((num_tokens,), -1)
    token = 0
    for entry, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        for offset in range(length):
            if context:
                position = context - length + offset
                positions[token] = position
                slots[token] = int(tables[rows[entry], position // BLOCK]) * BLOCK + position % BLOCK
            token += 1
    query_start = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return k.AttentionBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int32),
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        rows=rows,
        block_tables=tables,
        logit_index=(query_start[1:] - 1).clamp(min=0).long(),
        num_decodes=len(decodes) + num_padding,
        max_query_len=max([length for _, length in chunks], default=1),
        max_context_len=max([*contexts, 1]),
    )


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, batch: k.AttentionBatch, scale: float, window: int | None) -> Tensor:
    """One query and one head at a time, in float64, reading the cache token by token through the block table."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for entry in range(len(batch.rows)):
        context = int(batch.context_lens[entry])
        start, end = int(batch.query_start[entry]), int(batch.query_start[entry + 1])
        if not context:
            continue
        table = batch.block_tables[batch.rows[entry]]
        where = [(int(table[p // BLOCK]), p % BLOCK) for p in range(context)]
        for token in range(start, end):
            position = context - (end - token)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // keys.shape[1])
                seen = [(keys[b, group, o].double(), values[b, group, o].double()) for b, o in where[first : position + 1]]
                scores = torch.stack([q[token, head].double() @ key * scale for key, _ in seen]).softmax(0)
                out[token, head] = sum((s * value for s, (_, value) in zip(scores, seen, strict=True)), torch.zeros(q.shape[2]).double())
    return out.flatten(1)


def filled_caches(batch: k.AttentionBatch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Caches in which all that no entry's context covers is NaN."""
    generator = torch.Generator().manual_seed(5)
    shape = (batch.block_tables.numel(), HKV, BLOCK, D)
    caches = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    for entry in range(len(batch.rows)):
        for position in range(int(batch.context_lens[entry])):
            block = int(batch.block_tables[batch.rows[entry], position // BLOCK])
            for cache in caches:
                cache[block, :, position % BLOCK] = torch.randn(HKV, D, generator=generator).to(dtype)
    return caches


contexts = st.integers(1, 21)
chunk_shapes = contexts.flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


@settings(max_examples=40, deadline=None)
@given(st.lists(contexts, max_size=3), st.lists(chunk_shapes, max_size=3), st.integers(0, 2), st.sampled_from([None, 1, 3, 4, 9, 50]))
def test_attention_equals_a_loop_over_single_queries(decodes: list[int], chunks: list[tuple[int, int]], padding: int, window: int | None) -> None:
    """Any mix of decodes, chunks, padding entries and windows; what no entry owns gives zeros."""
    if not decodes and not chunks:
        return
    batch = make_batch(decodes, chunks, num_padding=padding)
    keys, values = filled_caches(batch)
    q = torch.randn(len(batch.input_ids), HQ, D, generator=torch.Generator().manual_seed(1))
    wanted = naive_attention(q, keys, values, batch, 0.3, window)
    found = OPS.attention(q, keys, values, batch, 0.3, window)
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    for entry in (batch.context_lens == 0).nonzero().flatten().tolist():
        assert not found[batch.query_start[entry] : batch.query_start[entry + 1]].any()


def test_decodes_in_groups_equal_decodes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on gathered memory splits the batch and changes no bit of a row."""
    batch = make_batch([3, 20, 7, 1, 12], [])
    keys, values = filled_caches(batch)
    q = torch.randn(5, HQ, D)
    whole = OPS.attention(q, keys, values, batch, 0.25, None)
    monkeypatch.setattr("appliance.kernels.reference._GATHER_ELEMENTS", 1)
    torch.testing.assert_close(OPS.attention(q, keys, values, batch, 0.25, None), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """The error against float64 is that of rounding the result."""
    batch = make_batch([9, 17], [(13, 5)])
    keys, values = filled_caches(batch, dtype)
    q = torch.randn(7, HQ, D).to(dtype)
    wanted = naive_attention(q, keys, values, batch, 0.25, None)
    found = OPS.attention(q, keys, values, batch, 0.25, None)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("width", [D, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store_kv_norms_turns_and_stores(width: int, normed: bool) -> None:
    """Q and K are normed per head, then turned as complex numbers by their angle; V is stored as it is; padding tokens store nothing."""
    batch = make_batch([6, 2], [(9, 4)], num_padding=1)
    num_tokens = len(batch.input_ids)
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(num_tokens, (HQ + 2 * HKV) * D, generator=generator)
    q_norm, k_norm = (torch.rand(D, generator=generator), torch.rand(D, generator=generator)) if normed else (None, None)
    angles = torch.outer(torch.arange(32.0), torch.rand(width // 2, generator=generator))
    shape = (batch.block_tables.numel(), HKV, BLOCK, D)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    found = OPS.rope_store_kv(qkv, torch.cat((angles.cos(), angles.sin()), 1), keys, values, batch, q_norm, k_norm, 1e-5)

    def wanted(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        turned = torch.complex(x[..., : width // 2], x[..., width // 2 : width]) * torch.exp(1j * angles[batch.positions.long()]).unsqueeze(1)
        return torch.cat((turned.real, turned.imag, x[..., width:]), -1)

    q, key, value = torch.split(qkv.view(num_tokens, -1, D), [HQ, HKV, HKV], dim=1)
    torch.testing.assert_close(found, wanted(q, q_norm))
    stored = batch.slot_mapping >= 0
    blocks, offsets = batch.slot_mapping[stored] // BLOCK, batch.slot_mapping[stored] % BLOCK
    torch.testing.assert_close(keys[blocks, :, offsets], wanted(key, k_norm)[stored])
    torch.testing.assert_close(values[blocks, :, offsets], value[stored], rtol=0, atol=0)
    assert int((~keys[..., 0].isnan()).sum()) == int(stored.sum()) * HKV


def test_rotation_keeps_dot_products_of_equal_distance() -> None:
    """What rotary embedding is for: the product of a turned query and key depends on their distance alone."""
    angles = torch.outer(torch.arange(40.0), torch.tensor([1.0, 0.3]))
    table = torch.cat((angles.cos(), angles.sin()), 1)
    q, key = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    products = [float((rotate(q, table[p + 5 : p + 6]) * rotate(key, table[p : p + 1])).sum()) for p in range(30)]
    assert max(products) - min(products) < 1e-5


def test_storing_only_padding_changes_nothing() -> None:
    """A step of slots -1 alone leaves every slot's bits, block 0's first one included."""
    cache = torch.randn(3, HKV, BLOCK, D)
    before = cache.clone()
    store_kv(torch.full((2, HKV, D), math.nan), cache, torch.tensor([-1, -1]))
    assert torch.equal(cache, before)
