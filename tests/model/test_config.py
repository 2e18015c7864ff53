"""Configurations: what transformers makes of the same config.json, GGUF metadata, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from appliance.errors import ModelError
from appliance.model.config import ModelConfig, RopeConfig, load_config, parse_config, parse_gguf_config
from appliance.model.rope import cos_sin_table, inverse_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.eos_token_id": 2,
}


def parse(**changes: Any) -> ModelConfig:
    return parse_config({**LLAMA, **changes}, "config.json")


def test_plain_llama() -> None:
    """Sizes as they stand there, defaults as transformers has them."""
    config = parse(eos_token_id=[2, 5], torch_dtype="bfloat16")
    assert (config.head_dim, config.num_kv_heads, config.sliding_windows) == (8, 2, (None,) * 4)
    assert config.rope == RopeConfig(10_000.0, 8)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2, 5), None, "bfloat16")
    assert not any((config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.7},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.7, "mscale_all_dim": 1.2},
    ],
)
def test_rope_kinds_equal_those_of_transformers(scaling: dict[str, Any]) -> None:
    """Frequencies and attention factor, from old and new spelling alike."""
    old = parse(head_dim=32, rope_theta=50_000.0, rope_scaling={("type" if k == "rope_type" else k): v for k, v in scaling.items()})
    new = parse(head_dim=32, rope_parameters={"rope_theta": 50_000.0, **scaling})
    assert old.rope == new.rope
    theirs = AutoConfig.for_model(**LLAMA, head_dim=32, rope_parameters={"rope_theta": 50_000.0, **scaling})
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    found, factor = inverse_frequencies(new.rope)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor)


def test_cos_sin_table_has_cosines_then_sines() -> None:
    """Row p holds cos and sin of p times each frequency; frequency factors divide."""
    table = cos_sin_table(RopeConfig(100.0, 4), 7, torch.device("cpu"), torch.tensor([1.0, 2.0]))
    angles = torch.outer(torch.arange(7.0), torch.tensor([1.0, 0.05]))
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), 1))


def test_families_differ_in_biases_norms_heads_and_windows() -> None:
    """Qwen2 has QKV biases, Qwen3 per-head norms and heads of 128; Mistral slides everywhere, Qwen past max_window_layers or by layer_types."""
    qwen2, qwen3, mistral = parse(model_type="qwen2"), parse(model_type="qwen3"), parse(model_type="mistral", sliding_window=77)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert mistral.sliding_windows == (77,) * 4
    assert parse(model_type="mistral", sliding_window=None).sliding_windows == (None,) * 4
    assert parse(model_type="mistral").sliding_windows == (4096,) * 4
    sliding = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
    assert parse(**sliding, max_window_layers=3).sliding_windows == (None, None, None, 9)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert parse(**sliding, layer_types=kinds).sliding_windows == (9, None, 9, None)
    assert parse(**{**sliding, "use_sliding_window": False}).sliding_windows == (None,) * 4
    biased = parse(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"num_key_value_heads": 3}, "8 attention heads are no multiple of 3"),
        ({"head_dim": 7}, "head size 7"),
        ({"partial_rotary_factor": 2.0}, "16 rotary dimensions"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear_attention"] * 4}, "layer_types holds linear_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], words: str) -> None:
    """The error says which file, which field and what stood there."""
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_a_folder_without_a_readable_config_is_an_error(tmp_path: Path) -> None:
    """Missing, not JSON, and JSON that is no object."""
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_config(tmp_path) == parse()


def test_gguf_metadata_gives_the_same_config() -> None:
    """But for the dtype, which a GGUF file has none of; tying and biases come from the tensors."""
    config = parse_gguf_config(GGUF, {"output.weight"}, 1000, "m.gguf")
    assert config == replace(parse(eos_token_id=2), source="m.gguf")
    tensors = {"blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"}
    config = parse_gguf_config({**GGUF, "llama.attention.key_length": 16, "llama.attention.sliding_window": 9}, tensors, 1000, "m.gguf")
    assert (config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.qk_norm) == (True, True, False, True)
    assert (config.head_dim, config.sliding_windows) == (16, (9,) * 4)


def test_gguf_rope_scaling() -> None:
    """Linear and yarn; llama.cpp multiplies attn_factor by 0.1 ln(factor) + 1."""
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert parse_gguf_config({**GGUF, **scaling}, (), 10, "m").rope == RopeConfig(10_000.0, 8, "linear", 2.0)
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 1024}
    rope = parse_gguf_config({**GGUF, **scaling}, (), 10, "m").rope
    assert (rope.kind, rope.original_max_positions) == ("yarn", 1024)
    assert rope.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba'"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count_kv": [2, 2, 0, 2]}, "llama.attention.head_count_kv is [2, 2, 0, 2]"),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 8}, "value_length"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
    ],
)
def test_gguf_metadata_that_cannot_be_served_is_named(changes: dict[str, Any], words: str) -> None:
    """As with config.json."""
    with pytest.raises(ModelError) as caught:
        parse_gguf_config({**GGUF, **changes}, (), 1000, "m.gguf")
    assert words in str(caught.value)
