"""A `tokenizers.Tokenizer` built from GGUF metadata. A GGUF holds vocabulary, merges and token types, but no pre-tokenizer: that is chosen by name.

Split patterns: those of the models' own tokenizer.json files, by the name that `tokenizer.ggml.pre` has in llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from appliance.errors import ModelError
from appliance.text.byte_alphabet import BYTE_OF_CHARACTER

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# "smollm" is not among the digit splitters: its vocabulary has no token of two digits, and transformers (the oracle) reads the same GGUF so.
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
}
_DIGIT_SPLITTERS = frozenset({"starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_IGNORES_MERGES = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken", "pixtral"})  # a piece that is a token is taken whole
_BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken", "pixtral"})  # where tokenizer.ggml.add_bos_token is absent


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` (tokenizer.ggml.*) describes, without a post-processor. Raises ModelError for models other than BPE."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ModelError("the GGUF file has no vocabulary (tokenizer.ggml.tokens)")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise ModelError(f"tokenizer.ggml.model = {kind!r} is not supported (gpt2 and llama are); use the model's folder with its tokenizer.json")
    _add_tokens(tokenizer, metadata, tokens, byte_level=kind == "gpt2")
    return tokenizer


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether a plain prompt begins with BOS: what the file says, else what llama.cpp assumes."""
    flag = metadata.get("tokenizer.ggml.add_bos_token")
    if flag is not None:
        return bool(flag)
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelError("the GGUF file has no merges (tokenizer.ggml.merges)")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _IGNORES_MERGES))
    if pre in _SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif pre in _DIGIT_SPLITTERS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Sentencepiece BPE: merges follow from the scores, unknown characters fall back to byte tokens (<0x0A>)."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of_scores(vocabulary, metadata.get("tokenizer.ggml.scores")),
            fuse_unk=True,
            byte_fallback=True,
            unk_token=tokens[unknown_id] if 0 <= unknown_id < len(tokens) else None,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first" if prefix else "never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges_of_scores(vocabulary: dict[str, int], scores: list[float] | None) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first; of equals, the one whose left part is the longer."""
    if scores is None or len(scores) != len(vocabulary):
        raise ModelError("the GGUF file has no score for every token (tokenizer.ggml.scores)")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocabulary.items():
        score = scores[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((score, len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], *, byte_level: bool) -> None:
    """Control tokens match whole and are special; user-defined ones (<think>) match whole and are text."""
    special, plain = [], []
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type") or (), strict=False):
        if kind == _CONTROL:
            # A control token with characters outside the byte alphabet is a mislabelled one; adding it would grow the vocabulary.
            if not byte_level or all(character in BYTE_OF_CHARACTER for character in token):
                special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    if special:
        tokenizer.add_special_tokens(special)
    if plain:
        tokenizer.add_tokens(plain)
