"""The C++ CPU kernels against their plain-torch twins, at odd shapes and with padding."""

from __future__ import annotations

import os
import platform
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from appliance.kernels import ops as k
from appliance.kernels.cpu.build import CACHE_VARIABLE, load_library
from appliance.kernels.cpu_ops import CpuOps
from appliance.kernels.philox import noise_words
from appliance.kernels.reference import ReferenceOps

DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = ReferenceOps()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def cache() -> Iterator[None]:
    """Compiled kernels outlive the run, beside the suite's other files."""
    folder = Path(os.environ.get("APPLIANCE_TEST_STATE") or Path.home() / ".cache" / "appliance-tests") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def ops(cache: None, request: pytest.FixtureRequest) -> CpuOps:
    """The kernels for this CPU, and those that an AVX2 machine would get."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the C++ kernels need an x86-64 CPU and g++")
    return CpuOps(load_library(request.param))


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of the result."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """One rounding of a result: 2^-9 relative at most for bfloat16, so well under that in the norm; float32 sums of a few hundred terms."""
    return 4e-3 if dtype == torch.bfloat16 else 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 17), (70, 576), (2, 1030)])
def test_norms_equal_the_reference(ops: CpuOps, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """rms_norm and add_rms_norm give the twin's values, and the residual is updated in place."""
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    assert error(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)) < tolerance(dtype)
    mine, theirs = residual.clone(), residual.clone()
    assert error(ops.add_rms_norm(x, mine, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5)) < tolerance(dtype)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (5, 37), (40, 1536)])
def test_silu_mul_equals_the_reference(ops: CpuOps, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """silu(gate) * up, also for gates whose exponential would overflow."""
    gate_up = torch.randn(shape[0], 2 * shape[1])
    gate_up[0, :4] = torch.tensor([-200.0, -88.5, 90.0, 300.0])
    gate_up = gate_up.to(dtype)
    assert error(ops.silu_mul(gate_up), REFERENCE.silu_mul(gate_up)) < tolerance(dtype)


def make_batch(entries: list[tuple[int, int]], num_decodes: int, block_size: int, pad_tokens: int = 0) -> tuple[k.AttentionBatch, int]:
    """A batch of (query length, context length) entries with shuffled blocks; returns it and the number of blocks its caches need."""
    max_blocks = max(1, *(-(-context // block_size) for _, context in entries)) + 1
    num_rows = len(entries) + 1
    blocks = list(range(num_rows * max_blocks))
    random.Random(7).shuffle(blocks)
    tables = torch.tensor(blocks, dtype=torch.int32).reshape(num_rows, max_blocks)
    rows = torch.arange(len(entries), 0, -1, dtype=torch.int32)
    starts, positions, slots = [0], [], []
    for (length, context), row in zip(entries, rows.tolist(), strict=True):
        held = 1 if len(starts) <= num_decodes else length
        for i in range(held):
            position = max(0, context - held + i)
            positions.append(position)
            slots.append(int(tables[row, position // block_size]) * block_size + position % block_size if context else -1)
        starts.append(starts[-1] + held)
    positions += [0] * pad_tokens
    slots += [-1] * pad_tokens
    num_tokens = len(positions)
    batch = k.AttentionBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in entries], dtype=torch.int32),
        rows=rows,
        block_tables=tables,
        logit_index=torch.zeros(len(entries), dtype=torch.int64),
        num_decodes=num_decodes,
        max_query_len=max(length for length, _ in entries),
        max_context_len=max(context for _, context in entries),
    )
    return batch, num_rows * max_blocks


BATCHES = {
    "decodes": ([(1, 1), (1, 130), (1, 0), (1, 300), (1, 128)], 5, 0),
    "chunks": ([(7, 7), (65, 200), (0, 0), (1, 150), (33, 33)], 0, 3),
    "mixed": ([(1, 17), (1, 0), (50, 50), (3, 90)], 2, 0),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), [(9, 3, 64, 16), (8, 1, 128, 8), (5, 5, 80, 24), (14, 2, 16, 16)])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_equals_the_reference(
    ops: CpuOps, name: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, window: int | None
) -> None:
    """Decodes (split and whole), chunks, padding and sliding windows give the twin's values; entries without context give zeros."""
    torch.manual_seed(1)
    entries, num_decodes, pad_tokens = BATCHES[name]
    batch, num_blocks = make_batch(entries, num_decodes, block_size, pad_tokens)
    q = torch.randn(batch.positions.shape[0], num_heads, head_dim).to(dtype)
    keys, values = (torch.randn(num_blocks, num_kv_heads, block_size, head_dim).to(dtype) for _ in range(2))
    actual = ops.attention(q, keys, values, batch, head_dim**-0.5, window)
    expected = REFERENCE.attention(q, keys, values, batch, head_dim**-0.5, window)
    assert error(actual, expected) < (6e-3 if dtype == torch.bfloat16 else 3e-6)
    assert torch.equal(actual[expected.abs().sum(1) == 0], expected[expected.abs().sum(1) == 0])


def test_a_decode_does_not_depend_on_its_batch(ops: CpuOps) -> None:
    """A sequence alone and the same one among others get bit-equal attention."""
    batch, num_blocks = make_batch([(1, 500), (1, 30), (1, 129)], 3, 16)
    q = torch.randn(3, 6, 64)
    keys, values = (torch.randn(num_blocks, 2, 16, 64) for _ in range(2))
    together = ops.attention(q, keys, values, batch, 0.125, None)
    alone, _ = make_batch([(1, 500)], 1, 16)
    alone.rows, alone.block_tables = batch.rows[:1], batch.block_tables
    assert torch.equal(ops.attention(q[:1], keys, values, alone, 0.125, None), together[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize(("width", "normed"), [(64, False), (64, True), (24, True)])
def test_rope_and_store_equal_the_reference(ops: CpuOps, dtype: torch.dtype, cache_dtype: torch.dtype, width: int, normed: bool) -> None:
    """q comes back rotated, K and V land in their slots and nowhere else, and negative slots are left out."""
    torch.manual_seed(2)
    batch, num_blocks = make_batch([(1, 9), (1, 0), (20, 45)], 2, 16, pad_tokens=2)
    num_tokens = batch.positions.shape[0]
    qkv = torch.randn(num_tokens, (6 + 2 * 2) * 64).to(dtype)
    cos_sin = torch.randn(64, width)
    norms = (torch.randn(64).to(dtype), torch.randn(64).to(dtype)) if normed else (None, None)
    mine, theirs = ([torch.full((num_blocks, 2, 16, 64), 7.0, dtype=cache_dtype) for _ in range(2)] for _ in range(2))
    actual = ops.rope_store_kv(qkv, cos_sin, *mine, batch, *norms, 1e-6)
    expected = REFERENCE.rope_store_kv(qkv, cos_sin, *theirs, batch, *norms, 1e-6)
    assert error(actual, expected) < tolerance(dtype)
    for cache, twin in zip(mine, theirs, strict=True):
        assert error(cache, twin) < tolerance(cache_dtype)
        assert torch.equal(cache == 7.0, twin == 7.0)


def make_state(num_rows: int, max_blocks: int, vocab: int | None = None) -> k.RowState:
    """Rows with random tokens, seeds and blocks; the last is the dummy."""
    generator = torch.Generator().manual_seed(3)
    params = torch.randint(-(2**31), 2**31 - 1, (num_rows, k.NUM_PARAMS), generator=generator).to(torch.int32)
    params[:, k.LAST_ID] = torch.randint(0, 1000, (num_rows,), generator=generator)
    params[:, k.NUM_TOKENS] = torch.randint(1, max_blocks * 16, (num_rows,), generator=generator)
    params[:, k.OUTPUT_INDEX] = torch.randint(0, 50, (num_rows,), generator=generator)
    params[-1, k.NUM_TOKENS] = 0
    tables = torch.randint(0, 900, (num_rows, max_blocks), generator=generator).to(torch.int32)
    counts = None if vocab is None else torch.zeros(num_rows, vocab, dtype=torch.int32)
    return k.RowState(params, tables, None, counts)


def copy_state(state: k.RowState) -> k.RowState:
    """A state of its own memory."""
    counts = state.output_counts
    return k.RowState(state.params.clone(), state.block_tables.clone(), None, None if counts is None else counts.clone())


def ints(*values: int) -> Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("with_chunks", [True, False])
def test_step_bookkeeping_equals_the_reference(ops: CpuOps, with_chunks: bool) -> None:
    """Updates, inputs (padding decodes, chunks and tokens included) and the commit of sampled ids leave the twin's bits everywhere."""
    mine = make_state(6, 8, vocab=40)
    theirs = copy_state(mine)
    updates = ints(2, 0), torch.randint(1, 60, (2, k.NUM_PARAMS), dtype=torch.int32), torch.tensor([[1, 2, 77], [5, 0, 3]], dtype=torch.int32)
    step = k.StepInput(
        rows=ints(3, 5, 0, 1, 2, 5) if with_chunks else ints(3, 5, 0),
        samples=ints(1, 0, 1, 0, 1, 0) if with_chunks else ints(1, 0, 1),
        chunk_starts=ints(0, 16, 0) if with_chunks else ints(),
        chunk_lens=ints(5, 3, 0) if with_chunks else ints(),
        chunk_ids=torch.arange(100, 110, dtype=torch.int32) if with_chunks else ints(),
        num_decodes=3,
    )
    results = []
    for kernels, state in ((ops, mine), (REFERENCE, theirs)):
        kernels.apply_updates(state, *updates)
        kernels.apply_updates(state, ints(), torch.empty(0, k.NUM_PARAMS, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32))
        num_tokens, num_entries = 3 + step.chunk_ids.shape[0], step.rows.shape[0]
        batch = k.AttentionBatch(
            *(torch.full((num_tokens,), 99, dtype=kind) for kind in (torch.int32, torch.int32, torch.int64)),
            *(torch.full((n,), 99, dtype=torch.int32) for n in (num_entries + 1, num_entries, num_entries)),
            state.block_tables,
            torch.full((num_entries,), 99, dtype=torch.int64),
            3, 5, 200,
        )  # fmt: skip
        kernels.prepare_inputs(state, step, batch, 16)
        kernels.commit_sampled(state, step, batch, ints(*range(10, 10 + num_entries)))
        results.append((batch, state))
    (batch, state), (twin, twin_state) = results
    for field in ("input_ids", "positions", "slot_mapping", "query_start", "context_lens", "rows", "logit_index"):
        assert torch.equal(getattr(batch, field), getattr(twin, field)), field
    assert torch.equal(state.params, twin_state.params)
    assert torch.equal(state.block_tables, twin_state.block_tables)
    assert state.output_counts is not None
    assert twin_state.output_counts is not None
    assert torch.equal(state.output_counts, twin_state.output_counts)


def test_philox_words_are_the_reference_bits(ops: CpuOps) -> None:
    """The noise's words equal the twin's for ids of every word and for extreme ids, indices and keys."""
    ids = torch.tensor([0, 1, 2, 255, 256, 600, 1023, 4095, 4096, 49151, 2**31 - 1], dtype=torch.int32)
    for index, low, high in ((0, 0, 0), (1, 0xFFFFFFFF, 0x80000000), (2**32 - 1, 123456789, 987654321)):
        out = torch.empty_like(ids)
        ops._library.cpu_philox(ids.data_ptr(), len(ids), index, low, high, out.data_ptr())
        words = noise_words(ids, torch.tensor(index), torch.tensor(low), torch.tensor(high))
        assert torch.equal(out.long() & 0xFFFFFFFF, words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 4096, 10_001])
def test_draws_equal_the_reference(ops: CpuOps, dtype: torch.dtype, vocab: int) -> None:
    """Greedy rows and rows at several temperatures draw the twin's ids, seed by seed."""
    torch.manual_seed(4)
    state = make_state(65, 2)
    temperatures = torch.tensor([0.0, 0.2, 1.0, 3.0, 50.0]).repeat(13)
    state.floats(k.TEMPERATURE).copy_(temperatures)
    logits = (torch.randn(64, vocab) * 3).to(dtype)
    logits[:, 1] = float("-inf")
    rows = torch.randperm(64).to(torch.int32)
    batch = k.SamplingBatch(rows, state)
    drawn, expected = ops.sample(logits, batch).token_ids, REFERENCE.sample(logits, batch).token_ids
    assert torch.equal(drawn, expected)
    assert len(set(drawn.tolist())) > 3


def test_greedy_takes_the_lowest_of_equal_logits(ops: CpuOps) -> None:
    """A tie goes to the smallest id, across the pieces that threads work on too."""
    state = make_state(3, 2)
    state.floats(k.TEMPERATURE).zero_()
    logits = torch.zeros(2, 20_000)
    logits[0, [4097, 9000, 19_999]] = 5.0
    logits[1, 19_999] = 1e-3
    assert ops.sample(logits, k.SamplingBatch(ints(0, 1), state, all_greedy=True)).token_ids.tolist() == [4097, 19_999]


def test_filters_and_logprobs_go_to_the_reference(ops: CpuOps) -> None:
    """top-k, bias and logprobs give what the twin gives."""
    torch.manual_seed(5)
    state = make_state(9, 2)
    state.floats(k.TEMPERATURE).fill_(0.8)
    state.ints(k.TOP_K).fill_(3)
    batch = k.SamplingBatch(torch.arange(8, dtype=torch.int32), state, use_top_k=True, num_logprobs=2)
    logits = torch.randn(8, 500)
    mine, theirs = ops.sample(logits, batch), REFERENCE.sample(logits, batch)
    assert torch.equal(mine.token_ids, theirs.token_ids)
    assert mine.logprobs is not None
    assert theirs.logprobs is not None
    assert torch.equal(mine.logprobs, theirs.logprobs)


def test_float16_goes_to_the_reference(ops: CpuOps) -> None:
    """A dtype without kernels still gives the twin's values."""
    x = torch.randn(3, 64).half()
    assert torch.equal(ops.rms_norm(x, torch.ones(64), 1e-5), REFERENCE.rms_norm(x, torch.ones(64), 1e-5))
    assert torch.equal(ops.silu_mul(x), REFERENCE.silu_mul(x))
