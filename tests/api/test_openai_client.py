"""The official client talks to the server and changes nothing but its base_url."""

import openai
import pytest

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(server):
    """AsyncOpenAI without retries, closed behind the test."""
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    yield client
    await client.close()


async def test_it_chats(client):
    """A chat completion parses, with usage."""
    reply = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert reply.choices[0].message.content == "Hello!"
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].token == "A"
    assert reply.usage.completion_tokens == 7
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


async def test_it_streams(client):
    """A stream parses chunk by chunk, with usage at the end."""
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello!"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 7


async def test_its_stream_helper_accumulates(client):
    """The client's own accumulator understands the chunks."""
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES, n=2) as stream:
        completion = await stream.get_final_completion()
    assert [choice.message.content for choice in completion.choices] == ["Hello!", "Hello!"]


async def test_it_completes(client):
    """Text completions work whole and streamed."""
    reply = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in reply.choices] == ["Hello!", "Hello!"]
    assert reply.choices[0].logprobs.tokens[0] == "H"
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello!"


async def test_it_lists_and_retrieves_models(client):
    """Both model routes parse."""
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_it_raises_its_own_errors(client, server):
    """Status and shape map to the client's exceptions, in mid-stream too."""
    from appliance.errors import EngineFailed

    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"

    def script(generation):
        generation.put([65])
        generation.put(error=EngineFailed("gone"))

    server.engine.script = script
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        [chunk async for chunk in stream]


async def test_it_sends_its_key(start_server):
    """A wrong key is the client's AuthenticationError, the right one works."""
    server = await start_server(keys={"me": "sk-1"})
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="sk-2", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError):
            await wrong.models.list()
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="sk-1", max_retries=0) as right:
        assert len((await right.models.list()).data) == 1
