"""POST /v1/completions."""

import asyncio
from typing import Any

import pytest

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [b"hi"]),
        (["hi", "ho"], [b"hi", b"ho"]),
        ([104, 105], [b"hi"]),
        ([[104, 105], [104]], [b"hi", b"h"]),
    ],
)
async def test_a_prompt_has_four_shapes(server, prompt, expected):
    """Text, texts, ids and lists of ids all reach the engine as ids."""
    status, body, _ = await server.post(COMPLETIONS, {"model": "tiny", "prompt": prompt})
    assert status == 200
    assert [bytes(generation.request.prompt_ids) for generation in server.engine.generations] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_follow_their_prompts(server):
    """With two prompts and n = 2, choices 0-1 belong to the first prompt."""
    await server.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2})
    assert [bytes(generation.request.prompt_ids) for generation in server.engine.generations] == [b"a", b"a", b"b", b"b"]


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(server, stream, prompt):
    """echo repeats the prompt before the completion."""
    request = {"prompt": prompt, "echo": True, "stream": stream}
    if stream:
        events = await server.events(COMPLETIONS, request)
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
    else:
        _, body, _ = await server.post(COMPLETIONS, request)
        text = body["choices"][0]["text"]
    assert text == "hiHello!"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_parallel_lists(server, stream):
    """Completion logprobs are four lists; text_offset counts characters from the completion's begin, across chunks."""
    request = {"prompt": "hi", "logprobs": 1, "max_tokens": 3, "stream": stream}
    if stream:
        events = await server.events(COMPLETIONS, request)
        parts = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
        logprobs = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    else:
        _, body, _ = await server.post(COMPLETIONS, request)
        logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"A": -0.5, "H": -0.5}


async def test_a_truncated_prompt_keeps_its_end(server):
    """truncate_prompt_tokens keeps the last tokens."""
    await server.post(COMPLETIONS, {"prompt": "abcdef", "truncate_prompt_tokens": 2})
    assert bytes(server.engine.generations[0].request.prompt_ids) == b"ef"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 4}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
async def test_what_is_not_served_is_refused_by_name(server, fields, param):
    """Fields that would change the result and are not served answer 400 with their name."""
    status, body, _ = await server.post(COMPLETIONS, {"prompt": "hi", **fields})
    assert (status, body["error"]["param"]) == (400, param)
    assert server.engine.generations == []


async def test_best_of_equal_to_n_is_served(server):
    """best_of that asks for no more than n is the same request."""
    status, body, _ = await server.post(COMPLETIONS, {"prompt": "hi", "best_of": 2, "n": 2})
    assert (status, len(body["choices"])) == (200, 2)


async def test_each_choices_first_token_is_reported_as_it_comes(server: Any) -> None:
    """Live counts of tokens need every choice's first one at once: no gap goes before it, and the record comes only with the end."""
    server.engine.script = None
    asking = asyncio.create_task(server.post("/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 9}))
    generations = [await server.generation(index) for index in range(3)]
    generations[1].put([65])
    generations[0].put([65, 66])
    await server.until(lambda: [call[0] for call in server.observer.calls].count("other_first_token") == 1)
    assert [call[0] for call in server.observer.calls].count("first_token") == 1
    assert not server.records
    for generation in generations:
        generation.put([67], finish="length")
    await asking
    assert [call[0] for call in server.observer.calls].count("other_first_token") == 2


async def test_tokens_that_nobody_took_are_generated_all_the_same(server: Any) -> None:
    """A whole reply takes its tokens at its end; where its client leaves before, the record has those that had come."""
    server.engine.script = None
    asking = asyncio.create_task(server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 50}))
    generation = await server.generation()
    generation.put([65])
    await server.until(lambda: any(call[0] == "first_token" for call in server.observer.calls))
    generation.listen(lambda: None, every_token=False)  # as for tokens that wake nobody
    generation.put([66, 67, 68])
    asking.cancel()
    record = await server.record()
    assert (record.status, record.num_generated_tokens, record.num_written_tokens) == (499, 4, 0)
    assert generation.aborted
