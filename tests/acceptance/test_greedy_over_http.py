"""The served model's greedy tokens are transformers' own, through the whole path from HTTP to HTTP."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import aiohttp
import pytest
from appliance_server import ApplianceServer, Stream, run_stream
from greedy_oracle import PREFIX, PROMPTS, Reference, compare, reference_outputs

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def references(embedded_model: Path) -> list[Reference]:
    """What transformers generates, one prompt at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames the argument that its older versions know alone
        return reference_outputs(embedded_model, len(PROMPTS), NUM_TOKENS, "cpu")


async def test_twenty_prompts_of_64_tokens_equal_transformers(references: list[Reference], embedded_server: ApplianceServer) -> None:
    """20 prompts x 64 tokens in float32, all at once as text, then one after another from the prefix cache."""
    asks = [{"prompt": PREFIX + text, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True} for text in PROMPTS]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(900)) as session:
        together = await asyncio.gather(*(run_stream(session, embedded_server.url, ask, Stream()) for ask in asks))
        in_turn = [await run_stream(session, embedded_server.url, ask, Stream()) for ask in asks]
    for streams in (together, in_turn):
        for stream, reference in zip(streams, references, strict=True):
            assert stream.usage is not None
            assert stream.usage["prompt_tokens"] == len(reference.prompt), "the two tokenizers disagree"
        num_ties = compare(references, [stream.token_ids for stream in streams])
        print(f"{len(PROMPTS)} prompts x {NUM_TOKENS} tokens equal, {num_ties} near-ties")
    assert sum((stream.usage or {})["prompt_tokens_details"]["cached_tokens"] > 0 for stream in in_turn) == len(PROMPTS)
