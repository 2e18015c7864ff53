"""Token counts of a request, as the specification reports them."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose keys and values were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Every prompt counted once; every token that belongs to an output, end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> Usage:
    """The counts together with their sum."""
    return Usage(num_prompt_tokens, num_output_tokens, num_prompt_tokens + num_output_tokens, PromptTokensDetails(num_cached_tokens))
