"""Batches over a paged cache, for the tests of attention and of what stands around it."""

from __future__ import annotations

import torch
from torch import Tensor

from appliance.kernels.ops import AttentionBatch

BLOCK_SIZE = 16


def make_batch(
    decode_lens: list[int], chunks: list[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """q, key and value cache, batch. A chunk is (tokens before it, its length). Cache slots past a context hold NaN; block tables are shuffled."""
    generator = torch.Generator().manual_seed(len(decode_lens) * 100 + len(chunks))
    contexts = decode_lens + [before + length if length else 0 for before, length in chunks]
    lengths = [1] * len(decode_lens) + [length for _, length in chunks]
    max_blocks = max(-(-context // BLOCK_SIZE) for context in [*contexts, 1]) + 1
    num_entries = len(contexts)
    num_blocks = num_entries * max_blocks + 1
    tables = torch.randperm(num_blocks - 1, generator=generator)[: num_entries * max_blocks].reshape(num_entries, max_blocks).int() + 1
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    key, value = (torch.full(shape, float("nan")) for _ in range(2))
    for cache in (key, value):
        for i, context in enumerate(contexts):
            for position in range(context):
                block = int(tables[i, position // BLOCK_SIZE])
                cache[block, :, position % BLOCK_SIZE] = torch.randn(num_kv_heads, head_dim, generator=generator)
    query_start = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    num_tokens = int(query_start[-1])
    empty = torch.zeros(num_tokens, dtype=torch.int32)
    rows = torch.randperm(num_entries, generator=generator).int()
    block_tables = torch.empty_like(tables)
    block_tables[rows.long()] = tables
    batch = AttentionBatch(
        input_ids=empty,
        positions=empty,
        slot_mapping=empty.long(),
        query_start=query_start.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        rows=rows.to(device),
        block_tables=block_tables.to(device),
        logit_index=empty.long(),
        num_decodes=len(decode_lens),
        max_query_len=max(lengths),
        max_context_len=max(contexts),
    )
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    return q.to(device, dtype), key.to(device, dtype), value.to(device, dtype), batch
