"""Streamed responses: OpenAI's events, and no finish reason for an interrupted stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError

from cluster.errors import Busy
from cluster.serving.http.sse import Piece, stream_events
from sppruner.engine.interface import Result
from tests.cluster.edge import (
    RecordingReplica,
    complete,
    data_uri,
    image_part,
    read_error,
    text_part,
    user_message,
)
from tests.cluster.fake_engine import expected_text, picture


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_sends_each_piece_of_text_and_usage_on_request() -> None:
    chunks = events(complete(stream=True, stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    words = expected_text(picture(1)).split(" ")
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:] == [{"content": f"{word} "} for word in words] + [{}]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["visual_tokens"] == 100


def test_a_stream_that_fails_before_its_first_piece_has_the_status_of_its_error() -> None:
    assert read_error(complete(RecordingReplica(Busy("full")), stream=True))[0] == 503
    bad = user_message(text_part("bad"), image_part(data_uri(picture(1))))
    assert read_error(complete(stream=True, messages=[bad]))[0] == 400


def test_several_answers_are_streamed_side_by_side() -> None:
    chunks = events(complete(stream=True, n=2, stream_options={"include_usage": True}))
    said = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
    assert set(said.values()) == {expected_text(picture(1)) + " "}
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks[:-1]) == 2


def test_events_pass_proxies_as_they_are_made() -> None:
    headers = complete(stream=True).headers
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"


def test_a_stream_that_has_nothing_to_say_says_that_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.serving.http.sse._ALIVE_SECONDS", 0.02)

    async def slow() -> AsyncGenerator[Piece]:
        yield 0, "a"
        await asyncio.sleep(0.2)
        yield 0, Result(id="x", text="a", finish_reason="stop")

    async def scenario() -> list[str]:
        return [event async for event in stream_events({"id": "i"}, slow(), with_usage=False)]

    sent = asyncio.run(scenario())
    assert sent.count(": waiting\n\n") >= 3
    assert sent[-1] == "data: [DONE]\n\n"


def test_a_failure_midway_is_an_error_event_that_leaks_nothing() -> None:
    chunks = events(complete(RecordingReplica(stream_failure=TypeError("secret")), stream=True))
    assert chunks[-1]["error"]["code"] == "internal"
    assert "secret" not in json.dumps(chunks)


def test_an_interrupted_stream_ends_with_an_error_and_without_a_finish_reason() -> None:
    chunks = events(complete(RecordingReplica(stream_failure=ActorDiedError()), stream=True))
    assert chunks[1]["choices"][0]["delta"]["content"]
    assert chunks[-1]["error"]["code"] == "overloaded"
    assert not any(c["choices"][0]["finish_reason"] for c in chunks[:-1])
