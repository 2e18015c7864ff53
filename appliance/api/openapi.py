"""GET /openapi.json: the document derives from the structs that requests are decoded with, so it cannot drift from them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
from aiohttp import web

from appliance import __version__
from appliance.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from appliance.api.status import json_response

_BODIES: dict[str, tuple[type[msgspec.Struct], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/completions": (CompletionRequest, "Continue a text"),
    "/tokenize": (TokenizeRequest, "Token ids of a text or conversation"),
    "/detokenize": (DetokenizeRequest, "Text of token ids"),
}
_READS = {
    "/v1/models": "The models served",
    "/v1/models/{model}": "One model",
    "/health": "Whether the node is alive",
    "/ready": "Whether a request would be served now",
    "/version": "The program's version",
    "/metrics": "Prometheus exposition",
    "/openapi.json": "This document",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


async def openapi(request: web.Request) -> web.Response:
    """The OpenAPI 3.1 document."""
    return json_response(document())


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """Built once."""
    types = [struct for struct, _ in _BODIES.values()]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for (path, (_, summary)), schema in zip(_BODIES.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses()}}
    for path, summary in _READS.items():
        operation: dict[str, Any] = {"summary": summary, "responses": _responses()}
        if path in ("/health", "/ready"):
            operation["security"] = []
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Inference appliance", "version": __version__},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _responses() -> dict[str, Any]:
    error = {"description": "Error", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {"200": {"description": "Success"}, "default": error}
