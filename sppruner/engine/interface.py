"""What an engine takes and gives: one request, one result, always in the caller's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from PIL import Image

from sppruner.cost import RowCost
from sppruner.errors import EngineError, SpecError, SpprunerError
from sppruner.spec import DENSE, PruneSpec

# Of a model; auto is bfloat16 on a GPU and float32 on a CPU.
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

Reduction: TypeAlias = Callable[[int, int], int]
"""By how much an upright JPEG of a width and height may be decoded smaller: 1, 2, 4 or 8, which
divides both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
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
    generation: SamplingParams = field(default_factory=SamplingParams)
    control: bool = False
    priority: int = 0
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to one request, or why there is none (`error_code` set, `text` None).

    kept_tokens: which visual tokens entered the decoder, as `PruneReport.kept_tokens`. seconds:
    its share of the wall seconds of what it took part in, each batch or step divided by its rows;
    those of a control request are its group's, divided. control_text and control_seconds come from
    the dense twin of a control request. cost: modelled, from the model's config alone; None on
    error.
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
    error_stage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What became of a request since the last `poll`. text: what it went on to say, where it asked
    to stream. result: set in its last update."""

    ticket: int
    text: str = ""
    result: Result | None = None


class Engine(Protocol):
    """Anything that answers requests: `submit` them, `step` while there are any, `poll` what became
    of them. One thread makes all calls but `reduction`. A bad request ends in an error result; an
    exception means that the engine itself is broken."""

    model_id: str
    model_revision: str
    # "pil" or "torchvision": their pixels differ slightly, so it is part of a run's identity.
    image_backend: str
    # Wall seconds of reading and answering since the start; waiting for requests is not in them.
    busy_seconds: float

    # Requests that are answered side by side at most, and tokens of prompts and answers that these
    # may have together: None where nothing bounds them.
    slots: int
    kv_token_capacity: int | None

    @property
    def in_flight(self) -> int:
        """Requests without a result."""
        ...

    def reduction(self, width: int, height: int) -> int:
        """See `Reduction`. What the model is shown keeps its shape, and hardly changes by it. Any
        thread may ask."""
        ...

    def warm_up(self) -> None:
        """Run once before the first request, so that what only first calls cost is not measured as
        work. Raises where this engine could not keep its word on any request."""
        ...

    def submit(self, request: Request) -> int:
        """Takes a request; returns the ticket that its updates will carry."""
        ...

    def cancel(self, ticket: int) -> bool:
        """Forgets a request; False where it has ended already, or cannot be stopped any more."""
        ...

    def step(self) -> bool:
        """Does the next piece of work; returns whether any request is left."""
        ...

    def poll(self) -> list[Update]:
        """What became of requests since the last call."""
        ...

    def close(self) -> None:
        """Ends what the engine has started: threads, if any."""
        ...


def error_result(request: Request, error: Exception) -> Result:
    """The result of a request that ends in an error; its code and stage are the error's own."""
    kind = type(error) if isinstance(error, SpprunerError) else EngineError
    return Result(
        id=request.id,
        text=None,
        error_code=kind.code,
        error_message=f"{type(error).__name__}: {error}",
        error_stage=kind.stage,
    )
