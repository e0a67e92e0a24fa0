"""A streamed answer: OpenAI's events, and no finish reason for what did not finish."""

from __future__ import annotations

import json
from typing import Any

import httpx
from ray.exceptions import ActorDiedError

from cluster.errors import Busy
from tests.cluster.edge import Recorded, ask, data_uri, image_part, refusal, text_part, user
from tests.cluster.fake_engine import expected_text, picture


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_brings_every_piece_as_it_is_said_and_usage_if_asked() -> None:
    chunks = events(ask(stream=True, stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    words = expected_text(picture(1)).split(" ")
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:] == [{"content": f"{word} "} for word in words] + [{}]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["visual_tokens"] == 100


def test_a_stream_that_fails_before_its_first_word_has_the_status_of_its_error() -> None:
    assert refusal(ask(Recorded(Busy("full")), stream=True))[0] == 503
    bad = user(text_part("bad"), image_part(data_uri(picture(1))))
    assert refusal(ask(stream=True, messages=[bad]))[0] == 400


def test_a_stream_that_breaks_off_ends_in_an_error_not_in_a_finish_reason() -> None:
    chunks = events(ask(Recorded(breaks=ActorDiedError()), stream=True))
    assert chunks[1]["choices"][0]["delta"]["content"]
    assert chunks[-1]["error"]["code"] == "overloaded"
    assert not any(c["choices"][0]["finish_reason"] for c in chunks[:-1])
