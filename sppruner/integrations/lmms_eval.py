"""Any supported model under any spec, as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/
lmms-eval, 0.7), which then runs its own tasks on it:

    lmms-eval --model sppruner --tasks pope --batch_size 8 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=sppruner,retain=0.222,kappa=0

lmms-eval finds the model by this package's entry point in its group `lmms_eval.models`. What is not
an argument below is an option of the method.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from sppruner.engine import BatchEngine, Request, Result, SamplingParams
from sppruner.errors import EvaluationError, InputError, SpecError
from sppruner.spec import DENSE, Budget, OptionValue, PruneSpec

_PLACEHOLDERS = re.compile(r"^(\s*<image>\s*)+")
_DEFAULT_LENGTH = 1024  # lmms-eval's own models use as many


def manifest() -> ModelManifest:
    """How lmms-eval learns of the model; called through the entry point."""
    return ModelManifest(
        model_id="sppruner", simple_class_path=f"{__name__}.{PrunedModel.__name__}"
    )


class PrunedModel(lmms):
    """A model of lmms-eval that generates with pruned visual tokens.

    method: a pruning method or "none". retain: share of visual tokens kept. Raises SpprunerError
    for a model or spec that cannot be run, before any task starts.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "sppruner",
        retain: float = 0.222,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: OptionValue,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise EvaluationError("sppruner in lmms-eval runs in one process: leave torchrun out")
        rows = int(batch_size) if str(batch_size).isdigit() else (max_batch_size or 1)
        self.spec = (
            DENSE
            if method == "none"
            else PruneSpec(method=method, budget=Budget(ratio=float(retain)), options=options)
        )
        self.engine = BatchEngine(
            pretrained, revision=revision, device=device, dtype=dtype, slots=rows
        )
        self.engine.check(self.spec)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. Raises InputError for one that cannot be answered:
        an evaluation has no error rows."""
        asked = [self._request(i, request.args) for i, request in enumerate(requests)]
        answers = []
        for request, result in zip(requests, self.engine.run(asked), strict=True):
            context, settings = request.args[:2]
            text = _until(_text(context, result), settings.get("until"))
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            counts = TokenCounts(
                input_tokens=result.prompt_tokens, output_tokens=result.completion_tokens
            )
            answers.append(GenerationResult(text=text, token_counts=counts))
        return answers

    def _request(self, number: int, arguments: tuple[Any, ...]) -> Request:
        context, settings, doc_to_visual, doc_id, task, split = arguments
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for image in images:
            if not isinstance(image, Image.Image):
                raise InputError(f"task {task}: {type(image).__name__} is no image; choose another")
        return Request(
            id=str(number),
            # The engine puts a prompt's images in front of its words.
            prompt=_PLACEHOLDERS.sub("", context),
            images=tuple(image.convert("RGB") for image in images),
            spec=self.spec,
            generation=_generation(settings),
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise EvaluationError("sppruner in lmms-eval answers generation tasks only")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise EvaluationError("sppruner in lmms-eval answers one round only")


def _generation(settings: Mapping[str, Any]) -> SamplingParams:
    if (settings.get("num_beams") or 1) > 1:
        raise SpecError(f"num_beams {settings['num_beams']}: only greedy and sampled answers")
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    return SamplingParams(
        max_new_tokens=settings.get("max_new_tokens") or _DEFAULT_LENGTH,
        temperature=float(temperature),
        top_p=float(settings.get("top_p") or 1.0) if temperature else 1.0,
    )


def _text(context: str, result: Result) -> str:
    if result.text is None:
        raise InputError(f"{context!r}: {result.error_code}: {result.error_message}")
    return result.text


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text in front of the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.split(end)[0] if end else text
    return text
