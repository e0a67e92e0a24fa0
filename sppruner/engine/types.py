"""What an engine takes and gives: one request, one result, always in the caller's order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from sppruner.cost import RowCost
from sppruner.errors import SpecError
from sppruner.spec import DENSE, PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How tokens are chosen. temperature 0 is greedy; `seed` matters only above 0.

    stop: texts that end an answer in front of them.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SpecError(f"max_new_tokens {self.max_new_tokens!r}: ask for at least 1")
        if self.temperature < 0:
            raise SpecError(f"temperature {self.temperature!r} is negative")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p {self.top_p!r} is outside (0, 1]")
        if "" in self.stop:
            raise SpecError("stop holds an empty text, which would end every answer at once")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt with its decoded images and its own pruning spec.

    control: also answer it densely and time both, in a batch of control requests only, so that
    pruned and dense seconds come from the same rows in the same batch. priority: smaller ones are
    served first. stream: whether its words are wanted before it has ended.
    """

    id: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None
    spec: PruneSpec = DENSE
    generation: Generation = field(default_factory=Generation)
    control: bool = False
    priority: int = 0
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to one request, or why there is none (`error_code` set, `text` None).

    kept_tokens: which visual tokens entered the decoder, as `PruneReport.kept_tokens`. seconds:
    wall seconds of the batch this row ran in, divided by the batch's rows. control_text
    and control_seconds come from the dense twin of a control request. cost: modelled, from the
    model's config alone; None on error.
    """

    id: str
    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    kept_tokens: bytes = b""
    seconds: float = 0.0
    control_text: str | None = None
    control_seconds: float | None = None
    cost: RowCost | None = None
    error_code: str | None = None
    error_message: str | None = None


class Engine(Protocol):
    """Anything that answers requests. Single-threaded: one call at a time per instance."""

    model_id: str
    model_revision: str
    # "pil" or "torchvision": their pixels differ slightly, so it is part of a run's identity.
    image_backend: str

    def warm_up(self) -> None:
        """Run once before the first request, so that what only first calls cost is not measured as
        work. Raises where this engine could not keep its word on any request."""
        ...

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order. A bad request gives an error result, never an
        exception; an exception means that the engine itself is broken."""
        ...
