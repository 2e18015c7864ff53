"""Packed integer layers and the decoder stack on a CPU: error bounds against float64, independence of the batch, and life without a compiler."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from appliance.kernels import ops as k
from appliance.kernels.cpu import calibration
from appliance.kernels.cpu.build import CACHE_VARIABLE, load_library, target_architecture
from appliance.kernels.cpu.linear import CopyBudget, DenseCopy, PackedLinear
from appliance.kernels.cpu_ops import CpuOps, try_cpu_ops
from appliance.kernels.gguf_blocks import dequantize
from appliance.kernels.ops import LayerWeights
from appliance.kernels.reference import ReferenceOps

CPU = torch.device("cpu")
PRECISE_TOKENS = 64  # linear.h: kPreciseTokens; two int8 terms, so 1 / 254 of the error below
# Activations rounded to int8 in groups of 32: a step is 1/127 of the group's maximum, about 2.5 standard deviations, so the error is
# 2.5 / 127 / sqrt(12) = 0.57 % of the standard deviation; weights of one sign (as Q4_K's random bytes are) add up a little more.
ACTIVATION_ERROR = 1e-2


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def cache() -> Iterator[None]:
    """Compiled kernels outlive the run, beside the suite's other files."""
    folder = Path(os.environ.get("APPLIANCE_TEST_STATE") or Path.home() / ".cache" / "appliance-tests") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def ops(cache: None, request: pytest.FixtureRequest) -> CpuOps:
    """The kernels for this CPU, and those that an AVX2 machine would get; without dense copies."""
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the C++ kernels need an x86-64 CPU and g++")
    return CpuOps(load_library(request.param), copy_bytes=0)


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of the result."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def gguf(kind: str, num_rows: int, in_features: int, seed: int = 0) -> k.GgufTensor:
    """A random weight as a GGUF file would hold it; K quants from random bytes with small scales."""
    generator = np.random.default_rng(seed)
    if not kind.endswith("_K"):
        data = quantize(generator.standard_normal((num_rows, in_features)).astype(np.float32), GGMLQuantizationType[kind])
    else:
        size = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
        blocks = generator.integers(0, 256, (num_rows * in_features // 256, size), dtype=np.uint8)
        halves = generator.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
        if kind != "Q6_K":
            blocks[:, 0:4] = halves
        else:
            blocks[:, 208:210] = halves[:, :2]
        data = blocks.reshape(num_rows, -1)
    return k.GgufTensor(kind, (num_rows, in_features), torch.from_numpy(np.ascontiguousarray(data)))


def rounded(groups: Tensor) -> Tensor:
    """Groups of 32 on the last axis, to int8 each."""
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (groups / scale.clamp(min=1e-30)).round() * scale


def quantized_activations(x: Tensor) -> Tensor:
    """x as large steps see it, in float64: int8 in groups of 32, in two terms for the one group in 16 of a block of 16 tokens that needs it most."""
    groups = x.double().reshape(x.shape[0], -1, 32)
    result = rounded(groups)
    for block, rest in zip(result.split(16), (groups - result).split(16), strict=True):
        error = (block + rest).abs().amax(2).square().sum(0)
        for index in error.topk((len(error) + 15) // 16).indices:
            block[:, index] += rounded(rest[:, index])
    return result.reshape(x.shape)


@pytest.mark.parametrize(
    ("kind", "weight_error"),
    [("Q4_0", 1e-5), ("Q4_1", 1e-5), ("Q8_0", 1e-5), ("Q4_K", 5e-4), ("Q5_0", 1e-5), ("Q5_1", 7e-3), ("Q5_K", 7e-3), ("Q6_K", 7e-3)],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 33, 70])
def test_gguf_layers_keep_the_files_precision(ops: CpuOps, kind: str, weight_error: float, num_tokens: int) -> None:
    """A small step errs by next to nothing, a large one by its activations' int8 alone; kinds without a packed twin by their stated share besides."""
    weight = gguf(kind, 83, 512)
    layer, num_bytes = ops.make_linear([weight], None, device=CPU, dtype=torch.float32, quantization="auto")
    x = torch.randn(num_tokens, 512)
    dense = dequantize(weight).double()
    actual = layer(x)
    if num_tokens <= PRECISE_TOKENS:
        assert error(actual, x.double() @ dense.T) < weight_error + ACTIVATION_ERROR / 254
    else:
        assert error(actual, quantized_activations(x) @ dense.T) < weight_error + 1e-5
        assert error(actual, x.double() @ dense.T) < ACTIVATION_ERROR + weight_error / 2
    assert num_bytes >= weight.data.nbytes * 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 1e-2), ("int4", 1.2e-1)])
def test_dense_weights_can_be_quantised(ops: CpuOps, dtype: torch.dtype, quantization: str, bound: float) -> None:
    """int8 and int4 of dense parts, with a bias, within the error that their steps allow."""
    parts = [torch.randn(48, 96), torch.randn(10, 96)]
    bias = torch.randn(58)
    layer, _ = ops.make_linear(parts, bias, device=CPU, dtype=dtype, quantization=quantization)
    x = torch.randn(5, 96).to(dtype)
    actual = layer(x)
    assert actual.dtype == dtype
    assert error(actual, x.double() @ torch.cat(parts).double().T + bias.double()) < bound


def test_parts_of_several_kinds_and_odd_rows_are_stacked(ops: CpuOps) -> None:
    """Fused projections whose parts differ in kind, and are no multiple of 16 rows, come out in order."""
    parts = [gguf("Q4_1", 40, 256, 1), gguf("Q6_K", 17, 256, 2), gguf("Q8_0", 5, 256, 3)]
    layer, _ = ops.make_linear(parts, None, device=CPU, dtype=torch.float32, quantization="auto")
    x = torch.randn(4, 256)
    expected = x.double() @ torch.cat([dequantize(part) for part in parts]).double().T
    actual = layer(x)
    for rows in (slice(0, 40), slice(40, 57), slice(57, 62)):
        assert error(actual[:, rows], expected[:, rows]) < 1e-2


def test_a_token_does_not_depend_on_its_step(ops: CpuOps) -> None:
    """Rows computed alone and among others of a small step are bit-equal, whatever the number of threads; so are a large step's blocks of 16."""
    layer, _ = ops.make_linear([gguf("Q4_1", 200, 576)], None, device=CPU, dtype=torch.float32, quantization="auto")
    x = torch.randn(PRECISE_TOKENS, 576)
    together = layer(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for index in (0, 7, 8, 15, 16, 63):
            assert torch.equal(layer(x[index : index + 1]), together[index : index + 1])
        large = torch.randn(150, 576)
        assert torch.equal(layer(large)[48:], layer(large[48:]))
    finally:
        torch.set_num_threads(threads)


def test_zero_and_huge_activations_pass(ops: CpuOps) -> None:
    """Groups of zeros give zeros, and a huge value does not disturb another group."""
    weight = gguf("Q4_1", 16, 64)
    layer, _ = ops.make_linear([weight], None, device=CPU, dtype=torch.float32, quantization="auto")
    x = torch.zeros(2, 64)
    x[1, 0] = 1e30
    x[1, 32:] = 1.0
    actual = layer(x)
    assert torch.equal(actual[0], torch.zeros(16))
    assert error(actual[1], x[1].double() @ dequantize(weight).double().T) < 1e-2
    assert layer(torch.empty(0, 64)).shape == (0, 16)


def test_no_quantisation_means_exact_float32(ops: CpuOps) -> None:
    """`none` widens, dense parts stay dense under `auto`, and fp8 is refused."""
    weight = gguf("Q4_1", 40, 64)
    x = torch.randn(3, 64)
    layer, _ = ops.make_linear([weight], None, device=CPU, dtype=torch.float32, quantization="none")
    assert error(layer(x), x.double() @ dequantize(weight).double().T) < 1e-6
    dense = torch.randn(40, 64)
    layer, _ = ops.make_linear([dense], None, device=CPU, dtype=torch.float32, quantization="auto")
    assert torch.equal(layer(x), torch.nn.functional.linear(x, dense))
    with pytest.raises(ValueError, match="fp8"):
        ops.make_linear([dense], None, device=CPU, dtype=torch.float32, quantization="fp8")


def test_rows_that_are_no_whole_groups_stay_dense(ops: CpuOps) -> None:
    """in_features that 32 does not divide cannot be packed: the layer is dense rather than wrong."""
    dense = torch.randn(8, 40)
    layer, _ = ops.make_linear([dense], None, device=CPU, dtype=torch.float32, quantization="int8")
    x = torch.randn(2, 40)
    assert error(layer(x), x.double() @ dense.double().T) < 1e-6


def test_large_steps_take_the_dense_copy(ops: CpuOps) -> None:
    """From `min_tokens` on the dense twin answers, below it the integers."""
    dense = torch.randn(16, 32)
    packed, _ = ops.make_linear([dense], None, device=CPU, dtype=torch.float32, quantization="int8")
    assert isinstance(packed, PackedLinear)
    packed.dense = DenseCopy(torch.zeros(16, 32), torch.ones(16), 4)
    assert torch.equal(packed(torch.randn(4, 32)), torch.ones(4, 16))
    assert not torch.equal(packed(torch.randn(3, 32)), torch.ones(3, 16))


def test_the_copy_budget_refuses_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Copies stop at the limit, with one line in the log."""
    budget = CopyBudget(100)
    assert [budget.take(60), budget.take(60), budget.take(40), budget.take(1)] == [True, False, True, False]
    assert len(caplog.records) == 1


def make_layers(ops: k.Ops, quantization: str, num_layers: int, bias: bool, normed: bool) -> list[LayerWeights]:
    """Layers of 64 hidden, 4 heads of 32 over 2 KV heads, 96 inner features."""
    torch.manual_seed(6)

    def linear(*rows: int, width: int, biased: bool = False) -> k.Linear:
        parts = [torch.randn(r, width) * width**-0.5 for r in rows]
        return ops.make_linear(parts, torch.randn(sum(rows)) if biased else None, device=CPU, dtype=torch.float32, quantization=quantization)[0]

    return [
        LayerWeights(
            attention_norm=torch.rand(64) + 0.5,
            qkv=linear(128, 64, 64, width=64, biased=bias),
            q_norm=torch.rand(32) + 0.5 if normed else None,
            k_norm=torch.rand(32) + 0.5 if normed else None,
            output=linear(64, width=128),
            mlp_norm=torch.rand(64) + 0.5,
            gate_up=linear(96, 96, width=64, biased=bias),
            down=linear(64, width=96),
            sliding_window=20 if index % 2 else None,
        )
        for index in range(num_layers)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "normed"), [(False, False), (True, True)])
def test_the_stack_equals_its_layers_one_by_one(ops: CpuOps, dtype: torch.dtype, bias: bool, normed: bool) -> None:
    """One call for all layers gives the hidden states and the cache that the single operations give, over a mixed step with padding."""
    layers = make_layers(ops, "int8", 4, bias, normed)
    stack = ops.make_decoder_stack(layers, num_heads=4, num_kv_heads=2, head_dim=32, eps=1e-5)
    assert stack is not None
    batch = k.AttentionBatch(
        input_ids=torch.zeros(21, dtype=torch.int32),
        positions=torch.tensor([29, 0, *range(5, 23), 0], dtype=torch.int32),
        slot_mapping=torch.tensor([16 + 13, -1, *range(32 + 5, 32 + 23), -1]),
        query_start=torch.tensor([0, 1, 2, 20], dtype=torch.int32),
        context_lens=torch.tensor([30, 0, 23], dtype=torch.int32),
        rows=torch.tensor([0, 2, 1], dtype=torch.int32),
        block_tables=torch.tensor([[0, 1], [2, 3], [0, 0]], dtype=torch.int32),
        logit_index=torch.tensor([0, 0, 19]),
        num_decodes=2, max_query_len=18, max_context_len=30,
    )  # fmt: skip
    cos_sin = torch.randn(64, 32).clamp(-1, 1)
    hidden = torch.randn(21, 64).to(dtype)
    prefilled = [tuple(torch.randn(4, 2, 16, 32).to(dtype) for _ in range(2)) for _ in layers]
    mine, theirs = ([(keys.clone(), values.clone()) for keys, values in prefilled] for _ in range(2))
    actual = stack(hidden.clone(), cos_sin, mine, batch)

    residual = hidden.float()
    reference = ReferenceOps()
    for layer, (keys, values) in zip(layers, theirs, strict=True):
        x = reference.rms_norm(residual, layer.attention_norm, 1e-5)
        q = reference.rope_store_kv(layer.qkv(x), cos_sin, keys, values, batch, layer.q_norm, layer.k_norm, 1e-5)
        residual = residual + layer.output(reference.attention(q, keys, values, batch, 32**-0.5, layer.sliding_window))
        x = reference.rms_norm(residual, layer.mlp_norm, 1e-5)
        residual = residual + layer.down(reference.silu_mul(layer.gate_up(x)))
    # A value at the edge between two int8 steps may fall either way. In bfloat16, where q and the softmax weights of chunks are rounded too (0.4 %
    # each), many do, layer upon layer.
    assert error(actual[:20], residual[:20]) < (3e-2 if dtype == torch.bfloat16 else 2e-3)
    for (keys, values), (twin_keys, twin_values) in zip(mine, theirs, strict=True):
        assert error(keys, twin_keys) < 2e-2
        assert error(values, twin_values) < 2e-2


def test_the_stack_declines_layers_it_cannot_run(ops: CpuOps) -> None:
    """Dense projections have no fused path."""
    assert ops.make_decoder_stack(make_layers(ops, "none", 1, False, False), num_heads=4, num_kv_heads=2, head_dim=32, eps=1e-5) is None


def test_without_a_compiler_plain_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No g++ means no CpuOps, one line that names the package to install, and no exception."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert try_cpu_ops() is None
    assert "install g++" in caplog.text


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that exits with an error leaves no library behind, and its message reaches the log."""
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: no headers" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert try_cpu_ops() is None
    assert "no headers" in caplog.text
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_the_crossover_needs_a_clear_win_to_the_end() -> None:
    """A copy is used from where it wins by a tenth at every larger step too."""
    assert calibration.crossover({"16": (1.0, 2.0), "64": (4.0, 3.0), "256": (16.0, 8.0)}) == 64
    assert calibration.crossover({"16": (1.0, 0.5), "64": (4.0, 3.9), "256": (16.0, 8.0)}) == 256
    assert calibration.crossover({"16": (1.0, 0.5), "64": (4.0, 0.5), "256": (16.0, 16.0)}) is None


class FakeMeasurement:
    """Two slices, then the given times."""

    def __init__(self, seconds: calibration.Seconds, is_steady: bool, log: list[str], kind: str) -> None:
        self.seconds, self.is_steady, self._log, self._kind, self._left = seconds, is_steady, log, kind, 2

    @property
    def is_done(self) -> bool:
        return self._left == 0

    def advance(self) -> None:
        self._left -= 1
        self._log.append(self._kind)


def fake_measurements(monkeypatch: pytest.MonkeyPatch, *, is_steady: bool) -> list[str]:
    """Puts fake times in the place of measured ones; returns the log of slices."""
    log: list[str] = []
    monkeypatch.setattr(calibration, "bfloat16_is_fast", lambda: True)
    monkeypatch.setattr(calibration, "Measurement", lambda _, kind: FakeMeasurement({"64": (2.0, 1.0)}, is_steady, log, kind))
    return log


def test_calibration_is_measured_once_and_kept(ops: CpuOps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known before the last slice, the next process reads the file, and a broken file is measured anew."""
    slices = fake_measurements(monkeypatch, is_steady=True)
    calibrator = calibration.Calibrator(ops._library, tmp_path)
    assert not calibrator.is_known
    assert calibrator.min_dense_tokens("int4") is None
    assert len(list(calibrator.measure())) == 4
    assert slices == ["int4", "int4", "int8", "int8"]
    assert calibrator.min_dense_tokens("int4") == 64
    again = calibration.Calibrator(ops._library, tmp_path)
    assert again.is_known
    assert again.min_dense_tokens("int8") == 64
    path = next((tmp_path / "kernels").glob("calibration-*.json"))
    assert json.loads(path.read_text())["min_dense_tokens"] == {"int4": 64, "int8": 64}
    path.write_text("{")
    assert not calibration.Calibrator(ops._library, tmp_path).is_known


def test_unsteady_times_are_used_but_not_kept(ops: CpuOps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a busy machine measures serves this process only."""
    fake_measurements(monkeypatch, is_steady=False)
    calibrator = calibration.Calibrator(ops._library, tmp_path)
    list(calibrator.measure())
    assert calibrator.min_dense_tokens("int4") == 64
    assert not calibration.Calibrator(ops._library, tmp_path).is_known


def test_a_time_counts_once_two_rounds_agree(ops: CpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds go on until the two lowest lie close; where they never do, the measurement says that it is not steady."""
    times = iter([3.0, 2.0, 1.0, 1.02, *([1.0, 1.0] * 7)])
    monkeypatch.setattr(calibration, "_best_seconds", lambda _: next(times))
    measurement = calibration.Measurement(ops._library, "int4")
    for _ in range(4):
        measurement.advance()
    assert next(times) == 1.0  # four rounds were taken, and the next belongs to the next work
    falling = itertools.count(1)
    monkeypatch.setattr(calibration, "_best_seconds", lambda _: 2.0 ** -next(falling))
    while not measurement.is_done:
        measurement.advance()
    assert not measurement.is_steady


def test_measuring_gives_both_forms_a_time(ops: CpuOps) -> None:
    """A real measurement yields positive seconds for every number of tokens."""
    measurement = calibration.Measurement(ops._library, "int4")
    while not measurement.is_done:
        measurement.advance()
    assert all(integer > 0 and dense > 0 for integer, dense in measurement.seconds.values())
    assert list(measurement.seconds) == ["16", "64", "256", "512"]


def test_a_lesser_architecture_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """$APPLIANCE_CPU_ARCHITECTURE decides what is compiled, and such kernels get no bfloat16 copies."""
    monkeypatch.setenv("APPLIANCE_CPU_ARCHITECTURE", "x86-64-v3")
    assert target_architecture() == "x86-64-v3"
    assert not calibration.bfloat16_is_fast()
