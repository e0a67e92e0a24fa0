"""The body of a chat completion: what asks for nothing is accepted, and all else is bounded."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ApiError
from cluster.serving.http.chat_request import parse_chat_request
from cluster.serving.http.chat_schema import ChatRequest

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "what ?"}]}


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request(json.dumps({**BODY, **fields}).encode())


def unbounded(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    """Paths of texts, lists, numbers and mappings that a client may make as large as it likes."""
    if "$ref" in schema:
        return  # walked among the definitions
    for name in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(name, ()):
            yield from unbounded(one, definitions, path)
    kind = schema.get("type")
    fixed = "const" in schema or "enum" in schema
    if kind == "string" and not fixed and "maxLength" not in schema:
        yield f"{path}: text"
    if kind in ("integer", "number") and not fixed:
        low = {"minimum", "exclusiveMinimum"} & schema.keys()
        high = {"maximum", "exclusiveMaximum"} & schema.keys()
        if not (low and high):
            yield f"{path}: number"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{path}: list"
        yield from unbounded(schema.get("items", {}), definitions, f"{path}[]")
    if kind == "object":
        if schema.get("additionalProperties", True) is not False and "maxProperties" not in schema:
            yield f"{path}: mapping"
        for name, inner in schema.get("properties", {}).items():
            yield from unbounded(inner, definitions, f"{path}.{name}")


def test_every_text_list_number_and_mapping_of_a_request_is_bounded() -> None:
    schema = ChatRequest.model_json_schema()
    definitions = schema["$defs"]
    found = list(unbounded(schema, definitions, "body"))
    for name, inner in definitions.items():
        found += unbounded(inner, definitions, name)
    assert found == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": None, "functions": [], "function_call": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"logit_bias": {}, "logprobs": False, "top_logprobs": 0},
        {"modalities": ["text"], "audio": None, "prediction": None},
        {"stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"safety_identifier": "a", "prompt_cache_key": "b", "user": "c", "store": False},
        {"metadata": {"a": {"b": [1]}}, "service_tier": "auto"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0},
        {"top_k": -1, "min_p": 0, "n": 1, "stop": None, "seed": None, "unknown_to_us": None},
        {"response_format": {"type": "text"}, "reasoning_effort": None, "max_tokens": None},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert parse(**fields).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"n": 17}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"temperature": 3}, "temperature"),
        ({"stop": ["x" * 1001]}, "stop.0"),
        ({"prune": {"method": "sppruner", "keep": 0.5}}, "prune.keep"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text.text",
        ),
    ],
)
def test_what_is_not_supported_or_out_of_bounds_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "m", "messages": [' + ",".join(["{}"] * 200_000) + "]}",
        '{"model": "m", "messages": [], ' + ",".join(f'"a{i}": 1' for i in range(100_000)) + "}",
        '{"model": "m", "messages": [{"role": "user", "content": ['
        + ",".join(['{"type": "text"}'] * 100_000)
        + "]}]}",
        "[" * 100_000,
    ],
    ids=["messages", "fields", "parts", "depth"],
)
def test_a_hostile_body_is_refused_in_little_time_and_memory(body: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ApiError):
        parse_chat_request(body.encode())
    taken, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 3.0
    assert peak < 200 * 2**20


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists))
def test_no_json_raises_anything_but_an_api_error(value: Any) -> None:
    for body in (value, {**BODY, "stop": value}, {**BODY, "messages": value}):
        with suppress(ApiError):
            parse_chat_request(json.dumps(body).encode())
