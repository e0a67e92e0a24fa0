"""What our engines share: a loaded model, its pruner, and results made of its reports."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from PIL import Image

from sppruner.engine.interface import Request, Result, SamplingParams, Update
from sppruner.errors import EngineError, InputError, PruningHadNoEffect
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pruner import Pruner
from sppruner.relevance import ClipText
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.types import PruneReport

_WARM_UP_ROWS: Final = 4

_R = TypeVar("_R")


class ModelEngine(ABC):
    """An `Engine` around one model instance.

    model: a name or folder for `load_model`, or what that gave. slots: requests that are
    answered side by side.
    """

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
        self.slots = slots
        self._reduction = jpeg_scale_of(loaded.processor)
        self._model = loaded.model
        self._processor = loaded.processor
        self._pruner = Pruner(
            loaded.model, tokenizer=loaded.processor.tokenizer, clip_text=clip_text
        )
        self._cost = self._pruner.adapter.cost()
        ends = loaded.model.generation_config.eos_token_id
        self._end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._context = int(loaded.model.config.get_text_config().max_position_embeddings)

    @abstractmethod
    def submit(self, request: Request) -> int:
        """See `Engine`."""

    @abstractmethod
    def step(self) -> bool:
        """See `Engine`."""

    @abstractmethod
    def poll(self) -> list[Update]:
        """See `Engine`."""

    def reduction(self, width: int, height: int) -> int:
        """See `Engine`."""
        return self._reduction(width, height)

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; for an engine that nobody else is stepping."""
        tickets = [self.submit(request) for request in requests]
        results: dict[int, Result] = {}
        while len(results) < len(tickets):
            self.step()
            results |= {u.ticket: u.result for u in self.poll() if u.result is not None}
        return [results[ticket] for ticket in tickets]

    def check(self, spec: PruneSpec) -> None:
        """Raises SpecError or MissingSignal for a spec this model cannot run."""
        self._pruner.check(spec)

    def warm_up(self) -> None:
        """Answers blank images, dense and pruned: allocations and kernel choices of first calls are
        then over. Raises PruningHadNoEffect where the model does not see a selection, before any
        corpus has cost anything; EngineError where it cannot answer at all."""
        half = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))
        for spec in (DENSE, half):
            requests = [
                Request(
                    id=str(number),
                    prompt="warm up",
                    # All different, or one would be encoded for all.
                    images=(Image.new("RGB", (64, 64), (64 + number,) * 3),),
                    spec=spec,
                    generation=SamplingParams(max_new_tokens=2),
                )
                for number in range(min(_WARM_UP_ROWS, self.slots))
            ]
            for result in self.run(requests):
                if result.error_code == PruningHadNoEffect.code:
                    raise PruningHadNoEffect(str(result.error_message))
                if result.error_code is not None:
                    raise EngineError(f"{self.model_id} cannot answer: {result.error_message}")

    def _result(
        self,
        request: Request,
        report: PruneReport,
        tokens: Sequence[int],
        seconds: float,
        *,
        text: str | None = None,
    ) -> Result:
        """The result of an answer, whose `tokens` may go on behind its end. text: the answer where
        it was cut in front of a stop string."""
        end = next((i for i, token in enumerate(tokens) if token in self._end_ids), None)
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
            seconds=seconds,
            cost=cost,
        )


def both_ways(
    pruned: list[_R], dense: list[_R], answer: Callable[[list[_R]], list[Result]], *, key: str
) -> list[Result]:
    """The results of control requests, each with its dense twin's text and seconds.

    Which goes first is decided by `key`, so that neither side always meets the warmer cache.
    """
    if zlib.crc32(key.encode()) % 2:
        twins, own = answer(dense), answer(pruned)
    else:
        own, twins = answer(pruned), answer(dense)
    return [
        replace(p, control_text=d.text, control_seconds=d.seconds)
        if p.error_code is None and d.error_code is None
        else p
        for p, d in zip(own, twins, strict=True)
    ]


def check_length(prompt: int, generation: SamplingParams, context: int) -> None:
    """Raises InputError for a prompt of so many tokens and an answer that exceed the context."""
    if prompt + generation.max_new_tokens > context:
        raise InputError(
            f"{prompt} prompt tokens and max_new_tokens {generation.max_new_tokens} exceed the "
            f"model's context of {context}: shorten one of them"
        )
