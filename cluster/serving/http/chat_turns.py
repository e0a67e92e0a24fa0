"""Messages as clients send them → a conversation as a model's chat template takes it.

System and developer messages are one system message in front. What tools answered is the user's,
and what an assistant called is its text: templates of vision-language models know neither. Messages
of one side that follow each other are one turn, since many templates want turns that alternate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import ApiError
from cluster.serving.http.chat_schema import Detail, ImagePart, Message, RefusalPart, TextPart
from sppruner.conversation import Role, Turn, ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a request asks, and its images in order."""

    prompt: str
    """The texts of the last user turn."""
    system: str | None
    """The system message, or None."""
    turns: tuple[Turn, ...]
    """All of it, where it is more than one question behind its images; else empty."""
    urls: tuple[str, ...]
    """Of the images, in the order in which the turns have them."""
    details: tuple[Detail, ...]
    """What each image asks for."""


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Raises ApiError for messages without a question, and for images that are not the user's."""
    system, said, images = list[str](), list[tuple[Role, list[str | None]]](), list[ImagePart]()
    for message in messages:
        pictures = [part for part in _listed(message) if isinstance(part, ImagePart)]
        if message.role in ("system", "developer", "assistant") and pictures:
            raise ApiError(
                f"an image in a message of role {message.role}: images belong in user messages",
                param="messages",
            )
        parts = _parts(message)
        if message.role in ("system", "developer"):
            system.extend(part for part in parts if part is not None)
        elif parts:
            role: Role = "assistant" if message.role == "assistant" else "user"
            if not said or said[-1][0] != role:
                said.append((role, []))
            said[-1][1].extend(parts)
            images += pictures
    turns = [Turn(role, tuple(_joined(parts))) for role, parts in said]
    asked = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    if asked is None:
        raise ApiError("no message of role user has any content", param="messages")
    prompt = "\n".join(asked.texts)
    before = "\n".join(system) or None
    whole = (*([Turn("system", (before,))] if before else []), *turns)
    return Conversation(
        prompt=prompt,
        system=before,
        turns=() if whole == ask(prompt, len(images), before) else whole,
        urls=tuple(image.url for image in images),
        details=tuple(image.asked_detail for image in images),
    )


def _listed(message: Message) -> Sequence[TextPart | ImagePart | RefusalPart]:
    return message.content if isinstance(message.content, list) else ()


def _parts(message: Message) -> list[str | None]:
    """Texts, without empty ones; None for an image."""
    content = message.content
    said: list[str | None] = []
    if isinstance(content, str):
        said.append(content)
    for part in _listed(message):
        match part:
            case ImagePart():
                said.append(None)
            case TextPart():
                said.append(part.text)
            case RefusalPart():
                said.append(part.refusal)
    said.append(message.refusal or "")
    calls = [call.function for call in message.tool_calls or ()]
    calls += [message.function_call] if message.function_call else []
    for call in calls:
        said.append(json.dumps({"name": call.name, "arguments": call.arguments}))
    return [part for part in said if part != ""]


def _joined(parts: Sequence[str | None]) -> Iterator[str | None]:
    """Texts that follow each other as lines of one."""
    lines = list[str]()
    for part in parts:
        if part is None:
            if lines:
                yield "\n".join(lines)
                lines.clear()
            yield None
        elif part:
            lines.append(part)
    if lines:
        yield "\n".join(lines)
