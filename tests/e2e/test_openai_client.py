"""A user with the official client and a real model: what they ask for is what they get."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
from appliance_server import ApplianceServer

MODEL = "SmolLM2-135M-Instruct"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = [{"role": "user", "content": "Count from one to ten in words."}]


@pytest.fixture
def server(embedded_server: ApplianceServer) -> ApplianceServer:
    """The embedded model in float32."""
    return embedded_server


async def test_the_capital_of_france_is_paris(client: openai.AsyncOpenAI) -> None:
    """The model knows it, stops by itself, and its tokens are counted."""
    reply = await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=40)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 10
    assert 1 < reply.usage.completion_tokens < 40
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


async def test_a_stream_says_what_the_whole_reply_says(client: openai.AsyncOpenAI) -> None:
    """Streamed and whole replies are the same text with the same usage, and a repeated prompt comes from the prefix cache."""
    whole = await client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, max_tokens=20)
    stream = await client.chat.completions.create(
        model=MODEL, messages=COUNT, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (whole.usage.prompt_tokens - 1) // 16 * 16
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 8, "it came in one piece"


async def test_logprobs_describe_the_tokens(client: openai.AsyncOpenAI) -> None:
    """Greedy tokens are the likeliest of their alternatives, which are sorted and are no more than certain together; their bytes are the text."""
    reply = await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=7, logprobs=True, top_logprobs=4)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 7
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-4
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(values[0], abs=1e-5)
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode()
    assert raw == reply.choices[0].message.content


async def test_two_choices_are_two_samples_and_a_seed_repeats_them(client: openai.AsyncOpenAI) -> None:
    """n = 2 gives two texts; the same seed gives the same two again, beside other load, and another seed gives others."""

    async def ask(seed: int) -> list[str]:
        reply = await client.chat.completions.create(model=MODEL, messages=COUNT, n=2, seed=seed, temperature=1.0, max_tokens=12)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage is not None
        assert reply.usage.completion_tokens > 12
        return [choice.message.content or "" for choice in reply.choices]

    first = await ask(7)
    again, other = await asyncio.gather(ask(7), ask(8))
    assert first[0] != first[1]
    assert again == first
    assert other != first


async def test_a_stop_string_ends_the_text_before_it(client: openai.AsyncOpenAI) -> None:
    """The text ends before the stop string, streamed or not, and the rest is not billed."""
    free = await client.completions.create(model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=16)
    text = free.choices[0].text
    stop = text[len(text) // 2 :][:4]
    cut = await client.completions.create(model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=16, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert free.usage is not None
    assert cut.usage.completion_tokens < free.usage.completion_tokens
    stream = await client.completions.create(model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=16, stop=[stop], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == cut.choices[0].text


async def test_a_prefix_hit_changes_no_token_in_float32(client: openai.AsyncOpenAI) -> None:
    """The same greedy request twice, computed anew and from the cache, gives the same tokens."""
    asks = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me about rivers, mountains and the sea."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    replies = [await client.chat.completions.create(**asks, extra_body={"return_token_ids": True}) for _ in range(2)]
    hits = [reply.usage.prompt_tokens_details.cached_tokens for reply in replies]
    assert hits[0] < hits[1]
    assert len({reply.choices[0].message.content for reply in replies}) == 1


async def test_models_tokens_and_versions_are_served(client: openai.AsyncOpenAI, server: ApplianceServer) -> None:
    """The routes beside generation answer for the served model."""
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    for path in ("/health", "/ready", "/version", "/metrics", "/v1/models"):
        assert server.status(path) == 200
