"""The plan's formula for a step's activations against what the Triton operations really allocate, counted tensor by tensor."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from appliance.engine import footprint
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.triton_ops import TritonOps
from appliance.model.decoder import load_model


class PeakBytes(TorchDispatchMode):
    """Bytes of tensors made under it and still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage().data_ptr())  # weights and caches, which were there before
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self._known or not storage.nbytes():
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.live -= num_bytes


@pytest.mark.parametrize("tokens", [24, 40])
def test_a_steps_activations_are_those_predicted(tokens: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest step of a chunk holds what the formula says, within the small tensors that it leaves out."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)  # no contents are wanted, and it holds on to its arguments
    values = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    dtype = torch.float32
    decoder = load_model(f"dummy:{tmp_path}", ops=TritonOps(), device=device, dtype=dtype)
    caches = [(torch.zeros(4, 2, 16, 32, dtype=dtype, device=device), torch.zeros(4, 2, 16, 32, dtype=dtype, device=device)) for _ in range(3)]
    positions = torch.arange(tokens, device=device)
    batch = AttentionBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
        positions=positions.int(),
        slot_mapping=positions,
        query_start=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        rows=torch.zeros(1, dtype=torch.int32, device=device),
        block_tables=torch.arange(4, dtype=torch.int32, device=device).unsqueeze(0),
        logit_index=torch.tensor([tokens - 1], device=device),
        num_decodes=0,
        max_query_len=tokens,
        max_context_len=tokens,
    )
    with torch.no_grad(), PeakBytes() as counted:
        decoder.forward(batch, caches)
    predicted = footprint.activation_bytes(decoder.config, dtype.itemsize, tokens, 1, fp8=False) - footprint.activation_bytes(
        decoder.config, dtype.itemsize, 0, 0, fp8=False
    )
    assert predicted == pytest.approx(counted.peak, rel=0.03)
