"""The memory plan: predicted weights are those of a loaded model, what the plan promises fits, and what it advises works."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import cli
from appliance.engine import footprint, loading, memory_plan, sizing
from appliance.engine.footprint import Demand, ModelFacts
from appliance.engine.memory_plan import DeviceMemory, MemoryPlan
from appliance.engine.wire import Start
from appliance.errors import ConfigError, ModelError
from appliance.kernels import ops as k
from appliance.model.config import parse_config
from appliance.model.decoder import load_model

GIB = 1 << 30
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
FACTS = ModelFacts(parse_config(LLAMA_8B, "config.json"))


def plan_for(gib: float, facts: ModelFacts = FACTS, **fields: Any) -> MemoryPlan:
    """A plan for an empty card."""
    start = Start(model_path="model", cache_dir="", **fields)
    card = DeviceMemory("card", True, int(gib * GIB), int(gib * GIB))
    return memory_plan.make_plan(facts, start, card, loading.storage_rule(facts.config, torch.device("cuda")))


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """A model folder of a config.json alone."""
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_weights_are_those_of_the_loaded_model(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the byte, biases, norms and the rotary table included; parameters likewise."""
    values = SMALL | {"model_type": family, "tie_word_embeddings": tied, "attention_bias": family == "llama", "mlp_bias": family == "llama"}
    path = f"dummy:{write_config(tmp_path, values)}"
    facts = footprint.read_facts(path)
    decoder = load_model(path, ops=k.select(torch.device("cpu"), "reference"), device=torch.device("cpu"), dtype=dtype)
    assert footprint.weight_bytes(facts, is_cuda=True, dtype_bytes=dtype.itemsize, quantization="auto") == decoder.weight_bytes
    assert footprint.num_parameters(facts.config) == decoder.num_parameters


@pytest.mark.acceptance
@pytest.mark.parametrize(("kernels", "quantization"), [("reference", "none"), ("cpu", "auto"), ("cpu", "int8")])
def test_predicted_weights_of_a_gguf_file(kernels: str, quantization: str, embedded_model: Path) -> None:
    """The header alone tells what the packed weights take, within the dense copies that a calibration may add."""
    ops = k.select(torch.device("cpu"), kernels)
    if ops.name != kernels:
        pytest.skip("no C++ kernels here")
    decoder = load_model(str(embedded_model), ops=ops, device=torch.device("cpu"), dtype=torch.float32, quantization=quantization)
    dense = sum(layer.dense.weight.nbytes for layer in linears(decoder) if getattr(layer, "dense", None) is not None)
    predicted = footprint.weight_bytes(footprint.read_facts(str(embedded_model)), is_cuda=False, dtype_bytes=4, quantization=quantization)
    assert predicted == pytest.approx(decoder.weight_bytes - dense, rel=0.005)


def linears(decoder: Any) -> list[Any]:
    """All packed projections of a decoder."""
    return [decoder._head, *(linear for layer in decoder._layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))]


def test_fp8_weights_take_a_byte_and_a_scale_a_row() -> None:
    """An 8B model in fp8: its matrices at one byte a weight, embeddings and head as published recipes leave them."""
    plain, fp8 = (footprint.weight_bytes(FACTS, is_cuda=True, dtype_bytes=2, quantization=form) for form in ("none", "fp8"))
    in_layers = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    rows = 32 * (4096 * 2 + 1024 * 2 + 2 * 14336 + 4096)
    assert plain - fp8 == in_layers - 4 * rows


@pytest.mark.parametrize(("cache", "num_bytes"), [("auto", 131072), ("fp8", 66048)])
def test_a_token_of_an_8b_cache(cache: str, num_bytes: int) -> None:
    """128 KiB in bfloat16; in fp8 half of it and a byte a head for each scale."""
    assert plan_for(80, kv_cache_dtype=cache).demand.kv_block == 16 * num_bytes


@settings(max_examples=60, deadline=None)
@given(
    free=st.integers(0, 1 << 36),
    block=st.integers(1000, 1 << 21),
    reserve=st.integers(0, 1 << 33),
    seqs=st.integers(1, 300),
    context=st.none() | st.integers(16, 1 << 18),
    model_context=st.integers(16, 1 << 18),
    is_cuda=st.booleans(),
)
def test_what_is_chosen_fits(free: int, block: int, reserve: int, seqs: int, context: int | None, model_context: int, is_cuda: bool) -> None:
    """KV blocks and reserve stay within what is free, and the context length within the blocks and the model; or the start is refused in words."""
    start = Start(model_path="m", cache_dir="", max_num_seqs=seqs, context_length=context)
    demand = Demand(0, 0, 0, reserve, 0, block)
    try:
        sizes = sizing.choose(start, is_cuda=is_cuda, free_bytes=free, demand=demand, model_context=model_context)
    except ModelError:
        fitting = sizing.fitting_blocks(start, is_cuda=is_cuda, free_bytes=free, demand=demand) * start.block_size
        assert fitting < min(context or 256, 256 if context is None else context, model_context)
        return
    assert sizes.num_blocks * block + (reserve if is_cuda else 0) <= free
    assert 0 < sizes.context_length <= min(model_context, sizes.num_blocks * start.block_size)
    assert sizes.context_length == min(context or model_context, model_context) or context is None
    assert 0 < sizes.max_num_seqs <= seqs <= sizes.max_num_batched_tokens


def test_a_context_length_of_the_models_own_is_shortened_and_one_asked_for_is_refused() -> None:
    """Nobody asked for the model's limit; who gave a length would find out at the first long prompt."""
    assert plan_for(24).sizes.context_length < 131072  # type: ignore[union-attr]
    refused = plan_for(24, context_length=131072)
    assert refused.sizes is None
    assert "131072 was asked for" in str(refused.problem)


@pytest.mark.parametrize("gib", [10, 14, 17, 20, 24])
@pytest.mark.parametrize("context_length", [None, 40_000])
def test_every_option_fits_when_it_is_taken(gib: int, context_length: int | None) -> None:
    """Planning again with the advised flags gives the context length that was promised, and the next smaller card does not do."""
    refused = plan_for(gib, context_length=context_length)
    if refused.sizes is not None:
        return
    assert refused.options
    for option in refused.options:
        words = option.change.split()
        if words[0] == "a":
            again = plan_for(int(words[3]), context_length=context_length)
        else:
            arguments = cli.parse(["plan", *words])
            fields = {key.split(".")[1]: value for key, value, _ in arguments.overrides}
            numbers = {name: json.loads(value) for name, value in fields.items() if name not in ("quantization", "kv_cache_dtype")}
            again = plan_for(gib, **({"context_length": context_length} | fields | numbers))
        assert again.sizes is not None, option
        assert again.sizes.context_length == option.context_length


def test_more_memory_never_gives_less() -> None:
    """KV tokens rise with the card, and fall with the length of a step."""
    tokens = [plan_for(gib).kv_tokens for gib in (16, 20, 24, 40, 80, 141)]
    assert tokens == sorted(tokens)
    assert plan_for(80, max_num_batched_tokens=16384).kv_tokens < plan_for(80).kv_tokens


def test_memory_that_others_hold_counts() -> None:
    """A card half full has room for less than an empty one, by what is held."""
    card = DeviceMemory("card", True, 80 * GIB, 50 * GIB)
    held = memory_plan.make_plan(FACTS, Start(model_path="m", cache_dir=""), card, loading.storage_rule(FACTS.config, torch.device("cuda")))
    assert plan_for(80).free_for_kv - held.free_for_kv == pytest.approx(30 * GIB, abs=2)


def test_configured_blocks_that_do_not_fit_are_refused() -> None:
    """num_blocks is taken at its word only where there is memory for them."""
    assert plan_for(80, num_blocks=1000).sizes is not None
    refused = plan_for(80, num_blocks=1_000_000)
    assert refused.sizes is None
    assert "1000000 KV blocks" in str(refused.problem)


def test_the_engine_refuses_before_it_reads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that is too small the start ends with the plan's advice; the folder has no weights that could have been read."""
    folder = write_config(tmp_path, LLAMA_8B)
    monkeypatch.setattr(loading, "gpu_memory", lambda: DeviceMemory("small card", True, 16 * GIB, 16 * GIB))
    start = Start(model_path=str(folder), cache_dir="")
    with pytest.raises(ModelError, match=r"do not fit.*--quantization fp8.*a card of 24 GiB"):
        loading.plan_start(start, torch.device("cuda"))
    monkeypatch.setattr(loading, "gpu_memory", lambda: DeviceMemory("card", True, 80 * GIB, 80 * GIB))
    assert loading.plan_start(start, torch.device("cuda")).sizes is not None


def test_the_engine_refuses_an_fp8_cache_on_a_cpu(tmp_path: Path) -> None:
    """The C++ kernels do not store it."""
    config = parse_config(SMALL | {"model_type": "llama"}, "x")
    with pytest.raises(ModelError, match="needs a GPU"):
        loading.storage_rule(config, torch.device("cpu"))(Start(model_path="m", cache_dir="", kv_cache_dtype="fp8"))


def test_plan_prints_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, JSON that adds up, and a table for people."""
    folder = str(write_config(tmp_path, LLAMA_8B))
    assert cli.main(["plan", folder, "--gpu-memory", "80GiB", "--max-num-seqs", "64", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parts = [plan[f"{part}_bytes"] for part in ("weight", "runtime", "buffer", "activation", "graph", "kv_cache")]
    assert sum(parts) == pytest.approx(plan["usable_bytes"], abs=2)
    assert plan["usable_bytes"] == int(80 * GIB * 0.9)
    assert plan["num_parameters"] == 8_030_261_248
    assert plan["sequences_at_length"]["131072"] == plan["kv_tokens"] // 131072
    assert cli.main(["plan", folder, "--gpu-memory", "80GiB"]) == 0
    shown = capsys.readouterr().out
    assert "fits: context length 131072" in shown
    assert f"{plan['weight_bytes'] / 1e9:.3f} GB" in shown


def test_plan_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 3 and the flags that would do, which work."""
    folder = str(write_config(tmp_path, LLAMA_8B))
    assert cli.main(["plan", folder, "--gpu-memory", "16e9", "--max-model-len", "8192"]) == 3
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "with --quantization fp8: context length 8192" in shown
    assert cli.main(["plan", folder, "--gpu-memory", "16e9", "--max-model-len", "8192", "--quantization", "fp8"]) == 0


@pytest.mark.parametrize(("text", "num_bytes"), [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("1.5e9", 1_500_000_000), ("24g", 24 << 30), ("7", 7)])
def test_bytes_in_words(text: str, num_bytes: int) -> None:
    """Binary and decimal units, plain numbers."""
    from appliance.commands.plan import parse_bytes

    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "80 parsecs", "-1", "0", "GiB"])
def test_bytes_that_are_none(text: str) -> None:
    """A mistake is reported as one of the settings' are: exit status 2."""
    from appliance.commands.plan import parse_bytes

    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_bytes(text)


def test_plan_without_a_gpu_or_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Device cuda where there is none, and a hub id that was not fetched, end with 1 and a way out."""
    monkeypatch.setattr("appliance.engine.gpu_memory.gpu_memory", lambda: None)
    folder = str(write_config(tmp_path, LLAMA_8B))
    assert cli.main(["plan", folder, "--device", "cuda"]) == 1
    assert "--gpu-memory" in capsys.readouterr().err
    assert cli.main(["plan", "nobody/nothing", "--state-dir", str(tmp_path)]) == 1
    assert "appliance models fetch" in capsys.readouterr().err


def test_demand_reserve_is_all_but_weights_and_runtime() -> None:
    """What must stay free beside the KV cache once the weights are there."""
    demand = plan_for(80).demand
    assert demand.reserve == sum(
        getattr(demand, field.name) for field in dataclasses.fields(demand) if field.name in ("buffers", "activations", "graphs")
    )
    assert plan_for(80, cuda_graphs=False).demand.graphs == 0
