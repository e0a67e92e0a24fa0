"""What both engines share: a loaded model, its pruner, and results made from its reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from sppruner.engine.answer_rules import end_ids
from sppruner.engine.interface import Request, Result, SamplingParams, Update
from sppruner.engine.run_all import answer_all, warm_up
from sppruner.engine.token_logprobs import MOST_ALTERNATIVES
from sppruner.errors import InputError, SpecError
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pruner import Pruner
from sppruner.relevance import ClipText
from sppruner.spec import PruneSpec
from sppruner.types import PruneReport

CHARACTERS_PER_TOKEN: Final = 16  # text has three to five; long runs of one character have more


class ModelEngine(ABC):
    """An `Engine` around one model instance.

    model: a name or folder for `load_model`, or what it returned. slots: most requests that are
    answered at the same time.
    """

    heartbeat: Callable[[], None]
    """See `Engine`."""

    _updates: list[Update]
    """What the next `poll` returns."""

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 64,
        clip_text: ClipText | None = None,
    ) -> None:
        loaded = (
            load_model(model, revision=revision, device=device, dtype=dtype)
            if isinstance(model, str)
            else model
        )
        self.model_id = loaded.identity.name
        self.model_revision = loaded.identity.revision
        self.image_backend = loaded.image_backend
        self.dtype = str(loaded.model.dtype).removeprefix("torch.")
        if slots < 1:
            raise SpecError(f"slots {slots}: give at least 1")
        self.slots = slots
        self._jpeg_scale = jpeg_scale_of(loaded.processor)
        self._model = loaded.model
        self._processor = loaded.processor
        self._pruner = Pruner(
            loaded.model, tokenizer=loaded.processor.tokenizer, clip_text=clip_text
        )
        self._cost = self._pruner.adapter.cost()
        self._eos_ids = end_ids(loaded.model.generation_config)
        self._context = int(loaded.model.config.get_text_config().max_position_embeddings)

    @abstractmethod
    def clear_caches(self) -> None:
        """See `Engine`."""

    @abstractmethod
    def submit(self, request: Request) -> int:
        """See `Engine`."""

    @abstractmethod
    def step(self) -> bool:
        """See `Engine`."""

    @abstractmethod
    def poll(self) -> list[Update]:
        """See `Engine`."""

    def jpeg_scale(self, width: int, height: int) -> int:
        """See `Engine`."""
        return self._jpeg_scale(width, height)

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; for an engine that nobody else steps. Updates of
        requests that were submitted before stay for `poll`."""
        results, others = answer_all(self, requests)
        self._updates[:0] = others
        return results

    def check(self, spec: PruneSpec) -> None:
        """Raises SpecError or MissingSignal for a spec that this model cannot run."""
        self._pruner.check(spec)

    def warm_up(self) -> None:
        """See `Engine`."""
        warm_up(self)

    def _result(
        self,
        request: Request,
        report: PruneReport,
        tokens: Sequence[int],
        seconds: float,
        *,
        text: str | None = None,
        images_cached: bool = False,
        suffix_tokens: int | None = None,
    ) -> Result:
        """The result of an answer. tokens: may continue after its end token. text: the answer where
        it was cut in front of a stop string; None where it was not. images_cached, suffix_tokens:
        see `ModelCost.row`."""
        ends = self._eos_ids
        if request.generation.format is not None:  # the end of a structured answer
            ends = ends | {self._processor.tokenizer.eos_token_id}
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        new_tokens = len(tokens) if end is None else end + 1
        stopped = end is not None or text is not None
        if text is None:
            text = self._processor.tokenizer.decode(tokens[:new_tokens], skip_special_tokens=True)
        cost = self._cost.row(
            images=report.image_shapes,
            layer_tokens=report.layer_tokens,
            prompt_tokens_dense=report.prompt_tokens_dense,
            new_tokens=new_tokens,
            pruner_flops=report.selection_flops,
            images_cached=images_cached,
            suffix_tokens=suffix_tokens,
        )
        return Result(
            id=request.id,
            text=text.strip(),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=report.prompt_tokens,
            completion_tokens=new_tokens,
            visual_tokens=report.visual_tokens,
            visual_tokens_kept=report.visual_tokens_kept,
            kept_tokens=report.kept_tokens,
            image_shapes=tuple(report.image_shapes),
            seconds=seconds,
            cost=cost,
        )


def check_characters(request: Request, context: int) -> None:
    """Raises InputError for texts that are too long for the model's context however they are cut
    into tokens: a tokenizer takes seconds and gigabytes for megabytes; and for more alternatives
    than are told."""
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_ALTERNATIVES:
        raise InputError(f"logprobs {request.logprobs}: give 0 to {MOST_ALTERNATIVES}")
    texts = (text for turn in request.conversation for text in turn.texts)
    characters = max(len(request.prompt), sum(map(len, texts)))
    if characters > context * CHARACTERS_PER_TOKEN:
        raise InputError(
            f"{characters:,} characters of prompt exceed the model's context of {context} tokens: "
            "shorten it"
        )


def fit_length(prompt_tokens: int, request: Request, context: int) -> SamplingParams:
    """How a request's answer is sampled behind so many tokens of prompt: shorter than it asks for
    where the model's context leaves less, and the request takes that. Raises InputError where the
    context does not hold both."""
    generation, left = request.generation, context - prompt_tokens
    if request.fit_context and 0 < left < generation.max_new_tokens:
        return replace(generation, max_new_tokens=left)
    if generation.max_new_tokens > left:
        raise InputError(
            f"{prompt_tokens} prompt tokens and max_new_tokens {generation.max_new_tokens} exceed "
            f"the model's context of {context}: shorten one of them"
        )
    return generation
