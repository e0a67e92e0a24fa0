"""The OpenAI chat-completions schema of this endpoint, and what it refuses.

A field that would change the answer and is not supported is refused, never ignored; fields that
only label the request (user, metadata, …) are accepted and have no effect.
"""

from __future__ import annotations

import base64
import secrets
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.config import MediaLimits
from cluster.errors import ApiError
from sppruner.engine.interface import Result, SamplingParams
from sppruner.errors import SpecError
from sppruner.spec import Budget, OptionValue, PruneSpec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """`detail` is accepted and has no effect: `prune` sets the budget."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        """The text parts, one per line; a string equals a list of one part."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        """The image URLs in order."""
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class PruneOptions(_Strict):
    """`extra_body={"prune": {"method": "sppruner", "retain": 0.222}}`; tokens instead of retain
    keeps that many tokens of each image."""

    method: str
    retain: float | None = None
    tokens: int | None = None
    positions: Literal["keep", "renumber"] = "keep"
    options: dict[str, OptionValue] = {}

    def spec(self) -> PruneSpec:
        """Raises SpecError."""
        if self.retain is None and self.tokens is None:
            return PruneSpec(method=self.method, positions=self.positions, options=self.options)
        return PruneSpec(
            method=self.method,
            budget=Budget(ratio=self.retain, tokens=self.tokens),
            positions=self.positions,
            options=self.options,
        )


NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


class StreamOptions(_Strict):
    include_usage: bool = False


class PlainText(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """temperature defaults to 0 (greedy), as in batch runs; OpenAI's default is 1."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[NonEmpty], Field(max_length=4)] | NonEmpty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prune: PruneOptions | None = None
    # Accepted at their neutral values alone.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    # Labels of the request, without effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Raises ApiError, naming the field."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param = ".".join(str(step) for step in first["loc"])
            if first["type"] == "extra_forbidden":
                raise ApiError(f"{param} is not supported by this endpoint", param=param) from None
            raise ApiError(f"{param or 'body'}: {first['msg']}", param=param or None) from None

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a usage event."""
        return self.stream_options is not None and self.stream_options.include_usage

    def generation(self, *, default_tokens: int, most_tokens: int) -> SamplingParams:
        """How the answer is sampled. Raises ApiError for more than `most_tokens` tokens, and for
        what `SamplingParams` refuses."""
        tokens = self.max_completion_tokens or self.max_tokens or default_tokens
        if tokens > most_tokens:
            raise ApiError(
                f"max_tokens {tokens}: this endpoint generates at most {most_tokens}",
                param="max_tokens",
            )
        temperature = self.temperature or 0.0
        # A seed matters only for sampling; greedy requests share one so that they share batches.
        seed = 0 if temperature == 0 else self.seed
        try:
            return SamplingParams(
                max_new_tokens=tokens,
                temperature=temperature,
                top_p=1.0 if self.top_p is None or temperature == 0 else self.top_p,
                seed=secrets.randbelow(2**31) if seed is None else seed,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            )
        except SpecError as error:
            raise ApiError(str(error)) from error

    def spec(self, default: PruneSpec) -> PruneSpec:
        """The request's spec, else `default`. Raises ApiError for an invalid one."""
        try:
            return default if self.prune is None else self.prune.spec()
        except SpecError as error:
            raise ApiError(f"prune: {error}", param="prune") from error

    def conversation(self) -> tuple[str | None, Message]:
        """(system prompt, the one user message). Raises ApiError for more turns than one."""
        users = [message for message in self.messages if message.role == "user"]
        system = [message for message in self.messages if message.role != "user"]
        if len(users) != 1:
            raise ApiError(
                f"{len(users)} user messages: this endpoint answers exactly one", param="messages"
            )
        if any(message.urls for message in system):
            raise ApiError("images belong in the user message", param="messages")
        return "\n".join(message.text for message in system) or None, users[0]


def image_bytes(url: str, limits: MediaLimits) -> bytes:
    """The bytes of a base64 data URI. Nothing is ever fetched. Raises ApiError; the size is
    checked on the text, before it is decoded."""
    head, comma, payload = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise ApiError(
            "image_url must be a data URI (data:image/png;base64,…): this endpoint fetches nothing",
            code="image_url_not_supported",
            param="messages",
        )
    if not head.endswith(";base64"):
        raise ApiError("image data URIs must be base64", code="invalid_image", param="messages")
    if len(payload) * 3 // 4 > limits.max_bytes + 2:
        raise ApiError(
            f"an image of more than {limits.max_bytes:,} bytes",
            status=413,
            code="image_too_large",
            param="messages",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # of characters outside ASCII; binascii.Error is one too
        raise ApiError(f"base64: {error}", code="invalid_image", param="messages") from error


def usage(result: Result) -> dict[str, int]:
    """OpenAI's usage, with visual tokens before and after pruning."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
        "visual_tokens": result.visual_tokens,
        "visual_tokens_kept": result.visual_tokens_kept,
    }
