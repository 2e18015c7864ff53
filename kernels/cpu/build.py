"""Compiles the C++ kernels at first use into a cache folder, and loads them.

$APPLIANCE_CPU_ARCHITECTURE overrides -march=native (`x86-64-v3`: the code that a CPU with AVX2 alone gets), for tests and comparisons.
Thread-safe across processes: each compiles into a temporary name and renames it, so a reader sees a whole library or none.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

CACHE_VARIABLE: Final = "APPLIANCE_CACHE_DIR"
COMPILER_VARIABLE: Final = "CXX"
ARCHITECTURE_VARIABLE: Final = "APPLIANCE_CPU_ARCHITECTURE"
_SOURCES: Final = Path(__file__).parent
_FLAGS: Final = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
_TIMEOUT_SECONDS: Final = 180.0


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message says why and what would help."""


def cache_dir() -> Path:
    """$APPLIANCE_CACHE_DIR, else the cache folder of the default state folder."""
    if directory := os.environ.get(CACHE_VARIABLE):
        return Path(directory)
    if directory := os.environ.get("STATE_DIRECTORY"):
        return Path(directory.split(":")[0]) / "cache"
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "appliance" / "cache"


@functools.cache
def cpu_description() -> tuple[str, str]:
    """The CPU's model name and its instruction set flags, as the kernel reports them; empty strings where it does not."""
    name, flags = "", ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not name:
                name = value.strip()
            elif key.strip() == "flags" and not flags:
                flags = value.strip()
    except OSError:
        pass
    return name, flags


def target_architecture() -> str:
    """The -march value of this process's kernels."""
    return os.environ.get(ARCHITECTURE_VARIABLE) or "native"


def load_library(architecture: str | None = None, *, in_background: bool = False) -> ctypes.CDLL:
    """The kernels for this CPU (or for another -march value that it can run), compiled if need be. Raises BuildError.

    in_background: the compiler runs at the lowest priority, since the process serves meanwhile.
    """
    compiler, path = _target(architecture or target_architecture())
    if not path.exists():
        _build(compiler, architecture or target_architecture(), path, in_background=in_background)
    return _open(path)


def built_library() -> ctypes.CDLL | None:
    """The kernels if they are compiled already. Raises BuildError where they cannot be."""
    _, path = _target(target_architecture())
    return _open(path) if path.exists() else None


def _target(architecture: str) -> tuple[str, Path]:
    """The compiler and where its library belongs."""
    compiler = os.environ.get(COMPILER_VARIABLE) or shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError("no C++ compiler found; install g++ (Debian: apt install g++) or set CXX")
    return compiler, cache_dir() / "kernels" / f"cpu-{_fingerprint(compiler, architecture)}.so"


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error


def _sources() -> list[Path]:
    return sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")))


def _fingerprint(compiler: str, architecture: str) -> str:
    """Names a build by everything that it depends on: sources, flags, compiler and CPU."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} --version fails: {error}") from error
    digest.update(repr((_FLAGS, architecture, version, cpu_description())).encode())
    return digest.hexdigest()[:20]


def _build(compiler: str, architecture: str, path: Path, *, in_background: bool) -> None:
    started = time.monotonic()
    command = ["nice", "-n", "19", compiler] if in_background and shutil.which("nice") else [compiler]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            flags = [*_FLAGS, f"-march={architecture}"]
            objects = [(source, Path(folder) / f"{source.stem}.o") for source in _sources() if source.suffix == ".cpp"]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                list(pool.map(lambda job: _run([*command, *flags, "-c", str(job[0]), "-o", str(job[1])]), objects))
            library = Path(folder) / path.name
            _run([*command, "-shared", "-fopenmp", *(str(target) for _, target in objects), "-o", str(library)])
            library.replace(path)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error}") from error
    log.info("compiled the CPU kernels in %.1f s into %s", time.monotonic() - started, path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} fails: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{' '.join(command[-4:])} fails: {'; '.join(lines[:3])}")
