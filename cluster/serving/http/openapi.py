"""The endpoint's OpenAPI document: FastAPI's, with the bodies that are read by hand."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.serving.http.chat_schema import ChatRequest

_REFERENCE: Final = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ChatCompletion(BaseModel):
    """An answer; OpenAI's documentation has its parts."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, int]


def describe(app: FastAPI, *, keys: bool) -> None:
    """Replaces what FastAPI would derive from functions that read their bodies themselves. keys:
    whether an API key is needed."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version="1", routes=app.routes)
    _, schemas = models_json_schema(
        [(ChatRequest, "validation"), (ErrorBody, "validation"), (ChatCompletion, "validation")],
        ref_template=_REFERENCE,
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    error = {"description": "refused, or failed", "content": _json("ErrorBody")}
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = error
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    chat["requestBody"] = {"required": True, "content": _json("ChatRequest")}
    chat["responses"]["200"] = {
        "description": "the answer, or its events",
        "content": _json("ChatCompletion") | {"text/event-stream": {"schema": {"type": "string"}}},
    }
    return document


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=schema)}}}
