"""Everything textual about a model, from a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelError
from appliance.text.chat_template import ChatTemplate
from appliance.text.gguf_metadata import read_gguf_metadata
from appliance.text.tokenizer import ByteTokenizer, Tokenizer, VocabularyTokenizer

_MAX_TEMPLATE_BYTES = 1 << 20
# Tokens that end a turn. Some files name another token as EOS, but their chat template ends the assistant's turn with one of these.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "<|eot|>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TextModel:
    """The server's side of a model's text."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: a base model; chat requests get 400
    eos_ids: tuple[int, ...]  # every id that ends a reply, sorted


def load_text(model_path: str, chat_template_override: Path | None = None) -> TextModel:
    """The tokenizer, chat template and end ids of `model_path`: a GGUF file, a Hugging Face folder, or `dummy:FOLDER`.

    A `dummy:` folder without tokenizer files gets a byte tokenizer, so that prompts of token ids work. Raises ModelError, naming the file, for
    anything that cannot be read. Takes about 0.3 s for a vocabulary of 49k.
    """
    dummy = model_path.startswith("dummy:")
    path = Path(model_path.removeprefix("dummy:"))
    if path.is_file():
        return _from_gguf(path, chat_template_override)
    if not path.is_dir():
        raise ModelError(f"{path} is neither a GGUF file nor a folder")
    return _from_folder(path, chat_template_override, allow_bytes=dummy)


def _from_gguf(path: Path, override: Path | None) -> TextModel:
    metadata = read_gguf_metadata(path)
    tokenizer = VocabularyTokenizer.from_gguf(metadata)
    source = metadata.get("tokenizer.chat_template")
    template = _compile(source if isinstance(source, str) else None, tokenizer, override, str(path))
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return TextModel(tokenizer, template, _end_ids(tokenizer, template, named))


def _from_folder(path: Path, override: Path | None, *, allow_bytes: bool) -> TextModel:
    tokenizer: Tokenizer
    config = _read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        tokenizer = VocabularyTokenizer.from_file(path / "tokenizer.json", config)
    elif allow_bytes:
        tokenizer = ByteTokenizer()
    else:
        raise ModelError(f"{path} has no tokenizer.json; convert its tokenizer with transformers' save_pretrained and put the file there")
    template = _compile(_template_of_folder(path, config), tokenizer, override, str(path))
    named: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        named.extend(value if isinstance(value, list) else [value])
    return TextModel(tokenizer, template, _end_ids(tokenizer, template, named))


def _template_of_folder(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json (where several are named: `default`)."""
    if (path / "chat_template.jinja").is_file():
        return _read_text(path / "chat_template.jinja")
    value = _read_json(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _compile(source: str | None, tokenizer: Tokenizer, override: Path | None, origin: str) -> ChatTemplate | None:
    if override is not None:
        source, origin = _read_text(override), str(override)
    if source is None:
        return None
    special = {name: text for name in _SPECIAL_NAMES if (text := tokenizer.special_token(name)) is not None}
    return ChatTemplate(source, special, origin=origin)


def _end_ids(tokenizer: Tokenizer, template: ChatTemplate | None, named: Iterable[Any]) -> tuple[int, ...]:
    ids = {token_id for token_id in named if type(token_id) is int and token_id >= 0}
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    for token in _TURN_ENDS if template is not None else ():
        token_id = tokenizer.id_of(token)
        if token_id is not None and template is not None and token in template.source:
            ids.add(token_id)
    return tuple(sorted(ids))


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ModelError(f"{path} is over {_MAX_TEMPLATE_BYTES} bytes: that is no chat template")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} where there is no such file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value
