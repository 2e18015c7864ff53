"""Sampling in Triton draws the ids that reference.sample defines."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from appliance.kernels import filtered_sampling, ops, sampling, scores
from appliance.kernels.philox import gumbel_noise
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

TRITON, TWIN = TritonOps(), ReferenceOps()
NEUTRAL = {ops.TOP_P: 1.0, ops.REPETITION_PENALTY: 1.0}


def make_state(rows: list[dict[int, float]], device: torch.device) -> ops.RowState:
    """One row for each dict of column -> value, with its own seed and output index."""
    params = torch.zeros(len(rows), ops.NUM_PARAMS, dtype=torch.int32)
    floats = params.view(torch.float32)
    for i, columns in enumerate(rows):
        params[i, ops.OUTPUT_INDEX], params[i, ops.SEED_LOW], params[i, ops.SEED_HIGH] = 3 * i, -1 - 7919 * i, 12345 + i
        for column, value in (NEUTRAL | columns).items():
            if column == ops.TOP_K:
                params[i, column] = int(value)
            else:
                floats[i, column] = value
    return ops.RowState(params.to(device), torch.zeros(len(rows), 1, dtype=torch.int32, device=device))


def random_logits(num_rows: int, vocab: int, device: torch.device, spread: float = 3.0) -> Tensor:
    """Logits with a few likely ids and a long tail."""
    return (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(device)


def _noise_kernel(out, ids, output_index, seed_low, seed_high, N: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, N)
    noise = scores.gumbel(tl.load(ids + lane), tl.load(output_index), tl.load(seed_low), tl.load(seed_high))
    tl.store(out + lane, noise)


def test_noise_equals_its_twin_everywhere(device: torch.device) -> None:
    """The words are those of Philox, bit for bit, so the noise agrees to float32 rounding, also near u = 0 and u = 1."""
    kernel = triton.jit(_noise_kernel)
    ids = torch.arange(8192, dtype=torch.int32, device=device)
    for index, low, high in [(0, 0, 0), (5, -1, 7), (2**31 - 1, -(2**31), 123456789)]:
        scalars = [torch.tensor([value], dtype=torch.int32, device=device) for value in (index, low, high)]
        out = torch.empty(8192, device=device)
        kernel[(1,)](out, ids, *scalars, N=8192)
        expected = gumbel_noise(ids, *scalars)
        assert torch.allclose(out, expected, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("vocab", [5, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Ties, frequent in bf16, go to the lowest id; the split over programs does not show."""
    logits = random_logits(3, vocab, device).to(dtype)
    logits[1, vocab // 2] = logits[1, vocab - 1] = logits[1, 2] = 40.0
    logits[2] = -torch.inf
    logits[2, vocab - 1] = -5.0
    batch = ops.SamplingBatch(torch.tensor([2, 0, 1], dtype=torch.int32, device=device), make_state([{}] * 3, device), all_greedy=True)
    ids = TRITON.sample(logits, batch).token_ids.tolist()
    assert ids[1:] == [2, vocab - 1]
    assert ids == TWIN.sample(logits, batch).token_ids.tolist()


def test_temperature_alone_draws_what_the_twin_draws(device: torch.device) -> None:
    """Rows of several temperatures, a greedy one among them, over a vocabulary that no tile divides; counters end at zero."""
    state = make_state([{ops.TEMPERATURE: t} for t in (1.0, 0.0, 0.3, 2.5, 1e-3, 1.0)], device)
    rows = torch.tensor([5, 4, 3, 2, 1, 0], dtype=torch.int32, device=device)
    for _ in range(2):
        logits = random_logits(6, 5003, device)
        batch = ops.SamplingBatch(rows, state)
        assert TRITON.sample(logits, batch).token_ids.tolist() == TWIN.sample(logits, batch).token_ids.tolist()
        state.params[:, ops.OUTPUT_INDEX] += 1
    assert not sampling.arrival_counters(device).any()


FILTERS: list[dict[int, float]] = [
    {ops.TOP_K: 1},
    {ops.TOP_K: 7},
    {ops.TOP_K: 5000},
    {ops.TOP_P: 0.0},
    {ops.TOP_P: 0.5},
    {ops.TOP_P: 0.99},
    {ops.MIN_P: 0.2},
    {ops.MIN_P: 1.0},
    {ops.TOP_K: 20, ops.TOP_P: 0.8},
    {ops.TOP_K: 40, ops.TOP_P: 0.95, ops.MIN_P: 0.05},
    {ops.TEMPERATURE: 0.0, ops.TOP_K: 3},
    {},
]


@pytest.mark.parametrize("quantum", [0.0, 0.5])
@pytest.mark.parametrize("vocab", [60, 3001])
def test_filters_keep_what_the_twin_keeps(vocab: int, quantum: float, device: torch.device) -> None:
    """Each filter and their combinations, over several draws; with a quantum most scores tie, so the cut falls between equal ones."""
    state = make_state([{ops.TEMPERATURE: 1.3} | filters for filters in FILTERS], device)
    rows = torch.arange(len(FILTERS), dtype=torch.int32, device=device)
    logits = random_logits(len(FILTERS), vocab, device)
    if quantum:
        logits = (logits / quantum).round() * quantum
    batch = ops.SamplingBatch(rows, state, use_top_k=True, use_top_p=True, use_min_p=True)
    for _ in range(3):
        assert TRITON.sample(logits, batch).token_ids.tolist() == TWIN.sample(logits, batch).token_ids.tolist()
        state.params[:, ops.OUTPUT_INDEX] += 1


@pytest.mark.parametrize("quantum", [0.0, 0.5])
@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_few_candidates_do_not_change_the_draw(spread: float, quantum: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose kept ids are all among the candidates, rows whose are not (flat ones, top-k past what is wanted), and overflows."""
    monkeypatch.setattr(filtered_sampling, "_WANTED", 8)
    monkeypatch.setattr(filtered_sampling, "_CAPACITY", 64)
    state = make_state([{ops.TEMPERATURE: 0.8} | filters for filters in FILTERS], device)
    logits = random_logits(len(FILTERS), 1001, device, spread)
    if quantum:
        logits = (logits / quantum).round() * quantum
    batch = ops.SamplingBatch(torch.arange(len(FILTERS), dtype=torch.int32, device=device), state, use_top_k=True, use_top_p=True, use_min_p=True)
    for _ in range(2):
        assert TRITON.sample(logits, batch).token_ids.tolist() == TWIN.sample(logits, batch).token_ids.tolist()
        state.params[:, ops.OUTPUT_INDEX] += 1


@pytest.mark.parametrize("flag", ["use_top_k", "use_top_p", "use_min_p"])
def test_a_filter_whose_flag_is_off_is_not_applied(flag: str, device: torch.device) -> None:
    """The host's flags choose the kernel's variant."""
    state = make_state([{ops.TEMPERATURE: 1.0, ops.TOP_K: 2, ops.TOP_P: 0.3, ops.MIN_P: 0.5}] * 4, device)
    batch = ops.SamplingBatch(torch.arange(4, dtype=torch.int32, device=device), state, **{flag: True})
    logits = random_logits(4, 200, device, spread=1.0)
    assert TRITON.sample(logits, batch).token_ids.tolist() == TWIN.sample(logits, batch).token_ids.tolist()


def test_penalties_bias_and_logprobs_match_the_twin(device: torch.device) -> None:
    """Adjusted logits, forbidden ids, duplicate biases; log-probabilities, ranks and the top ids in their order."""
    vocab = 1501
    penalties = {ops.REPETITION_PENALTY: 1.4, ops.PRESENCE_PENALTY: 0.6, ops.FREQUENCY_PENALTY: 0.3}
    state = make_state([{ops.TEMPERATURE: 0.9} | penalties, penalties, {ops.TEMPERATURE: 1.0}], device)
    generator = torch.Generator().manual_seed(5)
    state.prompt_mask = (torch.rand(3, vocab, generator=generator) < 0.3).to(device)
    state.output_counts = torch.randint(0, 3, (3, vocab), generator=generator, dtype=torch.int32).to(device)
    logits = random_logits(3, vocab, device)
    best = int(logits[2].argmax())
    batch = ops.SamplingBatch(
        torch.tensor([1, 0, 2], dtype=torch.int32, device=device),
        state,
        use_penalties=True,
        bias_entries=torch.tensor([0, 0, 2, 2], device=device),
        bias_ids=torch.tensor([7, 7, best, 11], device=device),
        bias_values=torch.tensor([20.0, 20.0, -torch.inf, 5.0], device=device),
        num_logprobs=5,
    )
    before = logits.clone()
    result, expected = TRITON.sample(logits, batch), TWIN.sample(logits, batch)
    assert torch.equal(logits, before)
    assert result.token_ids.tolist() == expected.token_ids.tolist()
    assert result.token_ids.tolist()[0] == 7
    assert result.ranks.tolist() == expected.ranks.tolist()
    assert result.top_ids.tolist() == expected.top_ids.tolist()
    assert torch.allclose(result.logprobs, expected.logprobs, atol=1e-5)
    assert torch.allclose(result.top_logprobs, expected.top_logprobs, atol=1e-5)


def test_bias_alone_leaves_the_logits_alone(device: torch.device) -> None:
    """The caller's logits are an input; zero logprobs return none but the drawn id's."""
    logits = random_logits(2, 90, device)
    before = logits.clone()
    one = torch.tensor([1], device=device)
    batch = ops.SamplingBatch(
        torch.zeros(2, dtype=torch.int32, device=device), make_state([{}], device), all_greedy=True, bias_entries=one, bias_ids=one * 3,
        bias_values=torch.tensor([100.0], device=device), num_logprobs=0,
    )  # fmt: skip
    result, expected = TRITON.sample(logits, batch), TWIN.sample(logits, batch)
    assert torch.equal(logits, before)
    assert result.token_ids.tolist() == expected.token_ids.tolist()
    assert result.top_ids.shape == (2, 0)
    assert torch.allclose(result.logprobs, expected.logprobs, atol=1e-5)
