"""What `kernels.py` beside this measures and checks: model shapes, batches over a filled paged cache, float64 twins.

Needs only the repository root as working directory: the package need not be installed.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parents[1]


def bootstrap() -> None:
    """Make `appliance.kernels` importable from the checkout (it lies in kernels/) where the package is not installed."""
    if importlib.util.find_spec("appliance") is None:
        sys.path.insert(0, str(ROOT))
    try:
        found = importlib.util.find_spec("appliance.kernels") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        location = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location("appliance.kernels", location / "__init__.py", submodule_search_locations=[str(location)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["appliance.kernels"] = module
        spec.loader.exec_module(module)


bootstrap()

from appliance.kernels import kv_cache  # noqa: E402
from appliance.kernels.ops import AttentionBatch  # noqa: E402

BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels see of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    qk_norm: bool = False


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("0.6b", 16, 8, 128, 1024, 3072, 151936, True),
        Shape("8b", 32, 8, 128, 4096, 14336, 128256),
        Shape("3b", 24, 8, 128, 3072, 8192, 128256),
        Shape("7b", 28, 4, 128, 3584, 18944, 152064),  # Qwen2.5-7B: groups of 7
        Shape("0.5b", 14, 2, 64, 896, 4864, 151936),  # Qwen2.5-0.5B
        Shape("135m", 9, 3, 64, 576, 1536, 49152),  # SmolLM2
    )
}


def make_caches(num_blocks: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random key and value caches `[num_blocks, Hkv, BLOCK_SIZE, D]`."""
    size = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    return torch.randn(size, device="cuda", dtype=dtype), torch.randn(size, device="cuda", dtype=dtype)


def make_fp8_caches(num_blocks: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key and value caches in e4m3, of magnitudes that differ by token and head, and the values they stand for in float32."""
    size = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    made: list[Tensor] = []
    for _ in range(2):
        values = torch.randn(size, device="cuda") * torch.exp2(torch.rand(size[:3], device="cuda") * 6 - 4).unsqueeze(-1)
        quantized, scales = kv_cache.quantize(values)
        cache = kv_cache.allocate_fp8(size, torch.device("cuda"))
        cache.view(torch.uint8).copy_(quantized.view(torch.uint8))
        kv_cache.scales_of(cache).copy_(scales)
        made += [cache, kv_cache.dequantize(quantized, scales)]
    return made[0], made[2], made[1], made[3]


def make_batch(decodes: list[int], chunks: list[tuple[int, int]], num_blocks: int, *, padding: int = 0, max_context: int = 0) -> AttentionBatch:
    """A batch over shuffled blocks: context lengths of decodes; (tokens before, length) of chunks; `padding` tokens that no entry owns."""
    contexts = decodes + [before + length if length else 0 for before, length in chunks]
    lengths = [1] * len(decodes) + [length for _, length in chunks]
    need = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(num_blocks - 1)[: sum(need)].int() + 1
    tables = torch.zeros(len(contexts), max([*need, 1]), dtype=torch.int32)
    at = 0
    for i, count in enumerate(need):
        tables[i, :count] = order[at : at + count]
        at += count
    rows = torch.randperm(len(contexts))
    shuffled = torch.empty_like(tables)
    shuffled[rows] = tables
    ends = torch.tensor([0, *lengths]).cumsum(0)
    num_tokens = int(ends[-1]) + padding

    def ints(values: Tensor) -> Tensor:
        return values.to("cuda", torch.int32)

    contexts_tensor, starts = torch.tensor(contexts), ends[:-1]
    owner = torch.repeat_interleave(torch.arange(len(contexts)), torch.tensor(lengths))
    positions = contexts_tensor[owner] - torch.tensor(lengths)[owner] + torch.arange(int(ends[-1])) - starts[owner]
    slots = tables[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    slots[positions < 0] = -1
    filler = torch.zeros(padding, dtype=torch.int64)
    return AttentionBatch(
        input_ids=ints(torch.zeros(num_tokens)),
        positions=ints(torch.cat((positions.clamp(min=0), filler))),
        slot_mapping=torch.cat((slots, filler - 1)).cuda(),
        query_start=ints(ends),
        context_lens=ints(contexts_tensor),
        rows=ints(rows),
        block_tables=ints(shuffled),
        logit_index=(ends[1:] - 1).clamp(min=0).cuda(),
        num_decodes=len(decodes),
        max_query_len=max(lengths) + padding,
        max_context_len=max(max(contexts), max_context),
    )


def exact_attention(q: Tensor, key: Tensor, value: Tensor, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
    """The twin in float64, entry by entry; rows of no entry are zeros."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts, contexts, rows = batch.query_start.tolist(), batch.context_lens.tolist(), batch.rows.tolist()
    group = q.shape[1] // key.shape[1]
    for i, context in enumerate(contexts):
        start, end = starts[i], starts[i + 1]
        if end == start or context == 0:
            continue
        blocks = batch.block_tables[rows[i], : -(-context // BLOCK_SIZE)].long()
        k, v = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :context].double().repeat_interleave(group, dim=0) for c in (key, value))
        scores = torch.einsum("qhd,hkd->hqk", q[start:end].double(), k) * scale
        keys = torch.arange(context, device=q.device)
        queries = torch.arange(context - (end - start), context, device=q.device).unsqueeze(1)
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        out[start:end] = torch.einsum("hqk,hkd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v)
    return out.flatten(1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of the result; infinite where anything is NaN."""
    error = (result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return float(error.nan_to_num(nan=float("inf")))
