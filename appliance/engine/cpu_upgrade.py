"""What a CPU engine improves while it serves: compiled kernels in place of plain torch, and weights in the forms that were measured to be fastest.

A thread makes the better model; the step loop takes it between two steps. KV cache and batch state stay: both models read and write the same ones.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from appliance.kernels.cpu.linear import CopyLimit
from appliance.kernels.cpu_ops import CpuOps, try_cpu_ops
from appliance.kernels.ops import AttentionBatch, Ops
from appliance.model.decoder import Decoder

log = logging.getLogger(__name__)

LoadWith = Callable[[CpuOps], Decoder]

_OVER = object()
_CHECK_TOKENS = 24
_MAX_ERROR = 0.3  # of the logits' norm: int4 weights made here are some 10 % off, kernels that the compiler got wrong are 100 % or NaN


class Improver:
    """Improves one engine's model. Belongs to the step loop's thread."""

    def __init__(self, load: LoadWith, decoder: Decoder, ops: Ops, copy_bytes: CopyLimit) -> None:
        """`decoder` and `ops` serve now. Where they are plain torch, compiling starts at once."""
        self._load = load
        self._idle_work: Iterator[None] | None = None
        self._upgrade: Upgrade | None = None
        if isinstance(ops, CpuOps):
            self._calibrate_with(ops)
        else:
            self._upgrade = Upgrade(lambda: compile_and_load(load, decoder, copy_bytes))

    def take(self) -> tuple[Decoder, Ops] | None:
        """What takes over from the next step on; None most of the time."""
        upgrade = self._upgrade
        if upgrade is None or not upgrade.is_over:
            return None
        self._upgrade, made = None, upgrade.made
        if made is not None and isinstance(made[1], CpuOps):
            self._calibrate_with(made[1])
        return made

    def work_while_idle(self) -> bool:
        """One slice of some 10 ms, if there is anything to do and the machine is not busy otherwise."""
        if self._idle_work is None:
            return False
        if os.getloadavg()[0] > (os.cpu_count() or 1):
            return False
        if next(self._idle_work, _OVER) is _OVER:
            self._idle_work = None
        return True

    def _calibrate_with(self, ops: CpuOps) -> None:
        if not ops.calibrator.is_known:
            self._idle_work = calibrate(ops, lambda: self._reload(ops))

    def _reload(self, ops: CpuOps) -> None:
        self._upgrade = Upgrade(lambda: (self._load(ops), ops))


class Upgrade:
    """One better model on its way: `made` once `is_over`."""

    def __init__(self, make: Callable[[], tuple[Decoder, Ops] | None]) -> None:
        """`make` runs in a thread of its own; None, or an exception, which is logged: everything stays as it is."""
        self._make = make
        self.made: tuple[Decoder, Ops] | None = None
        self._thread = threading.Thread(target=self._run, name="upgrade", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        torch.set_grad_enabled(False)  # settings of this thread alone
        torch.set_num_threads(1)
        try:
            self.made = self._make()
        except Exception:
            log.exception("the engine goes on as it is: making a faster model failed")


def compile_and_load(load: LoadWith, current: Decoder, copy_bytes: CopyLimit) -> tuple[Decoder, Ops] | None:
    """Compile the C++ kernels, load the model with them and compare it with the current one. None where one of these fails, which is logged."""
    ops = try_cpu_ops(copy_bytes, in_background=True)
    if ops is None:
        return None
    started = time.monotonic()
    decoder = load(ops)
    error = logits_error(decoder, current)
    if not error < _MAX_ERROR:
        log.error("the compiled kernels fail their self-check (logits differ by %.3g of their norm): plain torch goes on", error)
        return None
    log.info("compiled kernels take over after loading for %.1f s (logits within %.2g of plain torch's)", time.monotonic() - started, error)
    return decoder, ops


def calibrate(ops: CpuOps, upgrade: Callable[[], None]) -> Iterator[None]:
    """Idle work, a slice a step: measure which forms of weights are fastest, and call `upgrade` where the model should be loaded anew for it."""
    try:
        yield from ops.calibrator.measure()
        if any(ops.calibrator.min_dense_tokens(kind) is not None for kind in ("int4", "int8")):
            upgrade()
    except Exception:
        log.exception("the crossover of weight forms cannot be measured")


def logits_error(one: Decoder, other: Decoder) -> float:
    """Norm of the difference over the norm of `other`'s logits, for a prompt of some tokens and one decode after it."""
    difference = norm = 0.0
    for mine, theirs in zip(_check_logits(one), _check_logits(other), strict=True):
        difference += float((mine - theirs).double().square().sum())
        norm += float(theirs.double().square().sum())
    return float((difference / norm) ** 0.5)


def _check_logits(decoder: Decoder) -> list[Tensor]:
    shape = decoder.kv_shape(-(-(_CHECK_TOKENS + 1) // 16), 16)
    caches = [(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(decoder.config.num_layers)]
    chunk, decode = _entry(decoder, 0, _CHECK_TOKENS, shape[0]), _entry(decoder, _CHECK_TOKENS, 1, shape[0])
    return [decoder.logits(decoder.forward(batch, caches)).float() for batch in (chunk, decode)]


def _entry(decoder: Decoder, start: int, count: int, num_blocks: int) -> AttentionBatch:
    """A step of `count` tokens of one sequence that holds `start` tokens already."""
    positions = torch.arange(start, start + count)
    return AttentionBatch(
        input_ids=(positions * 37 % decoder.config.vocab_size).to(torch.int32),
        positions=positions.to(torch.int32),
        slot_mapping=positions,
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([start + count], dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        logit_index=torch.tensor([count - 1]),
        num_decodes=int(count == 1),
        max_query_len=count,
        max_context_len=start + count,
    )
