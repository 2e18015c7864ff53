"""Models, tokenization, status, metrics and the OpenAPI document."""

import asyncio
import json

import pytest


async def test_models_are_listed_and_found_by_name(server):
    """The served model appears in the list and by its id; another does not."""
    _, body, _ = await server.get("/v1/models")
    assert [card["id"] for card in body["data"]] == ["tiny"]
    status, card, _ = await server.get("/v1/models/tiny")
    assert (status, card["object"], card["max_model_len"]) == (200, "model", 1000)
    status, body, _ = await server.get("/v1/models/org/other")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize(
    "body",
    [{"prompt": "héy"}, {"content": "héy"}, {"inputs": "héy"}, {"prompt": "héy", "model": "tiny"}],
)
async def test_tokenize_takes_every_peers_shape(server, prefix, body):
    """vLLM's prompt, llama.cpp's content and TGI's inputs all give tokens and their count."""
    status, reply, _ = await server.post(f"{prefix}/tokenize", body)
    assert status == 200
    assert reply == {"tokens": [*"héy".encode()], "count": 4, "max_model_len": 1000}


async def test_tokenize_renders_conversations(server):
    """Messages go through the chat template."""
    _, reply, _ = await server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False})
    assert bytes(reply["tokens"]) == b"<user>x"


async def test_tokenize_spells_tokens_on_request(server):
    """return_token_strs gives the vocabulary's spelling, with_pieces llama.cpp's objects with bytes for broken characters."""
    _, reply, _ = await server.post("/tokenize", {"prompt": "a", "return_token_strs": True})
    assert reply["token_strs"] == ["<0x61>"]
    _, reply, _ = await server.post("/tokenize", {"content": "aé", "with_pieces": True})
    assert reply["tokens"] == [{"id": 97, "piece": "a"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "content": "b"}, {"prompt": 5}])
async def test_tokenize_wants_exactly_one_text(server, body):
    """None, two, or something else than text is a 400."""
    assert (await server.post("/tokenize", body))[0] == 400


async def test_detokenize_answers_under_every_peers_name(server):
    """Ids become text as prompt (vLLM), content (llama.cpp) and text (SGLang); unknown ids read as something."""
    _, reply, _ = await server.post("/detokenize", {"tokens": [*"hé".encode(), 299]})
    assert reply == dict.fromkeys(("prompt", "content", "text"), "hé<token_299>")
    status, body, _ = await server.post("/detokenize", {"tokens": [-1]})
    assert (status, body["error"]["param"]) == (400, "tokens[0]")


async def test_round_trip_of_long_texts(server):
    """What is tokenized off the loop is detokenized to the same text."""
    text = "wörld " * 2000
    _, tokens, _ = await server.post("/tokenize", {"prompt": text})
    _, reply, _ = await server.post("/detokenize", {"tokens": tokens["tokens"]})
    assert reply["prompt"] == text


async def test_metrics_come_from_the_callable(server):
    """/metrics is what the exporter gave, with its content type."""
    async with server.session.get(server.url + "/metrics") as response:
        assert await response.text() == "appliance_up 1\n"
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_metrics_that_are_off_are_not_found(start_server):
    """With metrics.enabled off there is nothing to scrape, and the error says why."""
    server = await start_server(metrics={"enabled": False})
    status, body, _ = await server.get("/metrics")
    assert status == 404
    assert "metrics.enabled" in body["error"]["message"]


async def test_a_record_carries_the_bills_of_its_choices(server):
    """Joules and engine time are summed over the choices; a choice whose energy is not known adds none, and with none known there is no figure."""
    server.engine.script = None

    async def ask(joules: tuple[float | None, float | None]):
        first, number = len(server.engine.generations), len(server.records) + 1
        reply = asyncio.create_task(server.post("/v1/completions", {"prompt": "hi", "n": 2, "max_tokens": 3}))
        for index, amount in enumerate(joules):
            generation = await server.generation(first + index)
            generation.bill.seconds, generation.bill.joules = 0.25 * (index + 1), amount
            generation.put([104] * (index + 1), finish="stop")
        assert (await reply)[0] == 200
        record = await server.record(number)
        return record.joules, server.observer.uses[-1]

    joules, use = await ask((2.0, 3.5))
    assert (joules, use.engine_seconds, use.num_longest_tokens) == (5.5, 0.75, 2)
    assert (await ask((None, 3.5)))[0] == 3.5
    assert (await ask((None, None)))[0] is None


async def test_version_is_the_packages(server):
    """/version tells the program's version."""
    from appliance import __version__

    assert (await server.get("/version"))[1] == {"version": __version__}


async def test_the_openapi_document_covers_every_route(server):
    """Every route appears in the document, every reference resolves, and ranges are those that are checked."""
    from appliance.api.app import create_app

    _, document, _ = await server.get("/openapi.json")
    resources = {resource.canonical for resource in create_app(server.services).router.resources()}
    assert {path for path in resources if path not in ("/v1/tokenize", "/v1/detokenize")} == set(document["paths"])
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        assert isinstance(name, str)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert {"maximum": 2, "minimum": 0, "type": "number"} in chat["properties"]["temperature"]["anyOf"]


def test_every_chat_parameter_of_the_official_client_is_known():
    """No parameter that the official client can send is missing from the schema."""
    import msgspec
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    from appliance.api.schema import ChatRequest, CompletionRequest

    for struct, params in ((ChatRequest, chat_create_params), (CompletionRequest, completion_create_params)):
        known = {field.name for field in msgspec.structs.fields(struct)}
        asked = set(params.CompletionCreateParamsStreaming.__annotations__) | set(params.CompletionCreateParamsBase.__annotations__)
        assert asked - known == set()
