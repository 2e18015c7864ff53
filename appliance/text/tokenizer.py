"""Text to token ids, and token ids to bytes. Built from a tokenizer.json or from GGUF metadata; without transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HfTokenizer

from appliance.errors import ModelError
from appliance.text.byte_alphabet import to_bytes
from appliance.text.gguf_tokenizer import adds_bos, build_tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer(Protocol):
    """What the server asks of a vocabulary. Immutable and thread-safe, but for caches."""

    vocab_size: int  # ids from here on have no token of their own
    bos_id: int | None
    eos_id: int | None
    add_bos: bool

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`. Special tokens written in it count as such; lone surrogates count as U+FFFD."""

    def token_bytes(self, *, skip_special: bool) -> TokenBytes:
        """The bytes of every id, as a mapping. Any int is a key: an id beyond the vocabulary reads as `<token_N>`."""

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it; `<token_N>` beyond it."""

    def special_token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, `unk_token` or `pad_token`; None where the model has none."""

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""


class TokenBytes(dict[int, bytes]):
    """id -> bytes, filled on first use: a lookup that hits costs what a dict costs. Bounded by the vocabulary."""

    def __init__(self, tokenizer: VocabularyTokenizer | ByteTokenizer, skip_special: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip_special = skip_special

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return unknown_token(token_id).encode()
        value = self._tokenizer.bytes_of(token_id, skip_special=self._skip_special)
        self[token_id] = value
        return value


def unknown_token(token_id: int) -> str:
    """What an id without a token streams as (models with padded or random embeddings sample such ids)."""
    return f"<token_{token_id}>"


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special: bool) -> str:
    """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
    table = tokenizer.token_bytes(skip_special=skip_special)
    return b"".join([table[token_id] for token_id in ids]).decode("utf-8", "replace")


class VocabularyTokenizer:
    """A Tokenizer over a `tokenizers.Tokenizer`."""

    def __init__(
        self,
        backend: HfTokenizer,
        *,
        special_tokens: dict[str, str],
        add_bos: bool,
        bos_in_post_processor: bool,
    ) -> None:
        """`special_tokens` maps bos_token, eos_token, ... to their text. `bos_in_post_processor`: the backend itself adds BOS when asked."""
        self._backend = backend
        self._special = special_tokens
        self._bos_in_post_processor = bos_in_post_processor
        self._added = {token_id: (token.content, token.special) for token_id, token in backend.get_added_tokens_decoder().items()}
        self._spelling = _spelling_of(backend)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)
        self.bos_id = self.id_of(special_tokens["bos_token"]) if "bos_token" in special_tokens else None
        self.eos_id = self.id_of(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        self.add_bos = add_bos and self.bos_id is not None
        self._tables = {skip: TokenBytes(self, skip) for skip in (False, True)}

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> VocabularyTokenizer:
        """From the header of a GGUF file. Raises ModelError where it has no BPE vocabulary."""
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {}
        for name, key in names.items():
            token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                special[name] = tokens[token_id]
        return cls(build_tokenizer(metadata), special_tokens=special, add_bos=adds_bos(metadata), bos_in_post_processor=False)

    @classmethod
    def from_file(cls, path: Path, config: dict[str, Any]) -> VocabularyTokenizer:
        """From a tokenizer.json and the parsed tokenizer_config.json (may be empty). Raises ModelError if the file does not parse."""
        try:
            backend = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                special[name] = text
        probe = backend.encode("a", add_special_tokens=True).ids
        bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        in_post_processor = bos_id is not None and probe[:1] == [bos_id]
        add_bos = bool(config.get("add_bos_token", in_post_processor))
        return cls(backend, special_tokens=special, add_bos=add_bos or in_post_processor, bos_in_post_processor=in_post_processor)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):  # lone surrogates: the backend takes UTF-8 only
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._backend.encode(clean, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.add_bos and not self._bos_in_post_processor and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        return ids

    def token_bytes(self, *, skip_special: bool) -> TokenBytes:
        return self._tables[skip_special]

    def bytes_of(self, token_id: int, *, skip_special: bool) -> bytes:
        """Uncached; use `token_bytes`."""
        if token_id in self._added:
            content, special = self._added[token_id]
            return b"" if special and skip_special else content.encode("utf-8", "replace")
        token = self._backend.id_to_token(token_id)
        if token is None:
            return unknown_token(token_id).encode()
        if self._spelling == "byte_level":
            return to_bytes(token)
        if self._spelling == "sentencepiece":
            if match := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace("▁", " ").encode()
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def token_name(self, token_id: int) -> str:
        name = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return name if name is not None else unknown_token(token_id)

    def special_token(self, name: str) -> str | None:
        return self._special.get(name)

    def id_of(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id


class ByteTokenizer:
    """For models without tokenizer files (`dummy:`): ids 0-255 are bytes, others read as `<token_N>`. Prompts of ids work as ever."""

    vocab_size = 256
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos = False

    def __init__(self) -> None:
        self._table = TokenBytes(self, skip_special=False)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def token_bytes(self, *, skip_special: bool) -> TokenBytes:
        return self._table

    def bytes_of(self, token_id: int, *, skip_special: bool) -> bytes:
        """Uncached; use `token_bytes`."""
        return bytes([token_id])

    def token_name(self, token_id: int) -> str:
        return f"<0x{token_id:02X}>" if 0 <= token_id < 256 else unknown_token(token_id)

    def special_token(self, name: str) -> str | None:
        return None

    def id_of(self, token: str) -> int | None:
        match = _BYTE_TOKEN.fullmatch(token)
        return int(match[1], 16) if match else None


def _spelling_of(backend: HfTokenizer) -> str:
    """How tokens spell their bytes: `byte_level`, `sentencepiece` or `other`. The decoder says; its repr names every part of a sequence."""
    decoder = str(backend.decoder) if backend.decoder is not None else ""
    if "ByteLevel" in decoder:
        return "byte_level"
    if "ByteFallback" in decoder or "Metaspace" in decoder or "▁" in decoder:
        return "sentencepiece"
    return "other"
