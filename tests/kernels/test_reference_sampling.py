"""Sampling in plain torch against one row, one id at a time in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.kernels import ops as k
from appliance.kernels import reference_sampling
from appliance.kernels.philox import gumbel_noise, noise_words, philox4x32
from appliance.kernels.reference import ReferenceOps

OPS = ReferenceOps()
MASK = 0xFFFFFFFF


@dataclass
class Row:
    """One row's parameters and history."""

    seed: int = 0
    output_index: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)


def make_batch(rows: list[Row], vocab: int, num_logprobs: int | None = None) -> k.SamplingBatch:
    """The rows in reverse order of row slots, all features on."""
    num = len(rows)
    state = k.RowState(torch.zeros(num + 1, k.NUM_PARAMS, dtype=torch.int32), torch.zeros(num + 1, 1, dtype=torch.int32))
    state.prompt_mask = torch.zeros(num + 1, vocab, dtype=torch.bool)
    state.output_counts = torch.zeros(num + 1, vocab, dtype=torch.int32)
    bias = [(entry, token, value) for entry, row in enumerate(rows) for token, value in row.bias.items()]
    for entry, row in enumerate(rows):
        slot = num - 1 - entry
        words = row.seed & MASK, (row.seed >> 32) & MASK
        for column, word in ((k.SEED_LOW, words[0]), (k.SEED_HIGH, words[1])):
            state.ints(column)[slot] = word - (1 << 32) if word >> 31 else word
        state.ints(k.OUTPUT_INDEX)[slot] = row.output_index
        state.ints(k.TOP_K)[slot] = row.top_k
        for column, value in (
            (k.TEMPERATURE, row.temperature),
            (k.TOP_P, row.top_p),
            (k.MIN_P, row.min_p),
            (k.REPETITION_PENALTY, row.repetition),
            (k.PRESENCE_PENALTY, row.presence),
            (k.FREQUENCY_PENALTY, row.frequency),
        ):
            state.floats(column)[slot] = value
        state.prompt_mask[slot, row.prompt] = True
        for token in row.outputs:
            state.output_counts[slot, token] += 1
    return k.SamplingBatch(
        rows=torch.arange(num - 1, -1, -1, dtype=torch.int32),
        state=state,
        use_top_k=any(row.top_k for row in rows),
        use_top_p=any(row.top_p < 1 for row in rows),
        use_min_p=any(row.min_p > 0 for row in rows),
        use_penalties=any(row.repetition != 1 or row.presence or row.frequency for row in rows),
        bias_entries=torch.tensor([entry for entry, _, _ in bias]) if bias else None,
        bias_ids=torch.tensor([token for _, token, _ in bias]) if bias else None,
        bias_values=torch.tensor([value for _, _, value in bias]) if bias else None,
        num_logprobs=num_logprobs,
    )


def adjusted(logits: list[float], row: Row) -> list[float]:
    """Penalties, then bias."""
    out = list(logits)
    for token in set(row.prompt) | set(row.outputs):
        out[token] = out[token] / row.repetition if out[token] > 0 else out[token] * row.repetition
    for token in set(row.outputs):
        out[token] -= row.outputs.count(token) * row.frequency + row.presence
    for token, value in row.bias.items():
        out[token] += value
    return out


def kept(scaled: list[float], row: Row) -> list[int]:
    """The ids that the filters leave, in order."""
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    if row.top_k:
        order = order[: row.top_k]
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    if row.top_p < 1:
        mass, count = 0.0, 0
        while count < len(order) and (count == 0 or mass < row.top_p * sum(weights)):
            mass += weights[count]
            count += 1
        order, weights = order[:count], weights[:count]
    return [token for token, weight in zip(order, weights, strict=True) if weight >= row.min_p or token == order[0]]


def naive(logits: list[float], row: Row, noise: list[float]) -> int:
    """The drawn id."""
    logits = adjusted(logits, row)
    if row.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    scaled = [x / row.temperature for x in logits]
    return max(kept(scaled, row), key=lambda token: (scaled[token] + noise[token], -token))


# Values on a coarse grid, so that ties are frequent and sums and quotients are far from the boundaries of the filters in either precision.
logit_rows = st.lists(st.integers(-12, 12).map(lambda x: x / 2), min_size=11, max_size=11)
tokens = st.integers(0, 10)
rows = st.builds(
    Row,
    seed=st.integers(0, (1 << 64) - 1),
    output_index=st.integers(0, 5000),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 10, 11, 40]),
    top_p=st.sampled_from([1.0, 0.13, 0.517, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.0213, 0.4]),
    repetition=st.sampled_from([1.0, 1.25, 0.5]),
    presence=st.sampled_from([0.0, 0.5, -0.75]),
    frequency=st.sampled_from([0.0, 0.25]),
    prompt=st.lists(tokens, max_size=4),
    outputs=st.lists(tokens, max_size=4),
    bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0, -math.inf]), max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(logit_rows, rows), min_size=1, max_size=4), st.sampled_from([1, 4, 1024]))
def test_draws_equal_the_definition(case: list[tuple[list[float], Row]], num_candidates: int) -> None:
    """Every mix of penalties, bias, temperature and filters, whether or not the first candidates hold all that is kept."""
    params = [row for _, row in case]
    batch = make_batch(params, 11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_sampling, "_NUM_CANDIDATES", num_candidates)
        found = OPS.sample(torch.tensor([logits for logits, _ in case]), batch).token_ids.tolist()
    for token, (logits, row) in zip(found, case, strict=True):
        seed_low, seed_high, index = (torch.tensor(word) for word in (row.seed & MASK, row.seed >> 32, row.output_index))
        noise = gumbel_noise(torch.arange(11), index, seed_low, seed_high).tolist()
        assert token == naive(logits, row, noise)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Alone or among others of other features: the same id."""
    generator = torch.Generator().manual_seed(1)
    many = [
        Row(seed=i << 20, temperature=0.3 * i, top_k=5 * (i % 3), top_p=1 - 0.1 * (i % 4), min_p=0.05 * (i % 2), output_index=i) for i in range(12)
    ]
    logits = torch.randn(12, 3000, generator=generator) * 3
    together = OPS.sample(logits, make_batch(many, 3000)).token_ids.tolist()
    assert together == [int(OPS.sample(logits[i : i + 1], make_batch([row], 3000)).token_ids[0]) for i, row in enumerate(many)]


def test_draws_follow_the_softmax() -> None:
    """Frequencies over 20,000 output indices lie within five standard errors of the probabilities."""
    num, logits = 20_000, torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0])
    batch = make_batch([Row(seed=99)], 5)
    batch.state.params = batch.state.params[:1].repeat(num, 1)
    batch.state.ints(k.OUTPUT_INDEX)[:] = torch.arange(num, dtype=torch.int32)
    batch.rows = torch.arange(num, dtype=torch.int32)
    drawn = OPS.sample(logits.repeat(num, 1), batch).token_ids
    shares = torch.bincount(drawn, minlength=5) / num
    wanted = logits.softmax(0)
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / num).sqrt() + 1e-9).all()


def test_top_p_stops_at_the_mass_it_asks_for() -> None:
    """Of four equal ids, 0.5 keeps the two lowest and not a third, whatever the noise."""
    params = [Row(seed=seed, top_p=0.5) for seed in range(40)]
    assert set(OPS.sample(torch.zeros(40, 4), make_batch(params, 4)).token_ids.tolist()) == {0, 1}


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    """Whether the whole batch is greedy or only one row."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    batch = make_batch([Row(temperature=0), Row(temperature=0)], 4)
    assert OPS.sample(logits, batch).token_ids.tolist() == [1, 0]
    batch.all_greedy = True
    assert OPS.sample(logits.bfloat16(), batch).token_ids.tolist() == [1, 0]


def test_logprobs_are_of_the_penalised_logits_before_temperature() -> None:
    """Log-probability, rank and top ids of step 2's logits; equal ones by rising id; the input logits are left as they were."""
    row = Row(temperature=0, repetition=2.0, prompt=[0], outputs=[4, 4], frequency=0.5, presence=0.25, bias={3: 1.0})
    logits = torch.tensor([[4.0, 1.0, -1.0, 0.0, -1.0, 1.0]])
    before = logits.clone()
    sampled = OPS.sample(logits, make_batch([row], 6, num_logprobs=4))
    wanted = torch.tensor([2.0, 1.0, -1.0, 1.0, -3.25, 1.0]).log_softmax(0)
    assert torch.equal(logits, before)
    assert sampled.token_ids.tolist() == [0]
    assert sampled.top_ids is not None
    assert sampled.top_ids.tolist() == [[0, 1, 3, 5]]
    torch.testing.assert_close(sampled.logprobs, wanted[:1])
    torch.testing.assert_close(sampled.top_logprobs, wanted[[0, 1, 3, 5]].unsqueeze(0))
    assert sampled.ranks is not None
    assert sampled.ranks.tolist() == [1]


def test_rank_counts_higher_logits_and_zero_top_ids_are_allowed() -> None:
    """A drawn id that is not the best has its rank; num_logprobs = 0 gives its log-probability alone."""
    logits = torch.tensor([[5.0, 9.0, 7.0, 9.0]])
    sampled = OPS.sample(logits, make_batch([Row(temperature=0, bias={1: -3.0, 3: -3.0})], 4, num_logprobs=0))
    assert sampled.token_ids.tolist() == [2]
    assert sampled.top_ids is not None
    assert sampled.top_ids.shape == (1, 0)
    sampled = OPS.sample(logits, make_batch([Row(seed=1, top_k=3, temperature=1e-3, bias={1: -20.0, 3: -20.0})], 4, num_logprobs=1))
    assert sampled.ranks is not None
    assert sampled.ranks.tolist() == [1]


def test_penalties_without_history_are_an_error() -> None:
    """The runner allocates the history before it asks for penalties."""
    batch = make_batch([Row(presence=1.0)], 4)
    batch.state.prompt_mask = None
    with pytest.raises(ValueError, match="prompt_mask"):
        OPS.sample(torch.zeros(1, 4), batch)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_has_the_words_of_random123(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The known-answer vectors of philox4x32-10."""
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == words


def test_noise_takes_every_word_of_every_counter_once() -> None:
    """Over 1,024 ids: the four words of 256 counters, each at the id that the definition names."""
    index, low, high = torch.tensor(3), torch.tensor(17), torch.tensor(5)
    found = noise_words(torch.arange(2048), index, low, high)
    zero = torch.tensor(0)
    words = philox4x32((torch.arange(512), index, zero, zero), (low, high))
    expected = torch.stack([word.view(2, 256) for word in words], dim=1)  # [counters' block, word, lane]
    assert torch.equal(found, expected.flatten())


def test_noise_is_finite_at_the_extreme_words_and_takes_signed_seeds() -> None:
    """Words 0 and 2^32 - 1 give -log(-log u) with u exact; a seed word as negative int32 stands for its bits."""
    for word in (0, MASK):
        uniform = (word + 0.5) / 2**32
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("appliance.kernels.philox.philox4x32", lambda *_, word=word: (torch.tensor([word]),) * 4)
            noise = gumbel_noise(torch.tensor([1]), torch.tensor(0), torch.tensor(0), torch.tensor(0))
        assert float(noise[0]) == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6)
    ids, zero = torch.arange(9), torch.tensor(0)
    assert torch.equal(gumbel_noise(ids, zero, torch.tensor(-1, dtype=torch.int32), zero), gumbel_noise(ids, zero, torch.tensor(MASK), zero))
