"""A parsed chat completion → what a replica is asked."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import ValidationError

from cluster.config import MediaLimits
from cluster.errors import ApiError
from cluster.images import image_size
from cluster.protocol import LabelRequest
from cluster.serving.http.chat_schema import (
    ChatRequest,
    Detail,
    JsonObject,
    JsonSchema,
    StructuredOutputs,
)
from cluster.serving.http.chat_turns import Conversation, read_conversation
from cluster.serving.http.data_uris import read_data_uri
from cluster.serving.http.image_fetch import ImageFetcher
from sppruner.engine.answer_format import AnswerFormat
from sppruner.engine.interface import COLDEST, SamplingParams
from sppruner.errors import SpecError
from sppruner.spec import DENSE, Budget, PruneSpec

_ANY_OBJECT: Final = '{"type":"object"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """What one request may ask for, and what it gets where it asks for nothing."""

    default_spec: PruneSpec = DENSE
    """The pruning of requests that name none."""
    low_detail: PruneSpec = field(
        default_factory=lambda: PruneSpec(method="sppruner", budget=Budget(ratio=0.111))
    )
    """The pruning of requests that name none, and ask for all their images in low detail."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Limits of one image."""
    max_images: int = 8
    """Images of one request."""
    max_pixels: int = 128_000_000
    """Pixels of all images of one request, as their headers have them."""
    max_image_bytes: int = 64 * 2**20
    """Bytes of all images of one request, for each of the answers that it asks for; so of its
    pixels."""
    default_tokens: int = 256
    """Longest answer where the request names no limit; shorter where the model's context is."""
    most_tokens: int = 2048
    """Longest answer that a request may name."""


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises ApiError, naming the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        # A text or a list may be right: of what was wrong with each, the deepest is what was meant.
        worst = max(found, key=lambda one: len(one["loc"]))
        param = ".".join(step for step in map(str, worst["loc"]) if _is_field(step))
        if worst["type"] == "extra_forbidden":
            raise ApiError(f"{param} is not supported by this endpoint", param=param) from None
        raise ApiError(f"{param or 'body'}: {worst['msg']}", param=param or None) from None


async def label_requests(
    chat: ChatRequest, rules: RequestRules, *, id: str, fetcher: ImageFetcher | None = None
) -> list[LabelRequest]:
    """One request for each of the answers that are asked for. id: names them in logs. fetcher: of
    images that are named by URL; None where none is fetched. Raises ApiError for what is beyond the
    rules, and for what no engine could do."""
    asked = read_conversation(chat.messages)
    if len(asked.urls) > rules.max_images:
        raise ApiError(
            f"{len(asked.urls)} images: at most {rules.max_images} a request", param="messages"
        )
    generation, spec = _sampling(chat, rules), _spec(chat, asked, rules)
    images = await _read_all(asked.urls, rules, fetcher)
    _check_size(images, rules, answers=chat.n or 1)
    request = LabelRequest(
        id=id,
        prompt=asked.prompt,
        images=images,
        system=asked.system,
        turns=asked.turns,
        spec=spec,
        generation=generation,
        logprobs=_logprobs(chat),
        fit_context=chat.max_tokens is None and chat.max_completion_tokens is None,
        media=rules.media,
    )
    if chat.n in (None, 1):
        return [request]
    # Of greedy answers each is the same; of sampled ones each has a seed of its own.
    seeds = [(generation.seed + i) % 2**63 for i in range(chat.n)]
    return [
        replace(request, id=f"{id}-{i}", generation=replace(generation, seed=seed))
        for i, seed in enumerate(seeds)
    ]


async def _read_all(
    urls: Sequence[str], rules: RequestRules, fetcher: ImageFetcher | None
) -> tuple[bytes, ...]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_read(url, rules, fetcher)) for url in urls]
    except ExceptionGroup as errors:  # one refused image ends the request, and the other fetches
        raise errors.exceptions[0] from None
    return tuple(task.result() for task in tasks)


async def _read(url: str, rules: RequestRules, fetcher: ImageFetcher | None) -> bytes:
    if fetcher is None or url.lstrip()[:5].lower() == "data:":
        return read_data_uri(url, rules.media)
    return await fetcher.fetch(url)


def _is_field(step: str) -> bool:
    """Whether a step of an error's path is a field or an index, and not a type."""
    return (step.isidentifier() and step != "str") or step.isdecimal()


def _check_size(images: Sequence[bytes], rules: RequestRules, *, answers: int) -> None:
    """Each answer has the images decoded for itself."""
    sizes = [size for size in map(image_size, images) if size is not None]
    pixels = answers * sum(width * height for width, height in sizes)
    size = answers * sum(map(len, images))
    for amount, most, unit in (
        (pixels, rules.max_pixels, "pixels"),
        (size, rules.max_image_bytes, "bytes"),
    ):
        if amount > most:
            raise ApiError(
                f"{amount:,} {unit} in all images, for each answer: at most {most:,} a request",
                status=413,
                code="image_too_large",
                param="messages",
            )


def _spec(chat: ChatRequest, asked: Conversation, rules: RequestRules) -> PruneSpec:
    if chat.prune is None:
        return _spec_of_details(asked.details, rules)
    given = chat.prune
    budget = None
    try:
        if given.retain is not None or given.tokens is not None:
            budget = Budget(ratio=given.retain, tokens=given.tokens)
        return PruneSpec(
            method=given.method,
            positions=given.positions,
            options=given.options,
            **({} if budget is None else {"budget": budget}),
        )
    except SpecError as error:
        raise ApiError(f"prune: {error}", param="prune") from error


def _spec_of_details(details: Sequence[Detail], rules: RequestRules) -> PruneSpec:
    if any(detail in ("high", "original") for detail in details):
        return DENSE
    if details and all(detail == "low" for detail in details):
        return rules.low_detail
    return rules.default_spec


def _sampling(chat: ChatRequest, rules: RequestRules) -> SamplingParams:
    tokens = chat.max_completion_tokens or chat.max_tokens or rules.default_tokens
    if tokens > rules.most_tokens:
        raise ApiError(
            f"max_tokens {tokens}: this endpoint generates at most {rules.most_tokens}",
            param="max_tokens",
        )
    temperature = chat.temperature or 0.0
    if temperature < COLDEST:
        temperature = 0.0
    # A seed matters only for sampling; greedy requests share one so that they share batches.
    seed = 0 if temperature == 0 else chat.seed
    try:
        return SamplingParams(
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=1.0 if chat.top_p is None or temperature == 0 else chat.top_p,
            seed=secrets.randbelow(2**31) if seed is None else seed,
            stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
            format=_format(chat),
        )
    except SpecError as error:
        raise ApiError(str(error)) from error


def _logprobs(chat: ChatRequest) -> int | None:
    if not chat.logprobs:
        if chat.top_logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    if chat.stream:
        raise ApiError("logprobs of a stream are not supported by this endpoint", param="logprobs")
    return chat.top_logprobs or 0


def _format(chat: ChatRequest) -> AnswerFormat | None:
    asked, other = chat.response_format, chat.structured_outputs
    shaped = isinstance(asked, JsonObject | JsonSchema)
    if shaped and other is not None:
        raise ApiError(
            "give response_format or structured_outputs, not both", param="structured_outputs"
        )
    param = "response_format" if shaped else "structured_outputs"
    try:
        if isinstance(asked, JsonObject):
            return AnswerFormat(json_schema=_ANY_OBJECT)
        if isinstance(asked, JsonSchema):
            return AnswerFormat(json_schema=asked.json_schema.schema_)
        return None if other is None else _structured(other)
    except SpecError as error:
        raise ApiError(f"{param}: {error}", param=param) from error


def _structured(asked: StructuredOutputs) -> AnswerFormat:
    return AnswerFormat(
        json_schema=asked.json_, regex=asked.regex, choice=tuple(asked.choice or ())
    )
