"""What a decoder is made of: one frozen record, parsed from config.json or from a GGUF file's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance.errors import ModelError
from appliance.model.fields import Fields

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_KINDS: Final = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base, width and how its frequencies are stretched. Fields a kind does not use keep their defaults."""

    theta: float
    width: int  # rotary dimensions of a head, even, at most head_dim
    kind: str = "default"  # default, linear, llama3, yarn
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn: context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: correction range rounded to whole dimensions
    attention_factor: float | None = None  # yarn: cos and sin are scaled by it; None: from mscale or factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One parametrised decoder of the Llama kind. Sizes in elements, lengths in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int  # context length the model was made for
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k
    sliding_windows: tuple[int | None, ...] = ()  # one a layer; None is full attention
    dtype: str = "float32"  # what the file was written in: float32, bfloat16 or float16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    source: str = field(default="", compare=False)  # file it was read from

    @property
    def kv_heads_size(self) -> int:
        """Elements of K (or V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim


def load_config(path: Path) -> ModelConfig:
    """The config of a Hugging Face folder (its config.json). Raises ModelError, naming file and field, where it cannot be served."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} does not exist; a model folder holds config.json and *.safetensors") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return parse_config(values, str(file))


def parse_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The config in the words of config.json. Defaults of absent fields are those of transformers' configuration of the family."""
    fields = Fields(values, source)
    family = fields.text("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{source}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if fields.has("quantization_config"):
        raise ModelError(f"{source}: quantization_config is not supported; use the unquantised weights or a GGUF file")
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{source}: hidden_act {activation!r} is not supported; supported is silu")
    hidden_size, num_heads, num_layers = fields.count("hidden_size"), fields.count("num_attention_heads"), fields.count("num_hidden_layers")
    head_dim = fields.count("head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    max_positions = fields.count("max_position_embeddings")
    attention_bias = fields.flag("attention_bias", False) and family in ("llama", "qwen3")
    config = ModelConfig(
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_positions=max_positions,
        rope=_rope(fields, head_dim, max_positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) and family == "llama",
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(fields, family, num_layers),
        dtype=fields.text("dtype", fields.text("torch_dtype", "float32")).removeprefix("torch."),
        bos_token_id=fields.optional_id("bos_token_id"),
        eos_token_ids=fields.ids("eos_token_id"),
        source=source,
    )
    return _checked(config)


def _rope(fields: Fields, head_dim: int, max_positions: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or from rope_theta, partial_rotary_factor and rope_scaling (before)."""
    name = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    scaling = fields.table(name)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _ROPE_KINDS:
        raise ModelError(f"{fields.source}: {name}.rope_type {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10_000.0))
    share = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    width = int(head_dim * share)
    if kind == "default":
        return RopeConfig(theta, width)
    original = scaling.count("original_max_position_embeddings", fields.count("original_max_position_embeddings", max_positions))
    factor = scaling.number("factor", max_positions / original if kind == "yarn" else None)
    if kind == "linear":
        return RopeConfig(theta, width, kind, factor)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        return RopeConfig(theta, width, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        theta,
        width,
        kind,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
    )


def _sliding_windows(fields: Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * num_layers
    if family == "mistral":
        window = fields.optional_count("sliding_window", 4096)
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = fields.optional_count("sliding_window", 4096)
    kinds = fields.texts("layer_types")
    if kinds is None:
        first = fields.count("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"{fields.source}: layer_types holds {', '.join(unknown)}; supported are full_attention and sliding_attention")
    if len(kinds) != num_layers:
        raise ModelError(f"{fields.source}: layer_types has {len(kinds)} entries for num_hidden_layers = {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def parse_gguf_config(metadata: Mapping[str, Any], tensor_names: Collection[str], vocab_size: int, source: str) -> ModelConfig:
    """The config in the words of GGUF metadata (ggml, docs/gguf.md). Biases, norms and tying are known by which tensors the file has."""
    general = Fields(metadata, source)
    family = general.text("general.architecture")
    if family not in FAMILIES:
        raise ModelError(f"{source}: general.architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    fields = Fields(metadata, source, prefix=f"{family}.")
    hidden_size, num_heads, num_layers = fields.count("embedding_length"), fields.count("attention.head_count"), fields.count("block_count")
    head_dim = fields.count("attention.key_length", hidden_size // num_heads)
    if fields.count("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{source}: {family}.attention.value_length differs from key_length, which is not supported")
    if fields.count("expert_count", 0, least=0):
        raise ModelError(f"{source}: {family}.expert_count is not 0; mixtures of experts are not supported")
    window = fields.optional_count("attention.sliding_window")
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.count("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_positions=fields.count("context_length"),
        rope=_gguf_rope(fields, head_dim),
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        output_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_down.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        sliding_windows=(window,) * num_layers,
        dtype="float32",
        bos_token_id=general.optional_id("tokenizer.ggml.bos_token_id"),
        eos_token_ids=general.ids("tokenizer.ggml.eos_token_id"),
        source=source,
    )
    return _checked(config)


def _gguf_rope(fields: Fields, head_dim: int) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10_000.0)
    width = fields.count("rope.dimension_count", head_dim)
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta, width)
    factor = fields.number("rope.scaling.factor")
    if kind == "linear":
        return RopeConfig(theta, width, "linear", factor)
    if kind != "yarn":
        raise ModelError(f"{fields.source}: rope.scaling.type {kind!r} is not supported; supported are none, linear and yarn")
    original = fields.count("rope.scaling.original_context_length")
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0)  # as llama.cpp has it
    return RopeConfig(theta, width, "yarn", factor, original, attention_factor=attention_factor)


def _checked(config: ModelConfig) -> ModelConfig:
    """The config, or ModelError where sizes contradict each other."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"{config.source}: {config.num_heads} attention heads are no multiple of {config.num_kv_heads} key-value heads")
    if config.head_dim % 2 or config.rope.width % 2 or not 0 < config.rope.width <= config.head_dim:
        raise ModelError(f"{config.source}: head size {config.head_dim} with {config.rope.width} rotary dimensions is not supported")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"{config.source}: dtype {config.dtype!r} is not supported; supported are float32, bfloat16 and float16")
    return config
