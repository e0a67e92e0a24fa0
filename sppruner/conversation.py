"""A conversation: turns of text and images in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from sppruner.errors import InputError

Role: TypeAlias = Literal["system", "user", "assistant"]
_ROLES: Final[tuple[str, ...]] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. Raises InputError for another role, and for images of an assistant."""

    role: Role
    """Whose turn it is."""

    parts: tuple[str | None, ...]
    """Texts in order; None stands for the next image of the conversation."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.role not in _ROLES:
            raise InputError(f"role {self.role!r}: use {', '.join(_ROLES)}")
        if self.images and self.role != "user":
            raise InputError(f"an image in a turn of the {self.role}: images are the user's")

    @property
    def images(self) -> int:
        """Images among its parts."""
        return self.parts.count(None)

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts among its parts."""
        return tuple(part for part in self.parts if part is not None)


def ask(prompt: str, images: int, system: str | None = None) -> tuple[Turn, ...]:
    """A question behind its images, and behind a system message if there is one."""
    question = Turn("user", (*[None] * images, prompt))
    return (Turn("system", (system,)), question) if system else (question,)


def check_images(turns: Sequence[Turn], images: int) -> None:
    """Raises InputError for a conversation about another number of images."""
    named = sum(turn.images for turn in turns)
    if named != images:
        raise InputError(f"a conversation about {named} images, with {images}")
