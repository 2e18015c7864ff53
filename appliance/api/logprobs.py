"""Log-probabilities in the two shapes of the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from appliance.api.generation import TokenScore
from appliance.text.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`; a token that is part of a character shows U+FFFD and its true bytes."""
    table = tokenizer.token_bytes(skip_special=False)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = table[token_id]
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        {**entry(score.token_id, score.logprob), "top_logprobs": [entry(token_id, logprob) for token_id, logprob in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore], offset: int) -> tuple[dict[str, Any], int]:
    """`{tokens, token_logprobs, top_logprobs, text_offset}` and the offset behind it; `offset` is where the first token's text begins."""
    table = tokenizer.token_bytes(skip_special=False)
    tokens = [table[score.token_id].decode("utf-8", "replace") for score in scores]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {table[token_id].decode("utf-8", "replace"): logprob for token_id, logprob in (*score.top, (score.token_id, score.logprob))}
            for score in scores
        ],
        "text_offset": offsets,
    }, offset
