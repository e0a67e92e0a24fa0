"""The engine's interface: requests in, results out in the same order. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from PIL import Image

from sppruner.conversation import Turn, ask
from sppruner.cost import ImageShape, RowCost
from sppruner.engine.answer_format import AnswerFormat
from sppruner.engine.token_logprobs import TokenLogprob
from sppruner.errors import EngineError, RequestPart, SpecError, SpprunerError
from sppruner.spec import DENSE, PruneSpec

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
"""A model's dtype; auto is bfloat16 on a GPU and float32 on a CPU."""

COLDEST: Final = 0.001
"""The lowest temperature but 0: colder, divided logits overflow, and sampling is greedy anyway."""
_STOPS, _STOP_CHARACTERS = 16, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of an answer are sampled, and where the answer ends."""

    max_new_tokens: int = 64
    """Most tokens of the answer, at least 1."""

    temperature: float = 0.0
    """0 is greedy decoding; from 0.001 answers are sampled."""

    top_p: float = 1.0
    """Share of probability that nucleus sampling draws from, in (0, 1]; no effect if greedy."""

    seed: int = 0
    """Seed of this request's own random generator; no effect if greedy."""

    stop: tuple[str, ...] = ()
    """Stop strings, at most 16 of 1 to 1000 characters: the answer ends in front of the first that
    it contains."""

    format: AnswerFormat | None = None
    """The form that the answer's text must have; None for any."""

    def __post_init__(self) -> None:
        if self.format is not None and not isinstance(self.format, AnswerFormat):
            raise SpecError(f"format {self.format!r}: give an AnswerFormat")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise SpecError(f"max_new_tokens {self.max_new_tokens!r}: give at least 1")
        if not _is_finite(self.temperature) or self.temperature < 0:
            raise SpecError(f"temperature {self.temperature!r}: give a number from 0")
        if 0 < self.temperature < COLDEST:
            raise SpecError(f"temperature {self.temperature!r}: give 0, or at least {COLDEST}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise SpecError(f"top_p {self.top_p!r} is outside (0, 1]")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise SpecError(f"seed {self.seed!r}: give a whole number of up to 64 bits")
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) for s in self.stop):
            raise SpecError(f"stop {self.stop!r}: give a tuple of strings")
        if "" in self.stop:
            raise SpecError("stop holds an empty string, which would end every answer at once")
        if len(self.stop) > _STOPS or max(map(len, self.stop), default=0) > _STOP_CHARACTERS:
            raise SpecError(
                f"stop: give at most {_STOPS} strings of at most {_STOP_CHARACTERS} characters; "
                "each is looked for at every token"
            )


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(cast(float, value))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt with its decoded images and its own pruning spec."""

    id: str
    """The caller's name for the request; its result carries it."""

    prompt: str
    """The user's text, which methods that select by the question read."""

    images: tuple[Image.Image, ...] = ()
    """Decoded images, in front of the text in the prompt."""

    system: str | None = None
    """The system message; None for none."""

    turns: tuple[Turn, ...] = ()
    """The whole conversation, where it is more than one question: the model reads it in place of
    `system` and `prompt`, with `images` where its turns have them."""

    spec: PruneSpec = DENSE
    """What is pruned of the images' visual tokens."""

    generation: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is sampled."""

    priority: int = 0
    """Smaller priorities are served first."""

    stream: bool = False
    """Whether updates carry the text as it is generated."""

    logprobs: int | None = None
    """How many alternatives to each token the result names, with their probabilities, at most 20;
    None for no probabilities."""

    fit_context: bool = False
    """Whether the answer may be shorter than `max_new_tokens` where the model's context leaves less
    behind the prompt; else such a request is refused."""

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """What the model reads."""
        return self.turns or ask(self.prompt, len(self.images), self.system)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to one request, or the error that it ended in."""

    id: str
    """The request's id."""

    text: str | None
    """The answer; None on error."""

    finish_reason: str | None = None
    """"stop" (end token or stop string) or "length" (max_new_tokens); None on error."""

    prompt_tokens: int = 0
    """Text and visual tokens that entered the decoder."""

    completion_tokens: int = 0
    """Tokens of the answer, an end token included."""

    visual_tokens: int = 0
    """Visual tokens of the unpruned prompt."""

    visual_tokens_kept: int = 0
    """Visual tokens kept, as the spec's budget counts them (`PruneReport.visual_tokens_kept`)."""

    kept_tokens: bytes = b""
    """Bit mask of the visual tokens that entered the decoder (`PruneReport.kept_tokens`)."""

    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token of the text, if the request asked for them."""

    image_shapes: tuple[ImageShape, ...] = ()
    """Of each image, the patches and visual tokens that `kept_tokens` counts through."""

    seconds: float = 0.0
    """The request's share of wall seconds: each batch or step it took part in, divided by the
    requests in it."""

    first_token_seconds: float = field(default=0.0, compare=False, repr=False)
    """Wall seconds from `submit` to the first token; 0 where the engine does not say."""

    device: str | None = None
    """Kind of device that answered, such as "NVIDIA H200"; None where nobody said."""

    cost: RowCost | None = None
    """Modelled cost, from the model's config alone; None on error."""

    error_code: str | None = None
    """Stable code of the error (`SpprunerError.code`); None on success."""

    error_message: str | None = None
    """The error's class and message; None on success."""

    error_stage: str | None = None
    """Where the request failed (`SpprunerError.stage`); None on success."""

    error_about: RequestPart | None = None
    """What of the request is to be changed (`SpprunerError.about`); None on success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Progress of one request since the last `poll`."""

    ticket: int
    """What `submit` returned for the request."""

    text: str = ""
    """Text generated since the last update, for a request with `stream`."""

    result: Result | None = None
    """Set in the request's last update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine is at, as of now."""

    running: int
    """Requests that have a slot."""

    waiting: int
    """Requests that have none yet."""

    kv_usage: float | None = None
    """Share of the KV cache in use, from 0 to 1; None without a bound."""


class Engine(Protocol):
    """Anything that answers requests: `submit` them, `step` while any is left, `poll` for updates.

    One thread makes all calls but `jpeg_scale` and `load`. A bad request ends in an error result;
    an exception means that the engine itself is broken.
    """

    model_id: str
    """Name or folder of the model, as it was loaded."""

    model_revision: str
    """Pins the model's content: a commit, or a hash of its files."""

    image_backend: str
    """"pil" or "torchvision": their pixels differ slightly, so a run's identity includes it."""

    dtype: str
    """Of the model's weights, never "auto": answers depend on it, so a run keeps to one."""

    busy_seconds: float
    """Wall seconds of prefill and decode since the start, without waiting for requests."""

    slots: int
    """Most requests that are answered at the same time."""

    kv_token_capacity: int | None
    """Most tokens of prompts and answers in the KV cache at the same time; None for no bound."""

    heartbeat: Callable[[], None]
    """Called between the parts of a long step. Whoever steps the engine may replace it."""

    @property
    def in_flight(self) -> int:
        """Requests without a result."""
        ...

    @property
    def load(self) -> EngineLoad:
        """What it is at. Safe to read from any thread; then roughly so."""
        ...

    def jpeg_scale(self, width: int, height: int) -> int:
        """See `JpegScale`. Grids and token counts stay the same, and pixels nearly so. Safe to call
        from any thread."""
        ...

    def warm_up(self) -> None:
        """Answers a few requests before the first real one, so that one-off costs are not measured
        as work. Raises where this engine could answer no request correctly."""
        ...

    def clear_caches(self) -> None:
        """Forgets what was kept of earlier requests, so that the next ones find what the first ones
        found."""
        ...

    def submit(self, request: Request) -> int:
        """Queues a request; returns the ticket that its updates carry."""
        ...

    def cancel(self, ticket: int) -> bool:
        """Drops a request; False if it has ended or can no longer be stopped."""
        ...

    def step(self) -> bool:
        """Does the next piece of work; returns whether any request is left."""
        ...

    def poll(self) -> list[Update]:
        """Updates since the last call."""
        ...

    def close(self) -> None:
        """Ends the engine's threads, if it has any."""
        ...


def unheard() -> None:
    """The heartbeat of an engine that nobody watches."""


def error_result(request: Request, error: Exception) -> Result:
    """The result of a request that ends in an error; its code and stage are the error's own."""
    kind = type(error) if isinstance(error, SpprunerError) else EngineError
    return Result(
        id=request.id,
        text=None,
        error_code=kind.code,
        error_message=f"{type(error).__name__}: {error}",
        error_stage=kind.stage,
        error_about=kind.about,
    )
