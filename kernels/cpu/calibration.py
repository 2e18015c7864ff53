"""Which form of a quantised weight is fastest for how many tokens, measured once per CPU and version and kept as JSON in the cache folder.

Forms that exist, by what the CPU can do (the integer kernels serve every step unless a dense form was measured to be faster):

| form     | needs                        | used for                                                                        |
|----------|------------------------------|---------------------------------------------------------------------------------|
| int4     | AVX-512 VNNI, AVX-VNNI, AVX2 | Q4_0, Q4_1, Q4_K, quantization=int4                                             |
| int8     | the same                     | Q8_0, other GGUF kinds, quantization=int8                                       |
| bfloat16 | AVX512-BF16 or AMX           | large steps, if oneDNN's GEMM beats the integer kernels by a tenth              |
| float32  | nothing                      | float32 and unquantised models; never a copy (4-8 times the bytes and slower)   |
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as functional

from appliance.kernels.cpu.build import cache_dir, cpu_description
from appliance.kernels.cpu.linear import PackedLinear, pack

log = logging.getLogger(__name__)

_VERSION: Final = 2
_TOKENS: Final = (16, 64, 256, 512)
_SHAPE: Final = (1536, 576)  # a small model's gate; larger shapes favour neither form more than this one does
_NUM_WEIGHTS: Final = 2
_REPEATS: Final = 5
_MARGIN: Final = 0.9  # a copy costs memory: it must be this much faster


class Calibrator:
    """Answers from the cache file where it holds this CPU, else measures (about 0.2 s) and writes it."""

    def __init__(self, library: ctypes.CDLL, folder: Path | None = None) -> None:
        self._library = library
        self._folder = folder
        self._known: dict[str, int | None] = {}

    def min_dense_tokens(self, quantization: str) -> int | None:
        """From how many tokens a bfloat16 copy beats `quantization` (int4 or int8) weights; None: never, or no such form on this CPU."""
        if not bfloat16_is_fast():
            return None
        if quantization not in self._known:
            self._known[quantization] = self._read(quantization) if self._path().exists() else self._measure_all(quantization)
        return self._known[quantization]

    def _path(self) -> Path:
        key = repr((_VERSION, cpu_description(), torch.__version__, self._library._name))
        return (self._folder or cache_dir()) / "kernels" / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def _read(self, quantization: str) -> int | None:
        try:
            value = json.loads(self._path().read_text())["min_dense_tokens"][quantization]
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("measuring anew: %s is unreadable (%s)", self._path(), error)
            return self._measure_all(quantization)
        return value if value is None or isinstance(value, int) else None

    def _measure_all(self, quantization: str) -> int | None:
        found, seconds = {}, {}
        for kind in ("int4", "int8"):
            seconds[kind] = measure(self._library, kind)
            found[kind] = crossover(seconds[kind])
        log.info("integer against bfloat16 weights: a copy pays from %s tokens", found)
        document = {"cpu": cpu_description()[0], "min_dense_tokens": found, "seconds": seconds}
        try:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path().with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1))
            temporary.replace(self._path())
        except OSError as error:
            log.warning("the measurement is not kept: %s", error)
        self._known.update(found)
        return found[quantization]


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    flags = cpu_description()[1].split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def measure(library: ctypes.CDLL, quantization: str) -> dict[str, tuple[float, float]]:
    """For each number of tokens, seconds of a weight in integer and in bfloat16 form.

    CPU time of one thread: both forms spread over threads alike, and what else runs on the machine (it is starting up) does not count.
    """
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(_SHAPE, generator=generator) for _ in range(_NUM_WEIGHTS)]
    packed = [PackedLinear(library, [pack(library, weight, quantization)], _SHAPE[1], None, None) for weight in dense]
    narrow = [weight.to(torch.bfloat16) for weight in dense]
    result = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for num_tokens in _TOKENS:
            x = torch.randn(num_tokens, _SHAPE[1], generator=generator).to(torch.bfloat16)
            result[str(num_tokens)] = (
                _best_seconds(lambda x=x: [layer(x) for layer in packed]),  # type: ignore[misc]
                _best_seconds(lambda x=x: [functional.linear(x, weight) for weight in narrow]),  # type: ignore[misc]
            )
    finally:
        torch.set_num_threads(num_threads)
    return result


def crossover(seconds: dict[str, tuple[float, float]]) -> int | None:
    """The least measured number of tokens from which on the second form always wins by the margin."""
    least = None
    for tokens, (integer, dense) in sorted(seconds.items(), key=lambda item: -int(item[0])):
        if dense >= integer * _MARGIN:
            break
        least = int(tokens)
    return least


def _best_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return best / _NUM_WEIGHTS
