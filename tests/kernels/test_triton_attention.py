"""Paged attention in Triton against its twin, at shapes that divide nothing evenly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_batches import make_batch
from torch import Tensor

from appliance.kernels import paged_decode, paged_prefill, shared_decode
from appliance.kernels.ops import AttentionBatch
from appliance.kernels.reference import ReferenceOps
from appliance.kernels.triton_ops import TritonOps

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies bf16 matrices as if they were integers


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of the result; infinite where anything is NaN."""
    error = (result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=float("inf")))


def expected_attention(q: Tensor, key: Tensor, value: Tensor, batch: AttentionBatch, window: int | None) -> Tensor:
    """The twin in float32 on a clean cache: its masked sums would spread the NaN of slots that belong to no context."""
    return ReferenceOps().attention(q.float(), key.float().nan_to_num(), value.float().nan_to_num(), batch, q.shape[2] ** -0.5, window)


TOLERANCE = {torch.float32: 1e-5, HALF: 1e-2}
SHAPES = [  # query heads, KV heads, head size
    pytest.param(4, 2, 16, id="group of 2"),
    pytest.param(3, 1, 32, id="group of 3"),
    pytest.param(2, 2, 24, id="no group, head size no power of two"),
]


@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_decode_matches_its_twin(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None, device: torch.device
) -> None:
    """Decode attention reads every context length, a padded entry included, from device memory."""
    q, key, value, batch = make_batch([1, 16, 17, 0, 70], [], num_heads, num_kv_heads, head_dim, dtype, device)
    out = TritonOps().attention(q, key, value, batch, head_dim**-0.5, window)
    assert relative_error(out, expected_attention(q, key, value, batch, window)) < TOLERANCE[dtype]
    assert not out[3].any()


@pytest.mark.parametrize("num_splits", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [None, 33])
def test_splits_combine_to_the_same_result(num_splits: int, window: int | None, device: torch.device) -> None:
    """Any number of splits, also more than a short context has tiles, gives the unsplit result; counters end at zero."""
    q, key, value, batch = make_batch([5, 100, 0, 49], [], 6, 2, 16, torch.float32, device)
    out = torch.full((4, 96), float("nan"), device=device)
    for _ in range(2):
        config = paged_decode.DecodeConfig(block_n=16, num_splits=num_splits, num_warps=4, num_stages=2)
        paged_decode.paged_decode(q, key, value, batch, 0.25, window, out, config)
        assert relative_error(out, expected_attention(q, key, value, batch, window)) < 1e-5
    assert not paged_decode.arrival_counters(device).any()


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_prefill_matches_its_twin(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None, device: torch.device
) -> None:
    """Chunks with and without context, of length 1, over a tile, and empty ones (padding), beside decodes."""
    q, key, value, batch = make_batch([7, 40], [(0, 1), (30, 37), (0, 0), (16, 16), (3, 5), (0, 0)], num_heads, num_kv_heads, head_dim, dtype, device)
    out = TritonOps().attention(q, key, value, batch, head_dim**-0.5, window)
    assert relative_error(out, expected_attention(q, key, value, batch, window)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 16), (16, 32), (64, 64)])
def test_prefill_tiles_of_any_size_agree(block_m: int, block_n: int, device: torch.device) -> None:
    """Where the tile borders lie against diagonal, window and context does not matter."""
    for window in (None, 5, 40):
        q, key, value, batch = make_batch([], [(0, 50), (90, 3), (0, 0), (61, 20)], 6, 2, 16, torch.float32, device)
        out = torch.zeros(73, 96, device=device)
        config = paged_prefill.PrefillConfig(block_m, block_n, num_warps=4, num_stages=1)
        paged_prefill.paged_prefill(q, key, value, batch, 0.25, window, out, config)
        assert relative_error(out, expected_attention(q, key, value, batch, window)) < 1e-5


def test_tokens_of_no_entry_get_zeros(device: torch.device) -> None:
    """A bucket longer than its chunks yields finite rows past them."""
    q, key, value, batch = make_batch([3], [(0, 4)], 2, 1, 16, torch.float32, device)
    longer = torch.cat((q, torch.full((6, 2, 16), float("nan"), device=device)))
    batch = dataclasses.replace(batch, max_query_len=10)
    out = TritonOps().attention(longer, key, value, batch, 0.25, None)
    assert relative_error(out[:5], expected_attention(q, key, value, batch, None)) < 1e-5
    assert not out[5:].any()


@pytest.mark.parametrize("num_programs", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("window", [None, 33])
def test_equal_shares_combine_to_the_same_result(num_programs: int, window: int | None, device: torch.device) -> None:
    """However many programs share the tiles, more than there are included: pairs cut at any place, an empty context; counters end at zero."""
    q, key, value, batch = make_batch([5, 100, 0, 49, 16, 17], [], 6, 2, 16, torch.float32, device)
    out = torch.full((6, 96), float("nan"), device=device)
    config = shared_decode.SharedConfig(block_n=16, num_programs=num_programs, pieces=2, num_warps=4, num_stages=2)
    for _ in range(2):
        shared_decode.shared_decode(q, key, value, batch, 0.25, window, out, config)
        assert relative_error(out, expected_attention(q, key, value, batch, window)) < 1e-5
    assert not paged_decode.arrival_counters(device).any()


def test_a_batch_for_a_full_chip_takes_a_program_a_pair(device: torch.device) -> None:
    """Past the size that shares tiles, chosen by the number of pairs."""
    q, key, value, batch = make_batch([1 + i % 3 for i in range(200)], [], 4, 2, 16, torch.float32, device)
    out = TritonOps().attention(q, key, value, batch, 0.25, None)
    assert relative_error(out, expected_attention(q, key, value, batch, None)) < 1e-5


def test_cuts_follow_the_shape() -> None:
    """A large batch takes no splits, a middle one two; a small one as many programs as stand on the chip, but no more than it has tiles."""
    assert paged_decode.choose_config(256, 8, 128, 4096, 2, 132).num_splits == 1
    assert paged_decode.choose_config(64, 8, 128, 4096, 2, 132).num_splits == 2
    assert shared_decode.choose_config(8, 4096, 2, 132) == shared_decode.SharedConfig(32, 264, 32, 2, 4)
    assert shared_decode.choose_config(256, 4096, 2, 132) == shared_decode.SharedConfig(32, 528, 8, 2, 4)
    assert shared_decode.choose_config(8, 100, 2, 132).num_programs == 32
