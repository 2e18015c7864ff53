"""Weight files: GGUF and safetensors of the same model give the same decoder; damaged ones say what is wrong; random weights are sane."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from paged_loop import PagedLoop
from safetensors.torch import save_file
from torch import Tensor

from appliance.errors import ModelError
from appliance.kernels.cpu.build import CACHE_VARIABLE, load_library
from appliance.kernels.cpu_ops import CpuOps
from appliance.kernels.gguf_blocks import dequantize
from appliance.kernels.ops import GgufTensor
from appliance.kernels.reference import ReferenceOps
from appliance.model.config import ModelConfig, parse_config
from appliance.model.decoder import Decoder, load_model
from appliance.model.gguf_file import GgufWeights, gguf_name, read_gguf_header
from appliance.model.mapped_file import ReadAhead, map_bytes
from appliance.model.weights import open_weights

CPU = torch.device("cpu")
VALUES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
K_KINDS = {"Q4_K": (144, 2e-4, 7.5), "Q5_K": (176, 1e-4, 15.5), "Q6_K": (210, 8e-5, 0.0)}  # bytes of a block, scale, offset in scales


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **VALUES, **changes}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config has."""
    hidden, inner, query, key = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim, config.kv_heads_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        base = f"model.layers.{index}"
        linears = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
        for name, shape in linears.items():
            shapes[f"{base}.self_attn.{name}.weight"] = shape
            if config.qkv_bias and name != "o_proj":
                shapes[f"{base}.self_attn.{name}.bias"] = shape[:1]
        if config.qk_norm:
            shapes |= {f"{base}.self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{base}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{base}.mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")} | {
            f"{base}.mlp.down_proj.weight": (hidden, inner)
        }
    return shapes


def k_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random weights in K quants, which the gguf package reads but does not write: random bytes, scales such that values are those of a model."""
    size, scale, offset = K_KINDS[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (math.prod(shape) // 256, size), dtype=np.uint8)
    scales = (generator.uniform(0.5, 1.0, len(blocks)) * scale).astype(np.float16)
    if offset:
        blocks[:, :4] = np.stack([scales, (scales * np.float16(offset))], axis=1).view(np.uint8)
    else:
        blocks[:, 208:] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(file: Path, values: dict[str, Any], extra: dict[str, Tensor] | None = None, kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    """A GGUF file of random weights in a mix of kinds, as llama.cpp's converter would write it; returns the weights under transformers' names."""
    config = parse_config(values, "test")
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    writer = gguf.GGUFWriter(file, config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    weights = {}
    for name, shape in shapes_of(config).items():
        dense = torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) + (1.0 if "norm" in name else 0.0)
        kind = gguf.GGMLQuantizationType[rng.choice(kinds) if len(shape) == 2 else "F32"]
        data = k_blocks(kind.name, shape, len(weights)) if kind.name in K_KINDS else gguf.quantize(dense.numpy(), kind)
        weights[name] = torch.from_numpy(gguf.dequantize(data, kind).copy())
        if config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            half = config.head_dim // 2
            data = np.ascontiguousarray(data.reshape(-1, 2, half, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape))
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_folder(folder: Path, values: dict[str, Any], weights: dict[str, Tensor], *, num_shards: int = 1) -> Path:
    """config.json and safetensors, with an index where there are several files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    names = list(weights)
    shards = {f"model-{i}.safetensors": names[i::num_shards] for i in range(num_shards)}
    for file, part in shards.items():
        save_file({name: weights[name].contiguous() for name in part}, folder / file)
    if num_shards > 1:
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(path: str | Path, **options: Any) -> Decoder:
    return load_model(str(path), ops=ReferenceOps(), device=CPU, dtype=options.pop("dtype", torch.float32), **options)


def first_logits(decoder: Decoder) -> Tensor:
    loop = PagedLoop(decoder, ReferenceOps())
    return loop.step([], [(loop.add([1, 7, 3, 80, 11]), 5)])[0]


def test_a_file_of_k_quants_runs_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q4_K, Q5_K and Q6_K in every matrix: read as the gguf package reads them, and through the packed C++ kernels within what packing costs."""
    values = config_of("llama", hidden_size=256, intermediate_size=512, head_dim=64, tie_word_embeddings=False)
    weights = write_gguf(tmp_path / "model.gguf", values, kinds=tuple(K_KINDS))
    folder = write_folder(tmp_path / "model", values, weights)
    expected = first_logits(load(folder))
    assert torch.equal(first_logits(load(tmp_path / "model.gguf")), expected)
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the C++ kernels need an x86-64 CPU and g++")
    monkeypatch.setenv(
        CACHE_VARIABLE,
        os.environ.get(CACHE_VARIABLE) or str(Path(os.environ.get("APPLIANCE_TEST_STATE") or Path.home() / ".cache" / "appliance-tests") / "cache"),
    )
    ops = CpuOps(load_library("native"), copy_bytes=0)
    packed = load_model(str(tmp_path / "model.gguf"), ops=ops, device=CPU, dtype=torch.float32, quantization="auto")
    loop = PagedLoop(packed, ops)
    logits = loop.step([], [(loop.add([1, 7, 3, 80, 11]), 5)])[0]
    assert float((logits - expected).norm() / expected.norm()) < 2e-2
    assert int(logits.argmax()) == int(expected.argmax())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_and_safetensors_of_the_same_weights_agree(tmp_path: Path, family: str, tied: bool) -> None:
    """Every tensor to the bit, Q and K rows in order, in a mix of kinds; and so the logits."""
    values = config_of(family, tie_word_embeddings=tied, sliding_window=None)
    weights = write_gguf(tmp_path / "m.gguf", values)
    source = GgufWeights(tmp_path / "m.gguf")
    for name, wanted in weights.items():
        found = source.get(name, tuple(wanted.shape))
        assert torch.equal(dequantize(found) if isinstance(found, GgufTensor) else found.float(), wanted), name
    folder = write_folder(tmp_path / "folder", values, weights, num_shards=3)
    ours, theirs = load(tmp_path / "m.gguf"), load(folder)
    assert ours.num_parameters == theirs.num_parameters == sum(weight.numel() for weight in weights.values())
    torch.testing.assert_close(first_logits(ours), first_logits(theirs), rtol=0, atol=1e-5)


def test_rope_freqs_divide_the_frequencies(tmp_path: Path) -> None:
    """Llama 3's frequency factors, which its GGUF files carry as a tensor, change the rotary table."""
    values = config_of("llama")
    write_gguf(tmp_path / "plain.gguf", values)
    write_gguf(tmp_path / "factors.gguf", values, {"rope_freqs.weight": torch.linspace(1, 8, 8)})
    plain, factors = load(tmp_path / "plain.gguf"), load(tmp_path / "factors.gguf")
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    angles = torch.outer(torch.arange(128.0), frequencies / torch.linspace(1, 8, 8))
    torch.testing.assert_close(factors._cos_sin, torch.cat((angles.cos(), angles.sin()), 1))
    assert not torch.allclose(first_logits(plain), first_logits(factors))


def test_a_tied_dense_table_is_held_once(tmp_path: Path) -> None:
    """Embedding and head share memory where both are of the model's dtype."""
    values = config_of("llama", tie_word_embeddings=True)
    weights = {name: torch.randn(shape) for name, shape in shapes_of(parse_config(values, "test")).items()}
    decoder = load(write_folder(tmp_path, values, weights))
    assert decoder._head.weight is decoder._embedding.table  # type: ignore[attr-defined]
    assert decoder.weight_bytes == 4 * decoder.num_parameters + decoder._cos_sin.nbytes


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    """The same file in bf16: logits within the rounding of a few layers, and half the bytes."""
    values = config_of("qwen3")
    weights = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes_of(parse_config(values, "test")).items()}
    folder = write_folder(tmp_path, values, weights)
    wide, narrow = load(folder), load(folder, dtype=torch.bfloat16)
    assert narrow.weight_bytes - narrow._cos_sin.nbytes == (wide.weight_bytes - wide._cos_sin.nbytes) // 2
    error = (first_logits(narrow).float() - first_logits(wide)).norm() / first_logits(wide).norm()
    assert 0 < error < 0.03


def test_progress_rises_to_one(tmp_path: Path) -> None:
    """From 0 to 1, never back."""
    values = config_of("llama")
    (tmp_path / "config.json").write_text(json.dumps(values))
    shares: list[float] = []
    load(f"dummy:{tmp_path}", progress=shares.append)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)


def test_max_positions_shortens_the_rotary_table(tmp_path: Path) -> None:
    """To what is asked for, and never past the model's own."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    assert load(f"dummy:{tmp_path}", max_positions=50).max_positions == 50
    assert load(f"dummy:{tmp_path}", max_positions=5000).max_positions == 128


def test_random_weights_depend_on_the_seed_and_keep_activations_sane(tmp_path: Path) -> None:
    """Same seed, same logits; another seed, others; and over 24 layers logits stay of order one."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3", num_hidden_layers=24, hidden_size=128)))
    path = f"dummy:{tmp_path}"
    first, again, other = (first_logits(load(path, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert 0.3 < first.std() < 3


def test_read_ahead_ends_with_its_block(tmp_path: Path) -> None:
    """No thread outlives it, whether all chunks were read or hardly any."""
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4096)
    data = map_bytes(tmp_path / "file")
    with ReadAhead([data, data]) as ahead:
        ahead._pool.shutdown(wait=True)
    with ReadAhead([data] * 1000) as ahead:
        pass
    assert not any(thread.is_alive() for thread in ahead._pool._threads)


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    """Which weight, which file, which shape."""
    values = config_of("llama")
    weights = {name: torch.zeros(shape) for name, shape in shapes_of(parse_config(values, "test")).items()}
    missing = {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(ModelError, match=r"no safetensors file holds model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write_folder(tmp_path / "missing", values, missing))
    wrong = {**weights, "model.norm.weight": torch.zeros(63)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(63,\)"):
        load(write_folder(tmp_path / "wrong", values, wrong))
    integers = {**weights, "model.norm.weight": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight has dtype I32"):
        load(write_folder(tmp_path / "integers", values, integers))


def test_damaged_safetensors_are_errors(tmp_path: Path) -> None:
    """Cut short in the data or the header, not safetensors at all, files missing from the index, none there."""
    values = config_of("llama")
    weights = {name: torch.zeros(shape) for name, shape in shapes_of(parse_config(values, "test")).items()}
    file = write_folder(tmp_path, values, weights) / "model-0.safetensors"
    whole = file.read_bytes()
    for damaged, words in ((whole[:-100], "cut short"), (whole[:100], "cut short"), (b"", "cut short"), (b"abc", "cut short")):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=words):
            load(tmp_path)
    file.write_bytes((8).to_bytes(8, "little") + b"no json!")
    with pytest.raises(ModelError, match="header is damaged"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        load(tmp_path)


def test_damaged_gguf_files_are_errors(tmp_path: Path) -> None:
    """Cut short anywhere in the header or the data, another magic, another version, an unsupported kind."""
    file = tmp_path / "m.gguf"
    write_gguf(file, config_of("llama"))
    whole = file.read_bytes()
    data_start = read_gguf_header(file).data_start
    for size in (0, 3, 20, 100, data_start // 2, data_start - 40, len(whole) - 1000):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"m\.gguf"):
            load(file)
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ModelError, match="GGML"):
        load(file)
    file.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    with pytest.raises(ModelError, match="version 9"):
        load(file)
    at = whole.index(b"blk.1.ffn_down.weight") + len(b"blk.1.ffn_down.weight") + 4 + 16
    file.write_bytes(whole[:at] + (16).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight is of kind type 16"):
        load(file)


def test_paths_and_quantisations_that_are_not_there_are_errors(tmp_path: Path) -> None:
    """A missing file, and a quantisation that these kernels do not have."""
    with pytest.raises(ModelError, match="does not exist"):
        open_weights(str(tmp_path / "nothing.gguf"), device=CPU, dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    with pytest.raises(ModelError, match="int4"):
        load(f"dummy:{tmp_path}", quantization="int4")
