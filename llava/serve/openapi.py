"""The OpenAPI document of the server, written from the models that check requests and make responses.

It declares every status that a route may answer with, so that a program can hold the server to it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llava.serve.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Health,
    Model,
    ModelList,
    Problem,
)

DONE = "[DONE]"
"""The last event of a stream, unless an error is."""

PLACE = "#/components/schemas/"
REASONS = {
    400: "the request cannot be answered, and why",
    401: "the API key is missing or wrong",
    403: "the host or the page that asks is not allowed",
    404: "no such model, or no such path",
    405: "the path has other methods",
    408: "the body took too long to arrive",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests wait",
    500: "the model failed, or the server has an error",
    503: "the server shuts down, or answers nothing more",
    504: "the answer took too long",
}


def document(version: str, has_key: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        version: of this package.
        has_key: clients have to give a key.
    """
    used: tuple[type[BaseModel], ...] = (
        ChatCompletionRequest,
        ChatCompletion,
        ChatCompletionChunk,
        Model,
        ModelList,
        Health,
        Problem,
    )
    # As validated: what has a default may be absent from a request, and a client need not rely on it in a response.
    _, schemas = models_json_schema([(model, "validation") for model in used], ref_template=PLACE + "{model}")
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llava-extensions", "version": version},
        "paths": {
            "/v1/chat/completions": {"post": _completions()},
            "/v1/models": {"get": _operation("List models", _json(ModelList), 400, 401, 403, 408)},
            "/v1/models/{model}": {"get": _model()},
            "/health": {"get": _health()},
        },
        "components": {"schemas": schemas["$defs"]},
    }
    if has_key:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
    return result


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": PLACE + model.__name__}}}


def _operation(summary: str, content: dict[str, Any], *errors: int) -> dict[str, Any]:
    """An operation that answers with 200 and `content`, or with an error."""
    refusals = {str(status): {"description": REASONS[status], "content": _json(Problem)} for status in errors}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}} | refusals}


def _completions() -> dict[str, Any]:
    # `itemSchema` is a word of OpenAPI 3.2, which readers of 3.1 pass over; FastAPI writes it too.
    chunk = {"anyOf": [{"$ref": PLACE + model.__name__} for model in (ChatCompletionChunk, Problem)]}
    data = {"anyOf": [{"const": DONE}, {"contentMediaType": "application/json", "contentSchema": chunk}]}
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"} | data}}
    stream = {"text/event-stream": {"itemSchema": event}}
    operation = _operation(
        "Answer a conversation", _json(ChatCompletion) | stream, 400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504
    )
    return operation | {"requestBody": {"required": True, "content": _json(ChatCompletionRequest)}}


def _model() -> dict[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return _operation("Describe a model", _json(Model), 400, 401, 403, 404, 408) | {"parameters": [name]}


def _health() -> dict[str, Any]:
    operation = _operation("Say how busy the server is", _json(Health), 400, 403, 408)
    operation["responses"]["503"] = {"description": REASONS[503], "content": _json(Health)}
    return operation | {"security": []}
