"""The plain-torch step bookkeeping, norms, activations and linear layers against loops."""

from __future__ import annotations

import math
import warnings

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.kernels import ops as k
from appliance.kernels.gguf_blocks import BLOCK_SIZES, dequantize, dequantize_rows, row_bytes
from appliance.kernels.reference import DenseLinear, ReferenceOps

OPS = ReferenceOps()
BLOCK, MAX_BLOCKS, NUM_ROWS = 4, 8, 9
DUMMY = NUM_ROWS - 1


def make_state(num_tokens: list[int]) -> k.RowState:
    """Rows whose contexts have so many tokens; the last is the dummy."""
    params = torch.zeros(NUM_ROWS, k.NUM_PARAMS, dtype=torch.int32)
    params[: len(num_tokens), k.NUM_TOKENS] = torch.tensor(num_tokens, dtype=torch.int32)
    params[:, k.LAST_ID] = torch.arange(NUM_ROWS, dtype=torch.int32) + 100
    params[:, k.OUTPUT_INDEX] = torch.arange(NUM_ROWS, dtype=torch.int32) * 10
    tables = torch.randperm(NUM_ROWS * MAX_BLOCKS, generator=torch.Generator().manual_seed(4)).to(torch.int32).view(NUM_ROWS, MAX_BLOCKS)
    return k.RowState(params, tables)


def make_step(decodes: list[int], chunks: list[tuple[int, int, int]], pad: int) -> tuple[k.StepInput, k.AttentionBatch]:
    """Decodes by row, chunks as (row, start, length), `pad` unused entries of each kind and unused tokens. The batch is filled with rubbish."""
    lens = [length for _, _, length in chunks]
    rows = decodes + [DUMMY] * pad + [row for row, _, _ in chunks] + [DUMMY] * pad
    num_decodes, num_chunk_tokens = len(decodes) + pad, sum(lens) + pad
    step = k.StepInput(
        rows=torch.tensor(rows, dtype=torch.int32),
        samples=torch.tensor([1] * len(decodes) + [0] * pad + [i % 2 for i in range(len(chunks))] + [0] * pad, dtype=torch.int32),
        chunk_starts=torch.tensor([start for _, start, _ in chunks] + [0] * pad, dtype=torch.int32),
        chunk_lens=torch.tensor(lens + [0] * pad, dtype=torch.int32),
        chunk_ids=torch.arange(num_chunk_tokens, dtype=torch.int32) + 500,
        num_decodes=num_decodes,
    )
    num_tokens = num_decodes + num_chunk_tokens
    rubbish = {name: torch.full((num_tokens,), 77, dtype=torch.int32) for name in ("input_ids", "positions")}
    batch = k.AttentionBatch(
        **rubbish,
        slot_mapping=torch.full((num_tokens,), 77),
        query_start=torch.full((len(rows) + 1,), 77, dtype=torch.int32),
        context_lens=torch.full((len(rows),), 77, dtype=torch.int32),
        rows=torch.full((len(rows),), 77, dtype=torch.int32),
        block_tables=torch.zeros(0, 0, dtype=torch.int32),
        logit_index=torch.full((len(rows),), 77),
        num_decodes=num_decodes,
        max_query_len=max(lens, default=1),
        max_context_len=MAX_BLOCKS * BLOCK,
    )
    return step, batch


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, int]], list[int], int]:
    """Decode rows, chunks, tokens of each row, padding."""
    num_decodes, num_chunks = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    tokens = draw(st.lists(st.integers(1, MAX_BLOCKS * BLOCK), min_size=DUMMY, max_size=DUMMY))
    order = draw(st.permutations(range(DUMMY)))
    chunks = []
    for row in order[num_decodes : num_decodes + num_chunks]:
        start = draw(st.integers(0, MAX_BLOCKS * BLOCK - 1))
        chunks.append((row, start, draw(st.integers(1, MAX_BLOCKS * BLOCK - start))))
    return list(order[:num_decodes]), chunks, tokens, draw(st.integers(0, 2))


@settings(max_examples=100, deadline=None)
@given(steps())
def test_prepare_inputs_says_where_each_token_lies(case: tuple[list[int], list[tuple[int, int, int]], list[int], int]) -> None:
    """Ids, positions, slots, contexts and logit rows of every real token; padding has id 0, position 0, slot -1 and context 0."""
    decodes, chunks, num_tokens, pad = case
    state = make_state(num_tokens)
    step, batch = make_step(decodes, chunks, pad)
    OPS.prepare_inputs(state, step, batch, BLOCK)

    def slot(row: int, position: int) -> int:
        return int(state.block_tables[row, position // BLOCK]) * BLOCK + position % BLOCK

    tokens = [(100 + row, num_tokens[row] - 1, slot(row, num_tokens[row] - 1)) for row in decodes] + [(0, 0, -1)] * pad
    contexts, logit_index, starts, next_id = [num_tokens[row] for row in decodes] + [0] * pad, list(range(len(decodes))) + [0] * pad, [0], 500
    starts += list(range(1, len(tokens) + 1))
    for row, start, length in chunks:
        tokens += [(next_id + i, start + i, slot(row, start + i)) for i in range(length)]
        next_id += length
        contexts.append(start + length)
        logit_index.append(len(tokens) - 1)
        starts.append(len(tokens))
    contexts, logit_index, starts = contexts + [0] * pad, logit_index + [0] * pad, starts + [len(tokens)] * pad
    tokens += [(0, 0, -1)] * pad
    assert list(zip(batch.input_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)) == tokens
    assert batch.context_lens.tolist() == contexts
    assert batch.logit_index.tolist() == logit_index
    assert batch.query_start.tolist() == starts
    assert torch.equal(batch.rows, step.rows)


@settings(max_examples=50, deadline=None)
@given(steps())
def test_commit_changes_only_rows_that_sampled(case: tuple[list[int], list[tuple[int, int, int]], list[int], int]) -> None:
    """Decodes and final chunks move on by one token; other chunks, other rows and the dummy stay."""
    decodes, chunks, num_tokens, pad = case
    state = make_state(num_tokens)
    state.output_counts = torch.zeros(NUM_ROWS, 50, dtype=torch.int32)
    step, batch = make_step(decodes, chunks, pad)
    OPS.prepare_inputs(state, step, batch, BLOCK)
    wanted, counts = state.params.clone(), state.output_counts.clone()
    drawn = torch.arange(len(step.rows), dtype=torch.int32) % 5 + 30
    for entry, row in enumerate(step.rows.tolist()):
        if step.samples[entry]:
            wanted[row, k.LAST_ID] = drawn[entry]
            wanted[row, k.NUM_TOKENS] = batch.context_lens[entry] + 1
            wanted[row, k.OUTPUT_INDEX] += 1
            counts[row, drawn[entry]] += 1
    OPS.commit_sampled(state, step, batch, drawn)
    assert torch.equal(state.params, wanted)
    assert torch.equal(state.output_counts, counts)


def test_updates_set_rows_and_single_blocks() -> None:
    """Rows are replaced whole, blocks one by one, and empty updates do nothing."""
    state = make_state([3] * DUMMY)
    params, tables = state.params.clone(), state.block_tables.clone()
    none = torch.zeros(0, dtype=torch.int32)
    OPS.apply_updates(state, none, none.view(0, k.NUM_PARAMS), none.view(0, 3))
    assert torch.equal(state.params, params)
    new = torch.arange(2 * k.NUM_PARAMS, dtype=torch.int32).view(2, -1)
    OPS.apply_updates(state, torch.tensor([5, 2], dtype=torch.int32), new, torch.tensor([[1, 3, 70], [6, 0, 71]], dtype=torch.int32))
    params[5], params[2], tables[1, 3], tables[6, 0] = new[0], new[1], 70, 71
    assert torch.equal(state.params, params)
    assert torch.equal(state.block_tables, tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_round_once(dtype: torch.dtype) -> None:
    """rms_norm follows its formula in float64 to one rounding; add_rms_norm adds into the residual in place first."""
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 33), (5, 33), (33,)))

    def formula(t: torch.Tensor) -> torch.Tensor:
        wide = t.double()
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(OPS.rms_norm(x, weight, 1e-5).double(), formula(x), rtol=tolerance, atol=1e-7)
    added = (x.float() + residual.float()).to(dtype)
    found = OPS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, added)
    torch.testing.assert_close(found.double(), formula(added), rtol=tolerance, atol=1e-7)


def test_silu_mul_takes_the_gate_first() -> None:
    """silu(gate) * up, with the gate in the first half."""
    gate, up = [0.5, -2.0, 30.0], [3.0, 5.0, -1.0]
    found = OPS.silu_mul(torch.tensor([gate + up]))
    wanted = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    torch.testing.assert_close(found, torch.tensor([wanted]))


@pytest.mark.parametrize("kind", BLOCK_SIZES)
def test_dequantisation_has_the_bits_of_the_gguf_package(kind: str) -> None:
    """Random bytes as blocks, every kind; scales that are not numbers are kept out."""
    values, size = BLOCK_SIZES[kind]
    data = np.random.default_rng(1).integers(0, 256, (37, 3 * size), dtype=np.uint8)
    with warnings.catch_warnings(action="ignore"):
        wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    found = dequantize_rows(kind, torch.from_numpy(data))
    assert found.shape == (37, 3 * values)
    assert row_bytes(kind, 3 * values) == 3 * size
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    weight = k.GgufTensor(kind, (37, 3 * values), torch.from_numpy(data))
    torch.testing.assert_close(dequantize(weight, torch.bfloat16), wanted.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_block_kinds_and_lengths_that_do_not_exist_are_errors() -> None:
    """The message names the kind or the length."""
    with pytest.raises(ValueError, match="IQ2_XS"):
        row_bytes("IQ2_XS", 256)
    with pytest.raises(ValueError, match="100"):
        row_bytes("Q4_0", 100)


def test_linear_stacks_parts_and_adds_the_bias() -> None:
    """Dense and quantised parts in one projection, with the bytes it holds."""
    data = torch.from_numpy(gguf.quantize(np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0))
    quantised, dense, bias = k.GgufTensor("Q8_0", (5, 64), data), torch.randn(3, 64), torch.randn(8)
    linear, num_bytes = OPS.make_linear([quantised, dense], bias, device=torch.device("cpu"), dtype=torch.float32, quantization="auto")
    x = torch.randn(4, 64)
    torch.testing.assert_close(linear(x), x @ torch.cat((dequantize(quantised), dense)).T + bias)
    assert num_bytes == 8 * 64 * 4 + 8 * 4


def test_one_dense_part_is_shared_not_copied() -> None:
    """A tied head uses the embedding's own memory."""
    table = torch.randn(7, 8)
    linear, _ = OPS.make_linear([table], None, device=torch.device("cpu"), dtype=torch.float32, quantization="none")
    assert isinstance(linear, DenseLinear)
    assert linear.weight is table


def test_unknown_quantisation_is_an_error() -> None:
    """This device has no int8 kernels and says so."""
    with pytest.raises(ValueError, match="int8"):
        OPS.make_linear([torch.randn(7, 8)], None, device=torch.device("cpu"), dtype=torch.float32, quantization="int8")
