"""A model for lmms-eval 0.7 (https://github.com/EvolvingLMMs-Lab/lmms-eval): any supported model
under any spec, on lmms-eval's own tasks.

    lmms-eval --model sppruner --tasks pope --batch_size 8 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=sppruner,retain=0.222,kappa=0

lmms-eval finds the model through this package's entry point in the group `lmms_eval.models`.
Arguments other than those of `PrunedModel` are options of the method.
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
_DEFAULT_MAX_NEW_TOKENS = 1024  # the default of lmms-eval's own models


def manifest() -> ModelManifest:
    """The registration of the model; lmms-eval calls it through the entry point."""
    return ModelManifest(
        model_id="sppruner", simple_class_path=f"{__name__}.{PrunedModel.__name__}"
    )


class PrunedModel(lmms):
    """An lmms-eval model that generates with pruned visual tokens.

    method: a pruning method, or "none" for dense. retain: share of visual tokens kept, in (0, 1].
    batch_size: requests per batch; max_batch_size applies if it is not a number ("auto"). Raises
    SpprunerError for an unsupported model or spec, before any task starts.
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
            raise EvaluationError(
                "sppruner in lmms-eval runs in one process: start it without torchrun"
            )
        slots = int(batch_size) if str(batch_size).isdigit() else (max_batch_size or 1)
        self.spec = (
            DENSE
            if method == "none"
            else PruneSpec(method=method, budget=Budget(ratio=float(retain)), options=options)
        )
        self.engine = BatchEngine(
            pretrained, revision=revision, device=device, dtype=dtype, slots=slots
        )
        self.engine.check(self.spec)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. Raises InputError for a request that cannot be
        answered: lmms-eval has no error rows."""
        engine_requests = [self._request(i, request.args) for i, request in enumerate(requests)]
        answers = []
        for request, result in zip(requests, self.engine.run(engine_requests), strict=True):
            context, settings = request.args[:2]
            text = _cut_at_stop(_checked_text(context, result), settings.get("until"))
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
                raise InputError(
                    f"task {task}: {type(image).__name__} is not an image; choose another task"
                )
        return Request(
            id=str(number),
            # The engine places a prompt's images before its text.
            prompt=_PLACEHOLDERS.sub("", context),
            images=tuple(image.convert("RGB") for image in images),
            spec=self.spec,
            generation=_sampling_params(settings),
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise EvaluationError("sppruner in lmms-eval supports generation tasks only")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise EvaluationError("sppruner in lmms-eval supports single-round tasks only")


def _sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    if (settings.get("num_beams") or 1) > 1:
        raise SpecError(
            f"num_beams {settings['num_beams']}: only greedy decoding and sampling are supported"
        )
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    return SamplingParams(
        max_new_tokens=settings.get("max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS,
        temperature=float(temperature),
        top_p=float(settings.get("top_p") or 1.0) if temperature else 1.0,
    )


def _checked_text(context: str, result: Result) -> str:
    if result.text is None:
        raise InputError(f"{context!r}: {result.error_code}: {result.error_message}")
    return result.text


def _cut_at_stop(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text
