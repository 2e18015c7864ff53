"""Bad requests get the right 4xx, name the field at fault, and harm nothing."""

import io

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


async def refused(server, path, body, status, param, code=None):
    """`body` is refused in the error shape, nothing reached the engine, one record says so, and the next request works."""
    got, reply, _ = await server.post(path, body)
    assert got == status, reply
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["param"] == param
    assert reply["error"]["code"] == code
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["message"]
    assert server.engine.generations == []
    assert [record.status for record in server.records] == [status]
    assert server.services.drain.num_open == 0
    assert (await server.post(CHAT, ASK))[0] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1_000_000}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"seed": 1 << 64}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template_kwargs": {str(i): 1 for i in range(33)}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
)
async def test_a_bad_field_is_named(server, fields, param):
    """Every wrong type or range answers 400 with the field's own path."""
    await refused(server, CHAT, {**ASK, **fields}, 400, param)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ("", "prompt"),
        ([[]], "prompt"),
        ([1, "a"], "prompt"),
        ([1, [2]], "prompt"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([300], "prompt"),
        ([[5, 1 << 40]], "prompt[0][1]"),
        ({"a": 1}, "prompt"),
        (["x"] * 257, "prompt"),
    ],
)
async def test_a_bad_prompt_is_named(server, prompt, param):
    """Every wrong prompt answers 400 and says which part is wrong."""
    await refused(server, COMPLETIONS, {"prompt": prompt}, 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"messages": NaN}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": Infinity, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b', "messages": []}',
        b"[1, 2]",
        b'"text"',
    ],
    ids=[
        "empty",
        "cut",
        "text",
        "nan",
        "nan-field",
        "infinity",
        "lone-surrogate",
        "encoded-surrogate",
        "no-utf8",
        "deep-list",
        "deep-object",
        "list",
        "string",
    ],
)
async def test_a_body_that_is_no_proper_json_is_a_400(server, body):
    """Malformed, non-UTF-8 or hostile JSON answers 400 and does not touch the process."""
    await refused(server, CHAT, body, 400, None)


async def test_an_overflowing_number_is_a_400(server):
    """1e999 is no temperature."""
    await refused(server, CHAT, b'{"temperature": 1e999, "messages": []}', 400, "temperature")


@pytest.mark.parametrize("body", [b'{"n": 1, "n": 2, "messages": []}', b'{"messages": [{"role": "user", "n": 1, "n": 2}]}'])
async def test_a_name_given_twice_is_a_400(server, body):
    """Proxies that read the first and servers that read the last would disagree: duplicates are refused."""
    await refused(server, CHAT, body, 400, "n")


async def test_a_missing_field_is_named(server):
    """Absent messages and prompts are named."""
    await refused(server, CHAT, {"model": "tiny"}, 400, "messages")


async def test_an_over_long_prompt_says_how_long(server):
    """A prompt beyond the context answers context_length_exceeded with both numbers."""
    await refused(server, COMPLETIONS, {"prompt": "x" * 1000}, 400, "prompt", "context_length_exceeded")


async def test_an_unknown_model_is_a_404(server):
    """A model that is not served answers 404 model_not_found."""
    await refused(server, CHAT, {**ASK, "model": "gpt-9"}, 404, "model", "model_not_found")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_a_413(server, announced):
    """10 MB answer 413, whether the length was announced or came in chunks."""
    body = b'{"x": "' + b"y" * 10_000_000 + b'"}'

    async def chunks():
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    data = io.BytesIO(body) if announced else chunks()
    async with server.session.post(server.url + CHAT, data=data, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"
    assert (await server.record()).status == 413
    assert (await server.post(CHAT, ASK))[0] == 200


async def test_a_body_that_is_not_json_by_type_is_a_415(server):
    """Forms and plain text answer 415."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, body, _ = await server.post(CHAT, b"a=b", **{"Content-Type": content_type})
        assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


async def test_unknown_routes_and_methods_have_the_error_shape(server):
    """404 and 405 are no plain text, and 405 says what is allowed."""
    status, body, _ = await server.get("/nothing")
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "not_found", None)
    status, body, headers = await server.get(CHAT)
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    assert headers["Allow"] == "POST"
    assert server.records == []


async def test_unknown_fields_never_fail(server):
    """Fields of other servers and of the future are ignored."""
    status, _, _ = await server.post(CHAT, {**ASK, "brand_new": [1, {"a": None}], "verbosity": "low", "service_tier": "auto", "prediction": {}})
    assert status == 200


async def test_nulls_read_as_absent(server):
    """Clients that send null for every unset field are served."""
    fields = ["temperature", "top_p", "n", "stop", "max_tokens", "logit_bias", "logprobs", "seed", "stream", "tools", "response_format", "user"]
    status, _, _ = await server.post(CHAT, {**ASK, **dict.fromkeys(fields)})
    assert status == 200


async def test_a_text_response_format_and_disabled_tools_are_served(server):
    """Asking for what is served anyway is no error."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, _, _ = await server.post(CHAT, {**ASK, "response_format": {"type": "text"}, "tools": tools, "tool_choice": "none"})
    assert status == 200


async def test_a_model_without_a_chat_template_refuses_chat(start_server):
    """A base model answers chat with 400 and serves completions."""
    from appliance.text.load import TextModel
    from appliance.text.tokenizer import ByteTokenizer

    server = await start_server(text=TextModel(ByteTokenizer(), None, (0,)))
    status, body, _ = await server.post(CHAT, ASK)
    assert (status, body["error"]["param"]) == (400, "messages")
    assert (await server.post(COMPLETIONS, {"prompt": "x"}))[0] == 200


async def test_a_body_that_belies_its_encoding_is_refused(server):
    """Plain JSON announced as gzip is the client's fault, not the server's."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with server.session.post(server.url + CHAT, data=b'{"messages": []}', headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"
    assert (await server.post(CHAT, ASK))[0] == 200
