"""Each library asks as its users do, and finds what it expects: texts, streams, usage, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest


def messages(image_uri: str) -> list[dict[str, Any]]:
    """A history of several turns about one image."""
    return [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look at this"},
                {"type": "image_url", "image_url": {"url": image_uri}},
                {"type": "text", "text": "what color is it ?"},
            ],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "describe the scene ."},
    ]


def test_openai_sync_stream_and_pruning(endpoint: str, image_uri: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "served", "messages": messages(image_uri)}
        whole = client.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        assert text
        assert whole.usage is not None
        assert whole.usage.model_extra == {"visual_tokens": 144, "visual_tokens_kept": 72}
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said.strip() == text
        assert chunks[-1].usage is not None
        dense = client.chat.completions.create(**asked, extra_body={"prune": {"method": "none"}})
        assert dense.usage is not None
        assert dense.usage.model_extra == {"visual_tokens": 144, "visual_tokens_kept": 144}
        several = client.chat.completions.create(**asked, n=3, temperature=1.0, seed=5)
        assert [choice.index for choice in several.choices] == [0, 1, 2]
        told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert told.choices[0].logprobs is not None
        tokens = told.choices[0].logprobs.content or []
        assert tokens
        assert all(len(token.top_logprobs) == 2 for token in tokens)
        assert client.models.retrieve("served").id == "served"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(**asked, tools=[tool])


def test_openai_async_requests_side_by_side(endpoint: str, image_uri: str) -> None:
    import openai

    async def scenario() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key="none") as client:
            asked: Any = {"model": "served", "messages": messages(image_uri)}
            answers = await asyncio.gather(
                *(client.chat.completions.create(**asked) for _ in range(8))
            )
            return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(scenario()))) == 1


def test_langchain_invokes_streams_and_carries_a_history(endpoint: str, image_uri: str) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="served", base_url=f"{endpoint}/v1", api_key="none", max_retries=0)  # type: ignore[arg-type]
    history = [
        SystemMessage("be brief"),
        HumanMessage(
            [
                {"type": "text", "text": "what color is it ?"},
                {"type": "image_url", "image_url": {"url": image_uri}},
            ]
        ),
        AIMessage("", tool_calls=[{"name": "look", "args": {"at": "it"}, "id": "1"}]),
        ToolMessage("it is red", tool_call_id="1"),
        AIMessage("red"),
        HumanMessage("describe the scene ."),
    ]
    answer = model.invoke(history)
    assert answer.content
    assert answer.usage_metadata is not None
    streamed = "".join(str(chunk.content) for chunk in model.stream(history))
    assert streamed.strip() == answer.content


def test_litellm_completes_and_streams(endpoint: str, image_uri: str) -> None:
    import litellm

    asked: Any = {
        "model": "openai/served",
        "api_base": f"{endpoint}/v1",
        "api_key": "none",
        "messages": messages(image_uri),
        "max_retries": 0,
    }
    whole: Any = litellm.completion(**asked)
    streamed: Any = litellm.completion(**asked, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert said.strip() == whole.choices[0].message.content
    history = [*asked["messages"], whole.choices[0].message.model_dump(), asked["messages"][-1]]
    again: Any = litellm.completion(**{**asked, "messages": history})
    assert again.choices[0].message.content


def test_instructor_gets_the_object_that_it_asks_for(byte_endpoint: str, image_uri: str) -> None:
    import instructor
    import openai
    from pydantic import BaseModel, Field

    class Seen(BaseModel):
        count: int = Field(ge=0, le=99)
        colors: list[str] = Field(max_length=2)

    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{byte_endpoint}/v1", api_key="none", max_retries=0),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    found = client.chat.completions.create(
        model="served",
        response_model=Seen,
        max_retries=0,
        max_tokens=400,
        temperature=1.0,
        seed=3,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image_uri}},
                    {"type": "text", "text": "what is it"},
                ],
            }
        ],
    )
    assert isinstance(found, Seen)


@pytest.mark.parametrize("stream", [False, True])
def test_json_regex_and_choice_by_plain_http(byte_endpoint: str, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "served",
        "messages": [{"role": "user", "content": "say"}],
        "max_tokens": 300,
        "stream": stream,
        "temperature": 1.0,
        "seed": 1,
    }
    formats: list[tuple[dict[str, Any], Any]] = [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda said: said in ("yes", "no")),
        ({"structured_outputs": {"regex": "[a-f]{3}"}}, lambda said: len(said) == 3),
        (
            {"structured_outputs": {"json": {"type": "boolean"}}},
            lambda said: said in ("true", "false"),
        ),
    ]
    for form, right in formats:
        response = httpx.post(f"{byte_endpoint}/v1/chat/completions", json=asked | form, timeout=60)
        assert response.status_code == 200, response.text
        if stream:
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            said = "".join(delta.get("content", "") for delta in deltas)
        else:
            said = response.json()["choices"][0]["message"]["content"]
        assert right(said), said
    refused = httpx.post(
        f"{byte_endpoint}/v1/chat/completions",
        json=asked | {"stream": False, "structured_outputs": {"regex": "("}},
        timeout=60,
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"
