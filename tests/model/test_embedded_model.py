"""The embedded GGUF against transformers on the same file, float32, token for token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from paged_loop import PagedLoop
from transformers import AutoModelForCausalLM, PreTrainedModel

from appliance.kernels.reference import ReferenceOps
from appliance.model.decoder import Decoder, load_model
from appliance.model.weights import open_weights
from appliance.text.load import load_text

NEAR_TIE = 1e-4  # of the top two logits: float32 sums in another order may swap them
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, the first humans",
    "Question: Why is the sky blue?\nAnswer:",
    "SELECT name, age FROM users WHERE",
    "A list of healthy breakfasts:\n-",
    "My favourite season is autumn because",
    "The mitochondrion is",
    "Il était une fois",
    "To make a good cup of tea,",
    "Roses are red,",
    "The difference between a virus and a bacterium is",
    "Alice: How are you today?\nBob:",
    "According to the theory of relativity,",
    "x",
)


@pytest.fixture(scope="module")
def decoder(embedded_model: Path) -> Decoder:
    return load_model(str(embedded_model), ops=ReferenceOps(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(embedded_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(embedded_model.parent), gguf_file=embedded_model.name, dtype=torch.float32).eval()


def encode(embedded_model: Path, prompts: tuple[str, ...]) -> list[list[int]]:
    tokenizer = load_text(str(embedded_model)).tokenizer
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]


def assert_same_tokens(decoder: Decoder, theirs: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> int:
    """Each token of our batched, chunked and padded run is the one that transformers takes after the same ids; returns how many near-ties fell
    the other way. One forward of theirs over prompt and outputs gives all of its choices, whatever its version calls its cache.
    """
    contexts = PagedLoop(decoder, ReferenceOps(), block_size=16, num_blocks=512).greedy_batch(prompts, num_tokens, chunk=8)
    num_near_ties = 0
    for prompt, context in zip(prompts, contexts, strict=True):
        ids = torch.tensor(context.ids[: len(prompt) + num_tokens])
        logits = theirs(ids[:-1].unsqueeze(0)).logits[0, len(prompt) - 1 :]
        drawn = ids[len(prompt) :]
        gaps = logits.amax(dim=1) - logits.gather(1, drawn.unsqueeze(1)).squeeze(1)
        assert gaps.max() < NEAR_TIE, f"token {int(gaps.argmax())} of {prompt} lies {gaps.max():.2e} below transformers' choice"
        num_near_ties += int((drawn != logits.argmax(dim=1)).sum())
    return num_near_ties


def test_greedy_tokens_equal_those_of_transformers(decoder: Decoder, theirs: PreTrainedModel, embedded_model: Path) -> None:
    """Three prompts, 20 tokens each."""
    assert assert_same_tokens(decoder, theirs, encode(embedded_model, PROMPTS[:3]), 20) == 0


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_greedy_tokens_equal_those_of_transformers_for_twenty_prompts(decoder: Decoder, theirs: PreTrainedModel, embedded_model: Path) -> None:
    """Twenty prompts, 64 tokens each; at most one may part at a near-tie."""
    assert assert_same_tokens(decoder, theirs, encode(embedded_model, PROMPTS), 64) <= 1


def test_weights_equal_those_that_transformers_reads(theirs: PreTrainedModel, embedded_model: Path) -> None:
    """Every tensor, the un-permuted Q and K included, has the bits of transformers' dequantisation."""
    from appliance.kernels.gguf_blocks import dequantize
    from appliance.kernels.ops import GgufTensor

    weights = open_weights(str(embedded_model), device=torch.device("cpu"), dtype=torch.float32)
    for name, wanted in theirs.named_parameters():
        found = weights.get(name, tuple(wanted.shape))
        assert torch.equal(dequantize(found) if isinstance(found, GgufTensor) else found, wanted), name


def test_opening_the_file_parses_no_vocabulary(embedded_model: Path) -> None:
    """The header is stepped through in well under a second, where the gguf package takes several."""
    started = time.process_time()
    weights = open_weights(str(embedded_model), device=torch.device("cpu"), dtype=torch.float32)
    assert time.process_time() - started < 0.5
    assert weights.config.vocab_size == 49152
    assert weights.config.tie_word_embeddings


def test_the_embedding_stays_quantised(decoder: Decoder) -> None:
    """The table is looked up in the file's own rows: with float32 weights it adds 612 bytes a row, not 2,304."""
    config = decoder.config
    table = config.vocab_size * 612
    rope = decoder.max_positions * config.rope.width * 4
    assert decoder.weight_bytes == 4 * decoder.num_parameters + table + rope
