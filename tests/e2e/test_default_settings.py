"""What a new user gets: no setting but the port, whatever form of the weights the machine makes fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from appliance_server import ApplianceServer, serving

NEAR_TIE = 0.25  # nats between the two likeliest tokens; bf16 and int8 activations move a log-probability of this model by up to 0.15


@pytest.fixture(scope="module")
def server(embedded_model: Path, state_folder: Callable[[], Path]) -> Iterator[ApplianceServer]:
    """The embedded model as it is served out of the box, but for one compute thread (beside other work, two wait for each other)."""
    with serving(state_folder(), {"engine.num_threads": 1}) as server:
        yield server


async def _greedy(client: openai.AsyncOpenAI, question: str) -> tuple[str, list[tuple[str, float]], int]:
    """The reply, each token with its lead over the next likeliest, and the prompt tokens that came from the cache."""
    messages: list[Any] = [{"role": "user", "content": question}]
    reply = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=messages, temperature=0, max_tokens=32, logprobs=True, top_logprobs=2
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    leads = [(entry.token, entry.top_logprobs[0].logprob - entry.top_logprobs[1].logprob) for entry in choice.logprobs.content]
    return choice.message.content or "", leads, reply.usage.prompt_tokens_details.cached_tokens or 0


async def test_the_capital_of_france_is_paris_out_of_the_box(client: openai.AsyncOpenAI) -> None:
    """The first question that everybody asks, twice, the second time from the prefix cache."""
    for _ in range(2):
        text, _, _ = await _greedy(client, "What is the capital of France?")
        assert "Paris" in text


@pytest.mark.parametrize("question", ["What is the sun made of?", "Tell me how bread is baked.", "Who wrote Romeo and Juliet? " * 12])
async def test_a_prefix_hit_forks_at_a_near_tie_at_most(client: openai.AsyncOpenAI, question: str) -> None:
    """In bf16 a cached prompt is rounded elsewhere than a computed one: the texts are equal, or part where two tokens are about as likely."""
    _, computed, cold = await _greedy(client, question)
    _, cached, warm = await _greedy(client, question)
    assert warm > cold
    for (token, lead), (other, other_lead) in zip(computed, cached, strict=False):
        if token != other:
            assert lead < NEAR_TIE
            assert other_lead < NEAR_TIE
            return
    assert len(computed) == len(cached)
