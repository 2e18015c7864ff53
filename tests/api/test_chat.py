"""POST /v1/chat/completions, whole and streamed."""

import asyncio

import pytest

CHAT = "/v1/chat/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_a_reply_has_the_specifications_shape(server):
    """A whole reply carries id, choice, usage with cached tokens, and the model's name."""
    status, body, _ = await server.post(CHAT, ASK)
    assert status == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    prompt = len(b"<user>hi<assistant>")
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 7,
        "total_tokens": prompt + 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_stream_is_role_text_finish_usage_done(server):
    """Chunks come in the specification's order; usage is null until the usage chunk, which has no choices."""
    events = await server.events(CHAT, {**ASK, "stream": True, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "Hello!"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 7


async def test_without_include_usage_no_chunk_has_usage(server):
    """A client that did not ask for usage sees none."""
    events = await server.events(CHAT, {**ASK, "stream": True})
    assert all("usage" not in event for event in events[:-1])


async def test_tokens_that_are_ready_together_are_one_chunk(server):
    """A delta of many tokens becomes one chunk of text, not many."""
    server.engine.script = server.say("abcdefgh", group=4)
    events = await server.events(CHAT, {**ASK, "stream": True})
    texts = [event["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert [text for text in texts if text] == ["abcd", "efgh"]


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_are_kept_apart(server, stream):
    """n choices have n indices, each with its own text and end, and derived seeds that differ."""
    texts = ["first", "second one", "third"]

    def script(generation):
        server.say(texts[generation.sequence_id])(generation)

    server.engine.script = script
    request = {**ASK, "n": 3, "seed": 5, "temperature": 0, "stream": stream}
    if stream:
        events = await server.events(CHAT, request)
        got = ["", "", ""]
        for event in events[:-1]:
            choice = event["choices"][0]
            got[choice["index"]] += choice["delta"].get("content", "")
        assert sum(event["choices"][0]["finish_reason"] == "stop" for event in events[:-1]) == 3
    else:
        _, body, _ = await server.post(CHAT, request)
        got = [choice["message"]["content"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["prompt_tokens"] == len(b"<user>hi<assistant>")
    assert got == texts
    seeds = [generation.request.sampling.seed for generation in server.engine.generations]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


async def test_seeds_repeat_when_given_and_differ_when_not(server):
    """The same seed gives the same seeds to every choice; without one each request gets its own 64 bits."""
    for request in ({**ASK, "n": 2, "seed": -7}, {**ASK, "n": 2, "seed": -7}, ASK, ASK):
        await server.post(CHAT, request)
    seeds = [generation.request.sampling.seed for generation in server.engine.generations]
    assert seeds[0:2] == seeds[2:4]
    assert seeds[0] == -7
    assert seeds[4] != seeds[5]
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)


async def test_every_sampling_field_reaches_the_engine(server):
    """What the client asks for is what the engine is told, the model's end ids included."""
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "logit_bias": {"65": -100, "66": 2.5},
        "seed": 3,
        "min_tokens": 2,
        "stop_token_ids": [99],
        "max_completion_tokens": 11,
        "logprobs": True,
        "top_logprobs": 2,
        "priority": -3,
        "cache_salt": "s",
        "unheard_of": {"x": 1},
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
    }
    status, _, _ = await server.post(CHAT, {**ASK, **fields})
    assert status == 200
    request = server.engine.generations[0].request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.05)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.3, -0.4)
    assert sampling.logit_bias == {65: -100.0, 66: 2.5}
    assert (sampling.seed, sampling.min_tokens, sampling.max_tokens, sampling.num_logprobs) == (3, 2, 11, 2)
    assert sampling.stop_token_ids == (0, 99)
    assert (request.priority, request.cache_salt) == (-3, "s")


async def test_values_that_would_overflow_logits_mean_their_nearest_sense(server):
    """A temperature of next to nothing is greedy, a penalty of next to nothing the smallest that logits stand."""
    assert (await server.post(CHAT, {**ASK, "temperature": 1e-38, "repetition_penalty": 1e-38}))[0] == 200
    sampling = server.engine.generations[0].request.sampling
    assert (sampling.temperature, sampling.repetition_penalty) == (0.0, 0.01)


async def test_defaults_fill_the_context_and_ignore_eos_drops_the_models_ends(server):
    """Without max_tokens the reply may fill the context; with ignore_eos no id of the model ends it."""
    await server.post(CHAT, {**ASK, "ignore_eos": True})
    sampling = server.engine.generations[0].request.sampling
    assert sampling.max_tokens == 1000 - len(b"<user>hi<assistant>")
    assert sampling.stop_token_ids == ()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.num_logprobs) == (1.0, 1.0, 0, None)


async def test_max_tokens_beyond_the_context_is_cut_to_what_fits(server):
    """Asking for more than fits is no error: the reply ends with length at the context's end."""
    await server.post(CHAT, {**ASK, "max_tokens": 100_000})
    assert server.engine.generations[0].request.sampling.max_tokens == 1000 - len(b"<user>hi<assistant>")


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_one_entry_a_token(server, stream):
    """Chat logprobs list token, logprob, bytes and the top alternatives of every counted token."""
    request = {**ASK, "logprobs": True, "top_logprobs": 2, "max_tokens": 3, "stream": stream}
    if stream:
        events = await server.events(CHAT, request)
        content = [entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    else:
        _, body, _ = await server.post(CHAT, request)
        content = body["choices"][0]["logprobs"]["content"]
        assert body["choices"][0]["finish_reason"] == "length"
    assert [entry["token"] for entry in content] == ["H", "e", "l"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "A", "logprob": -0.5, "bytes": [65]}, {"token": "B", "logprob": -1.5, "bytes": [66]}],
    }


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_found_across_tokens_and_groups(server, stream, group):
    """The text is cut before the stop string wherever its tokens fall, usage counts up to its last token, and the engine is told."""
    server.engine.script = server.say("one END two", group=group)
    request = {**ASK, "stop": ["END", "zzz"], "stream": stream}
    if stream:
        events = await server.events(CHAT, {**request, "stream_options": {"include_usage": True}})
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2])
        finish, usage = events[-3]["choices"][0], events[-2]["usage"]
    else:
        _, body, _ = await server.post(CHAT, request)
        (finish,) = body["choices"]
        text, usage = finish["message"]["content"], body["usage"]
    assert text == "one "
    assert finish["finish_reason"] == "stop"
    assert finish["stop_reason"] == "END"
    assert usage["completion_tokens"] == len("one END")
    assert server.engine.generations[0].finished_at == len("one END")


async def test_include_stop_str_keeps_the_stop_string(server):
    """With include_stop_str_in_output the text ends with the stop string."""
    server.engine.script = server.say("one END two")
    _, body, _ = await server.post(CHAT, {**ASK, "stop": "END", "include_stop_str_in_output": True})
    assert body["choices"][0]["message"]["content"] == "one END"


async def test_a_stop_token_is_counted_but_not_shown(server):
    """The id that ended the text belongs to the usage, not to the text; a client's own id is named as the reason."""
    server.engine.script = lambda generation: generation.put([*b"abX"], finish="stop")
    _, body, _ = await server.post(CHAT, {**ASK, "stop_token_ids": [ord("X")]})
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "ab"
    assert choice["stop_reason"] == ord("X")
    assert body["usage"]["completion_tokens"] == 3


async def test_a_character_in_pieces_is_streamed_whole(server):
    """No chunk holds half a character."""
    server.engine.script = server.say("a🎉é")
    events = await server.events(CHAT, {**ASK, "stream": True})
    texts = [event["choices"][0]["delta"].get("content") for event in events[:-1]]
    assert [text for text in texts if text] == ["a", "🎉", "é"]


async def test_ids_beyond_the_vocabulary_stream_something(server):
    """A model that samples an id without a token does not break its stream."""
    server.engine.script = lambda generation: generation.put([65, 299], finish="length")
    _, body, _ = await server.post(CHAT, ASK)
    assert body["choices"][0]["message"]["content"] == "A<token_299>"


async def test_content_parts_are_joined(server):
    """Text parts become one string; the developer role reads as system where the template does not know it."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await server.post(CHAT, {"messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]})
    assert bytes(server.engine.generations[0].request.prompt_ids) == b"<system>d<user>a\nb<assistant>"


async def test_the_final_message_can_be_continued(server):
    """continue_final_message ends the prompt with the last message's own text."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is"}]
    await server.post(CHAT, {"messages": messages, "continue_final_message": True})
    assert bytes(server.engine.generations[0].request.prompt_ids) == b"<user>q<assistant>It is"


async def test_a_long_prompt_is_tokenized_off_the_loop(server, monkeypatch):
    """While a long prompt is templated, the event loop serves others."""
    import threading

    threads = []
    encode = server.services.text.tokenizer.encode

    def spy(text, *, add_special_tokens):
        threads.append(threading.current_thread())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(server.services.text.tokenizer, "encode", spy)
    status, body, _ = await server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 50_000}]})
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    await server.post(CHAT, ASK)
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()


async def test_a_quiet_stream_is_kept_open_by_pings(start_server):
    """A stream that waits in the queue gets comment lines, which clients ignore."""
    server = await start_server(ping_seconds=0.02)
    server.engine.script = None
    async with server.session.post(server.url + CHAT, json={**ASK, "stream": True}) as response:
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        server.engine.generations[0].put([*b"ok"], finish="length")
        rest = (await response.read()).decode()
    assert '"content":"ok"' in rest
    assert rest.endswith("data: [DONE]\n\n")


async def test_an_engine_error_before_the_first_token_keeps_its_status(server):
    """A stream that fails while nothing was sent answers with the error's own status."""
    from appliance.errors import ContextLengthExceeded

    server.engine.script = lambda generation: generation.put(error=ContextLengthExceeded("too long for the pool"))
    status, body, _ = await server.post(CHAT, {**ASK, "stream": True})
    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("n", [1, 2])
async def test_an_engine_error_in_mid_stream_is_an_event(server, n):
    """After the first byte an error is an event, the stream ends there without [DONE], and other choices are aborted."""
    from appliance.errors import EngineFailed

    server.engine.script = None

    async def feed():
        generation = await server.generation(n - 1)
        generation.put([65])
        await asyncio.sleep(0.02)
        generation.put(error=EngineFailed("it crashed twice"))

    feeding = asyncio.create_task(feed())
    events = await server.events(CHAT, {**ASK, "stream": True, "n": n})
    await feeding
    assert events[-1] == {"error": {"message": "it crashed twice", "type": "server_error", "param": None, "code": "engine_failed"}}
    assert events[1]["choices"][0]["delta"]["content"] == "A"
    record = await server.record()
    assert (record.status, record.error_code, record.finish_reason) == (500, "engine_failed", "error")
    assert all(generation.aborted or generation.ended for generation in server.engine.generations)


async def test_an_unexpected_error_is_a_500_without_a_traceback(server, caplog):
    """A fault of our own is logged and answered in the error shape, in the stream too."""
    server.engine.script = lambda generation: generation.put(error=ValueError("secret detail"))
    status, body, _ = await server.post(CHAT, ASK)
    assert status == 500
    assert "secret detail" not in body["error"]["message"]
    assert "secret detail" in caplog.text


async def test_a_passed_deadline_is_a_504(server):
    """The engine's deadline becomes the specification's error."""
    server.engine.script = lambda generation: generation.put(finish="deadline")
    status, body, _ = await server.post(CHAT, ASK)
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


async def test_token_ids_are_returned_on_request(server):
    """return_token_ids gives every id, streamed and whole."""
    _, body, _ = await server.post(CHAT, {**ASK, "return_token_ids": True})
    assert body["choices"][0]["token_ids"] == [*b"Hello!", 0]
    events = await server.events(CHAT, {**ASK, "return_token_ids": True, "stream": True})
    assert [token for event in events[:-1] for token in event["choices"][0].get("token_ids", [])] == [*b"Hello!", 0]
