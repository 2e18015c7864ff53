"""Weights read by several threads: the same bytes as the files', in any order of taking, within the window, and with words where a file is cut."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from appliance.errors import ModelError
from appliance.kernels.ops import select
from appliance.model import weights as weights_module
from appliance.model.decoder import load_model
from appliance.model.parallel_read import ParallelReader, Span
from appliance.model.safetensors import SafetensorsWeights

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random bfloat16 weights in four shards, layers scattered over them."""
    path = tmp_path_factory.mktemp("sharded")
    (path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(90, 48), "model.norm.weight": weight(48), "lm_head.weight": weight(90, 48)}
    for layer in range(12):
        base = f"model.layers.{layer}"
        for name, rows in (("q", 48), ("k", 16), ("v", 16)):
            tensors[f"{base}.self_attn.{name}_proj.weight"] = weight(rows, 48)
            tensors[f"{base}.self_attn.{name}_proj.bias"] = weight(rows)
        tensors[f"{base}.self_attn.o_proj.weight"] = weight(48, 48)
        tensors |= {f"{base}.mlp.{name}_proj.weight": weight(96, 48) for name in ("gate", "up")} | {f"{base}.mlp.down_proj.weight": weight(48, 96)}
        tensors |= {f"{base}.{name}_layernorm.weight": weight(48) for name in ("input", "post_attention")}
    names = sorted(tensors)
    random.Random(2).shuffle(names)
    places = {name: f"model-{index % 4 + 1:05}-of-00004.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def spans_of(folder: Path) -> list[Span]:
    """The spans of the checkpoint, as its weights order them."""
    weights = SafetensorsWeights(folder)
    return weights._spans()


@pytest.mark.parametrize(("num_readers", "window_bytes", "piece_bytes"), [(1, 1, 1000), (3, 20_000, 700), (4, 1 << 30, 1 << 20)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_tensor_arrives_whole_in_any_order(folder: Path, num_readers: int, window_bytes: int, piece_bytes: int, shuffled: bool) -> None:
    """Pieces of any size, any number of threads and any window give the file's bytes, also where tensors are asked for out of order or twice."""
    spans = spans_of(folder)
    wanted = {span.name: span.path.read_bytes()[span.offset : span.offset + span.num_bytes] for span in spans}
    names = [span.name for span in spans]
    if shuffled:
        names = random.Random(3).sample(names, len(names)) + names[:2]
    reader = ParallelReader(spans, CPU, num_readers=num_readers, window_bytes=window_bytes, piece_bytes=piece_bytes)
    try:
        for name in names:
            assert reader.take(name).numpy().tobytes() == wanted[name], name
    finally:
        reader.close()


def test_no_more_is_read_ahead_than_the_window(folder: Path) -> None:
    """Before anything is taken, the readers stop at the first span that fills the window; each one taken makes room for what follows."""
    spans = spans_of(folder)
    window = spans[0].num_bytes + spans[1].num_bytes + 1
    reader = ParallelReader(spans, CPU, num_readers=2, window_bytes=window)
    try:
        held = set(reader._arrivals)
        assert held == {span.name for span in spans[:3]}
        reader.take(spans[0].name)
        assert sum(span.num_bytes for span in spans if span.name in reader._arrivals) < window + max(span.num_bytes for span in spans)
        assert len(reader._arrivals) > 2
    finally:
        reader.close()


def test_spans_follow_the_order_of_building(folder: Path) -> None:
    """Embedding first, then layers by number with what attention needs first, then the final norm and the head."""
    names = [span.name for span in spans_of(folder)]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)
    first = [name.removeprefix("model.layers.0.") for name in names if ".layers.0." in name]
    assert first[0] == "input_layernorm.weight"
    assert first[-1] == "mlp.down_proj.weight"


def test_a_model_read_in_parallel_is_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is built in the very order of the spans, from the same weights, and its progress is that of the bytes."""
    taken: list[str] = []
    take = ParallelReader.take

    def recorded(self: ParallelReader, name: str) -> Tensor:
        taken.append(name)
        return take(self, name)

    monkeypatch.setattr(ParallelReader, "take", recorded)
    plain = SafetensorsWeights(folder)
    parallel = SafetensorsWeights(folder, CPU)
    monkeypatch.setattr(weights_module, "open_weights", lambda *_, **__: parallel)
    monkeypatch.setattr("appliance.model.decoder.open_weights", lambda *_, **__: parallel)
    shares: list[float] = []
    load_model(str(folder), ops=select(CPU, "reference"), device=CPU, dtype=torch.bfloat16, progress=shares.append)
    assert [name for name in taken if name.endswith("weight")] == [span.name for span in spans_of(folder) if span.name.endswith("weight")]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[1] == pytest.approx(90 * 48 * 2 / plain.num_bytes)
    again = SafetensorsWeights(folder, CPU)
    for name in plain._entries:
        shape = tuple(plain._entries[name][2]["shape"])
        assert torch.equal(again.get(name, shape), plain.get(name, shape)), name
    again.close()


def test_a_file_cut_short_is_named(folder: Path, tmp_path: Path) -> None:
    """What the readers meet ends the load in words; the reader can be closed afterwards."""
    span = spans_of(folder)[0]
    short = tmp_path / "short.safetensors"
    short.write_bytes(span.path.read_bytes()[: span.offset + 10])
    for broken in (Span("a", short, span.offset, span.num_bytes), Span("a", tmp_path / "absent", 0, 5)):
        with pytest.raises(ModelError, match=broken.path.name):
            read_alone(broken)


def read_alone(span: Span) -> Tensor:
    """One span through a reader of its own."""
    reader = ParallelReader([span], CPU, num_readers=2)
    try:
        return reader.take(span.name)
    finally:
        reader.close()


def test_closing_in_the_middle_ends_the_threads(folder: Path) -> None:
    """A load that fails elsewhere leaves no thread behind."""
    before = threading.active_count()
    reader = ParallelReader(spans_of(folder), CPU, num_readers=3, piece_bytes=64)
    reader.take("model.norm.weight")
    reader.close()
    assert threading.active_count() == before
