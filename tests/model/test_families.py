"""Tiny random models of each family against transformers' own modules, float32, same weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paged_loop import PagedLoop
from torch import Tensor, nn
from transformers import PreTrainedModel

from appliance.kernels.reference import ReferenceOps
from appliance.model.decoder import Decoder, load_model

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "llama_tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama_biased": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "llama_head_dim": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, head_dim=16)),
    "llama_llama3_rope": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, rope_parameters={**LLAMA3, "original_max_position_embeddings": 32})
    ),
    "llama_linear_rope": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0})
    ),
    "llama_yarn_rope": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=13)),
    "mistral_full": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=None)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL)),
    "qwen2_sliding": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=11, max_window_layers=1)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16)),
}
LENGTHS = (1, 2, 8, 9, 31, 47)
NUM_OUTPUTS = 12


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Decoder]:
    """transformers' model and ours from the folder that the first one saved."""
    torch.manual_seed(7)
    theirs = MAKERS[request.param]().eval()
    for parameter in theirs.parameters():  # weights of everyday size, biases and norms included, so that each of them matters
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.shape[0] in (48, 16) else 0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    return theirs, load_model(str(tmp_path), ops=ReferenceOps(), device=torch.device("cpu"), dtype=torch.float32)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(SMALL["vocab_size"]) for _ in range(length)] for length in LENGTHS]


def last_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0, -1]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert error < 2e-5, f"relative error {error:.2e}"


def test_prefill_decode_and_chunks_give_the_logits_of_transformers(model: tuple[PreTrainedModel, Decoder]) -> None:
    """Whole prompts, prompts in chunks of 1 and 7, and decoded tokens have the logits of the full context at once."""
    theirs, decoder = model
    for prompt in prompts():
        wanted = last_logits(theirs, prompt)
        for chunk in (len(prompt), 7, 1):
            loop = PagedLoop(decoder, ReferenceOps())
            context = loop.add(prompt)
            while context.num_stored < len(prompt):
                logits = loop.step([], [(context, min(chunk, len(prompt) - context.num_stored))])
            assert_close(logits[0], wanted)
        for _ in range(3):
            ids = list(context.ids)
            assert_close(loop.step([context])[0], last_logits(theirs, ids))


def test_a_mixed_padded_batch_decodes_the_tokens_of_each_sequence_alone(model: tuple[PreTrainedModel, Decoder]) -> None:
    """Greedy outputs of all prompts together, in chunks among decodes and padding, equal transformers' of each by itself."""
    theirs, decoder = model
    contexts = PagedLoop(decoder, ReferenceOps()).greedy_batch(prompts(), NUM_OUTPUTS)
    for prompt, context in zip(prompts(), contexts, strict=True):
        ids = list(prompt)
        for _ in range(NUM_OUTPUTS):
            ids.append(int(last_logits(theirs, ids).argmax()))
        assert context.ids[: len(ids)] == ids


def test_num_parameters_is_transformers_own_count(model: tuple[PreTrainedModel, Decoder]) -> None:
    """Tied embeddings count once, in parameters and in bytes."""
    theirs, decoder = model
    assert decoder.num_parameters == theirs.num_parameters()
    table = decoder.max_positions * decoder.config.rope.width * 4
    assert decoder.weight_bytes == 4 * decoder.num_parameters + table
