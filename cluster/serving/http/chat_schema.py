"""The body of a chat completion as clients send it, and what of it is refused.

A field that would change the answer and is not supported is refused, never ignored. What asks for
nothing is accepted: labels (user, metadata, …), neutral values, and any field that is null or
empty, of which clients send many. Every text, list and number is bounded here, before any work.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST_MESSAGES: Final = 1024
_MOST_PARTS: Final = 256
_MOST_CHOICES: Final = 1000

# A text this long is more than any context holds: the engine bounds it by its own.
LongText: TypeAlias = Annotated[str, Field(max_length=2**22)]
ShortText: TypeAlias = Annotated[str, Field(max_length=1000)]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
ImageText: TypeAlias = Annotated[str, Field(max_length=2**27)]
Labels: TypeAlias = Annotated[dict[ShortText, Any], Field(max_length=1000)]
Tokens: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
# What a method takes for each of its options it says itself.
Option: TypeAlias = (
    bool
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    | Annotated[float, Field(ge=-1e12, le=1e12)]
    | ShortText
)
Detail: TypeAlias = Literal["auto", "low", "high", "original"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: v for name, v in value.items() if name in known or v not in (None, [], {})}


class TextPart(_Strict):
    """A text; `cache_control` is a hint to caches and has no effect."""

    type: Literal["text", "input_text", "output_text"]
    text: LongText
    cache_control: Labels | None = None
    annotations: Annotated[list[Any], Field(max_length=1000)] | None = None


class RefusalPart(_Strict):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: LongText


class ImageUrl(_Strict):
    """`detail` sets the budget where `prune` does not: high and original are dense, low is
    `RequestRules.low_detail`."""

    url: ImageText
    detail: Detail | None = None


class ImagePart(_Strict):
    """An image; the short form has its URL as a text."""

    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | ImageText
    detail: Detail | None = None
    cache_control: Labels | None = None

    @property
    def url(self) -> str:
        """Where the image is, or the image itself as a data URI."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url

    @property
    def asked_detail(self) -> Detail:
        """auto where none is asked for."""
        inner = None if isinstance(self.image_url, str) else self.image_url.detail
        return inner or self.detail or "auto"


Part: TypeAlias = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]
Parts: TypeAlias = Annotated[list[Part], Field(max_length=_MOST_PARTS, fail_fast=True)]


class CalledFunction(_Strict):
    name: ShortText
    arguments: LongText = ""


class ToolCall(_Strict):
    """A call that an assistant made earlier: part of the history, as text."""

    function: CalledFunction
    id: ShortText | None = None
    type: Literal["function"] = "function"
    index: Annotated[int, Field(ge=0, le=10_000)] | None = None


class Message(_Strict):
    """One message; null content is none. `name`, `tool_call_id` and an assistant's reasoning have
    no effect."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: LongText | Parts | None = None
    name: ShortText | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_PARTS, fail_fast=True)] | None = (
        None
    )
    function_call: CalledFunction | None = None
    tool_call_id: ShortText | None = None
    refusal: LongText | None = None
    reasoning_content: LongText | None = None


class PruneOptions(_Strict):
    """`extra_body={"prune": {"method": "sppruner", "retain": 0.222}}`; tokens instead of retain
    keeps that many tokens of each image. report: the response says which tokens were kept."""

    method: ShortText
    report: bool = False
    retain: Annotated[float, Field(gt=0, le=1)] | None = None
    tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    positions: Literal["keep", "renumber"] = "keep"
    options: Annotated[dict[ShortText, Option], Field(max_length=64)] = {}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class PlainText(_Strict):
    type: Literal["text"]


class JsonObject(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Strict):
    """`strict` has no effect: an answer always follows its schema."""

    name: ShortText = ""
    description: LongText | None = None
    schema_: Annotated[dict[str, Any], Field(max_length=10_000)] = Field(alias="schema")
    strict: bool | None = None


class JsonSchema(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[
    PlainText | JsonObject | JsonSchema, Field(discriminator="type")
]


class StructuredOutputs(_Strict):
    """vLLM's field for formats that OpenAI's `response_format` does not have."""

    json_: Annotated[dict[str, Any], Field(max_length=10_000)] | LongText | None = Field(
        None, alias="json"
    )
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: Annotated[list[StopText], Field(max_length=_MOST_CHOICES, fail_fast=True)] | None = None


class ChatRequest(_Strict):
    """temperature defaults to 0 (greedy), as in batch runs; OpenAI's default is 1."""

    model: ShortText
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)
    ]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[StopText], Field(max_length=4)] | StopText | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prune: PruneOptions | None = None
    # Accepted at their neutral values alone.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Literal[0] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    # Without effect: labels of the request, and how tools that there are none of may be called.
    parallel_tool_calls: bool | None = None
    user: ShortText | None = None
    metadata: Labels | None = None
    store: bool | None = None
    service_tier: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None

    @property
    def wants_report(self) -> bool:
        """Whether the response says which visual tokens were kept."""
        return self.prune is not None and self.prune.report

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a usage event."""
        return bool(self.stream_options and self.stream_options.include_usage)
