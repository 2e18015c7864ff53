"""Better kernels and weights that a CPU engine takes while it serves: only whole ones, only between steps, only if they are right."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from appliance.engine import cpu_upgrade
from appliance.engine.cpu_upgrade import Improver, Upgrade, calibrate, compile_and_load, logits_error
from appliance.kernels.cpu_ops import CpuOps
from appliance.kernels.ops import AttentionBatch, Ops
from appliance.kernels.reference import ReferenceOps
from appliance.model.decoder import Decoder


class FakeDecoder:
    """Logits that depend on the ids and a scale."""

    config = SimpleNamespace(num_layers=1, vocab_size=50)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        return num_blocks, 1, block_size, 4

    def forward(self, batch: AttentionBatch, caches: list[Any]) -> torch.Tensor:
        return batch.input_ids[batch.logit_index].float().unsqueeze(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scale * (hidden + torch.arange(50.0))


class FakeCalibrator:
    """Known after two slices."""

    def __init__(self, min_tokens: int | None) -> None:
        self._min_tokens, self.is_known = min_tokens, False

    def measure(self) -> Iterator[None]:
        yield
        yield
        self.is_known = True

    def min_dense_tokens(self, _: str) -> int | None:
        return self._min_tokens


def decoder(scale: float = 1.0) -> Decoder:
    """A fake of one."""
    return cast(Decoder, FakeDecoder(scale))


def cpu_ops(min_tokens: int | None = None) -> CpuOps:
    """CpuOps without a library, not calibrated yet."""
    ops = CpuOps.__new__(CpuOps)
    ops.calibrator = cast(Any, FakeCalibrator(min_tokens))
    return ops


def finish(improver: Improver) -> tuple[Decoder, Ops] | None:
    """What the improver gives once its thread has ended."""
    assert improver._upgrade is not None
    improver._upgrade._thread.join(10)
    return improver.take()


def test_compiled_kernels_take_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch serves until the compiled kernels are checked; they are handed over once, and calibration follows while idle."""
    ops, better = cpu_ops(), decoder(1.01)
    monkeypatch.setattr(cpu_upgrade, "try_cpu_ops", lambda *_, **__: ops)
    monkeypatch.setattr(cpu_upgrade.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    improver = Improver(lambda _: better, decoder(), ReferenceOps(), 0)
    assert finish(improver) == (better, ops)
    assert improver.take() is None
    slices = [improver.work_while_idle() for _ in range(4)]
    assert slices == [True, True, True, False]
    assert ops.calibrator.is_known


@pytest.mark.parametrize("scale", [2.0, float("nan")])
def test_kernels_that_compute_otherwise_are_refused(scale: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A self-check that fails leaves plain torch in place and says so."""
    monkeypatch.setattr(cpu_upgrade, "try_cpu_ops", lambda *_, **__: cpu_ops())
    assert compile_and_load(lambda _: decoder(scale), decoder(), 0) is None
    assert "self-check" in caplog.text


def test_no_compiler_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels there is nothing to take and no idle work."""
    monkeypatch.setattr(cpu_upgrade, "try_cpu_ops", lambda *_, **__: None)
    improver = Improver(lambda _: decoder(), decoder(), ReferenceOps(), 0)
    assert finish(improver) is None
    assert not improver.work_while_idle()


def test_a_failing_upgrade_is_logged_and_over(caplog: pytest.LogCaptureFixture) -> None:
    """An exception in the thread ends the upgrade, not the engine."""

    def make() -> None:
        raise RuntimeError("no memory")

    upgrade = Upgrade(make)
    upgrade._thread.join(10)
    assert upgrade.is_over
    assert upgrade.made is None
    assert "no memory" in caplog.text


def test_a_crossover_loads_the_model_anew() -> None:
    """Where dense copies pay, the model is asked for again; where they do not, it is not."""
    for min_tokens, wanted in ((None, 0), (256, 1)):
        asked: list[bool] = []
        list(calibrate(cpu_ops(min_tokens), lambda asked=asked: asked.append(True)))  # type: ignore[misc]
        assert len(asked) == wanted


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle work waits while other programs want the cores."""
    improver = Improver(lambda _: decoder(), decoder(), cpu_ops(), 0)
    monkeypatch.setattr(cpu_upgrade.os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert not improver.work_while_idle()
    monkeypatch.setattr(cpu_upgrade.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert improver.work_while_idle()


def test_the_error_is_relative_to_the_logits() -> None:
    """Logits a tenth larger are a tenth off."""
    assert logits_error(decoder(1.1), decoder()) == pytest.approx(0.1, rel=1e-4)
