"""Streamed responses: OpenAI's events, and no finish reason for an interrupted stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
from ray.exceptions import ActorDiedError

from cluster.errors import Busy
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


def test_an_interrupted_stream_ends_with_an_error_and_without_a_finish_reason() -> None:
    chunks = events(complete(RecordingReplica(stream_failure=ActorDiedError()), stream=True))
    assert chunks[1]["choices"][0]["delta"]["content"]
    assert chunks[-1]["error"]["code"] == "overloaded"
    assert not any(c["choices"][0]["finish_reason"] for c in chunks[:-1])
