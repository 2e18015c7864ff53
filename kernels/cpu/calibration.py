"""Which form of a quantised weight is fastest for how many tokens, measured once per CPU and version and kept as JSON in the cache folder.

Forms that exist, by what the CPU can do (the integer kernels serve every step unless a dense form was measured to be faster):

| form     | needs                        | used for                                                                        |
|----------|------------------------------|---------------------------------------------------------------------------------|
| int4     | AVX-512 VNNI, AVX-VNNI, AVX2 | Q4_0, Q4_1, Q4_K, quantization=int4                                             |
| int8     | the same                     | Q8_0, other GGUF kinds, quantization=int8                                       |
| bfloat16 | AVX512-BF16 or AMX           | large steps, if oneDNN's GEMM beats the integer kernels by a tenth              |
| float32  | nothing                      | float32 and unquantised models; never a copy (4-8 times the bytes and slower)   |

Measuring is idle work: a generator whose steps take some 10 ms each, so that a request that arrives meanwhile waits no longer. A time is the least of
several runs, and counts once two rounds of runs agree on it; where they never do, the machine is too busy to tell and nothing is kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as functional

from appliance.kernels.cpu.build import cache_dir, cpu_description, target_architecture
from appliance.kernels.cpu.linear import PackedLinear, pack

log = logging.getLogger(__name__)

_VERSION: Final = 3
_TOKENS: Final = (16, 64, 256, 512)
_SHAPE: Final = (1536, 576)  # a small model's gate; larger shapes favour neither form more than this one does
_REPEATS: Final = 3  # of a round
_MAX_ROUNDS: Final = 12
_AGREEMENT: Final = 0.05  # two rounds' least times that lie so close are taken to be the machine's own
_MARGIN: Final = 0.9  # a copy costs memory: it must be this much faster
_KINDS: Final = ("int4", "int8")

Seconds = dict[str, tuple[float, float]]  # number of tokens -> seconds in integer form, in bfloat16


class Calibrator:
    """What is known about this CPU: from the cache file, or once `measure` has run to its end."""

    def __init__(self, library: ctypes.CDLL, folder: Path | None = None) -> None:
        self._library = library
        self._folder = folder
        self._known: dict[str, int | None] | None = self._read()

    @property
    def is_known(self) -> bool:
        """Whether there is nothing to measure."""
        return self._known is not None

    def min_dense_tokens(self, quantization: str) -> int | None:
        """From how many tokens a bfloat16 copy beats `quantization` (int4 or int8) weights; None: never, or not known to."""
        return (self._known or {}).get(quantization)

    def measure(self) -> Iterator[None]:
        """Idle work, a slice a step. At its end the crossovers are known, and kept if the times were steady."""
        seconds: dict[str, Seconds] = {}
        steady = True
        for kind in _KINDS:
            measurement = Measurement(self._library, kind)
            while not measurement.is_done:
                measurement.advance()
                yield
            seconds[kind] = measurement.seconds
            steady &= measurement.is_steady
        self._known = {kind: crossover(seconds[kind]) for kind in _KINDS}
        log.info("integer against bfloat16 weights: a copy pays from %s tokens%s", self._known, "" if steady else " (unsteady: not kept)")
        if steady:
            self._write({"cpu": cpu_description()[0], "min_dense_tokens": self._known, "seconds": seconds})

    def _path(self) -> Path:
        key = repr((_VERSION, cpu_description(), torch.__version__, self._library._name))
        return (self._folder or cache_dir()) / "kernels" / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def _read(self) -> dict[str, int | None] | None:
        if not bfloat16_is_fast():
            return dict.fromkeys(_KINDS)
        try:
            values = json.loads(self._path().read_text())["min_dense_tokens"]
            return {kind: None if values[kind] is None else int(values[kind]) for kind in _KINDS}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("measuring anew: %s is unreadable (%s)", self._path(), error)
            return None

    def _write(self, document: dict[str, object]) -> None:
        try:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path().with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1))
            temporary.replace(self._path())
        except OSError as error:
            log.warning("the measurement is not kept: %s", error)


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (and may: kernels for a lesser CPU were not asked for)."""
    flags = cpu_description()[1].split()
    return target_architecture() == "native" and ("amx_bf16" in flags or "avx512_bf16" in flags)


class Measurement:
    """Seconds of a weight in integer and in bfloat16 form, for each number of tokens; `advance` runs one round of one of them.

    CPU time of one thread: both forms spread over threads alike, and what else runs on the machine counts the less.
    """

    def __init__(self, library: ctypes.CDLL, quantization: str) -> None:
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(_SHAPE, generator=generator)
        packed = PackedLinear(library, [pack(library, dense, quantization)], _SHAPE[1], None, None)
        narrow = dense.to(torch.bfloat16)
        inputs = {n: torch.randn(n, _SHAPE[1], generator=generator).to(torch.bfloat16) for n in _TOKENS}
        self._works: list[tuple[int, Callable[[], object]]] = []
        for tokens, x in inputs.items():
            self._works.append((tokens, lambda x=x: packed(x)))  # type: ignore[misc]
            self._works.append((tokens, lambda x=x: functional.linear(x, narrow)))  # type: ignore[misc]
        self._rounds: list[list[float]] = [[] for _ in self._works]
        self._at = 0
        self.is_steady = True

    @property
    def is_done(self) -> bool:
        return self._at == len(self._works)

    @property
    def seconds(self) -> Seconds:
        """Once done."""
        best = [min(rounds) for rounds in self._rounds]
        return {str(tokens): (best[2 * i], best[2 * i + 1]) for i, tokens in enumerate(_TOKENS)}

    def advance(self) -> None:
        """One round; moves on once two rounds agree, or give up to."""
        rounds = self._rounds[self._at]
        rounds.append(_best_seconds(self._works[self._at][1]))
        lowest = sorted(rounds)[:2]
        agreed = len(rounds) > 1 and lowest[1] <= lowest[0] * (1 + _AGREEMENT)
        if agreed or len(rounds) == _MAX_ROUNDS:
            self.is_steady &= agreed
            self._at += 1


def crossover(seconds: Seconds) -> int | None:
    """The least measured number of tokens from which on the second form always wins by the margin."""
    least = None
    for tokens, (integer, dense) in sorted(seconds.items(), key=lambda item: -int(item[0])):
        if dense >= integer * _MARGIN:
            break
        least = int(tokens)
    return least


def _best_seconds(work: Callable[[], object]) -> float:
    """The least of a round's runs, on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(_REPEATS):
            started = time.thread_time()
            work()
            best = min(best, time.thread_time() - started)
        return best
    finally:
        torch.set_num_threads(num_threads)
