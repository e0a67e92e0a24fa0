"""The reference engine: static batches through `generate`, each row under its own spec."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from sppruner.chat import ask_about
from sppruner.engine.loading import LoadedModel, load_model
from sppruner.engine.types import Generation, Request, Result
from sppruner.errors import EngineError, InputError, PruningHadNoEffect, SpprunerError
from sppruner.pruner import Pruner
from sppruner.relevance import ClipText
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.types import PruneReport

_NO_EFFECT = "pruning_no_effect"
_WARM_UP_ROWS = 4


class BatchEngine:
    """One model instance that answers lists of requests. Single-threaded.

    Greedy requests with the same generation settings share a batch whatever their specs are;
    sampled ones run alone, so that a seed gives the same text in any company. Control requests
    form batches of their own and run twice, pruned and dense, in alternating order.
    """

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_rows: int = 64,
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
        self.max_batch_rows = max_batch_rows
        self._model = loaded.model
        self._processor = loaded.processor
        self._pruner = Pruner(
            loaded.model, tokenizer=loaded.processor.tokenizer, clip_text=clip_text
        )
        self._cost = self._pruner.adapter.cost()
        ends = loaded.model.generation_config.eos_token_id
        self._end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        text = loaded.model.config.get_text_config()
        self._context = int(text.max_position_embeddings)

    def check(self, spec: PruneSpec) -> None:
        """Raises SpecError or MissingSignal for a spec this model cannot run."""
        self._pruner.check(spec)

    def warm_up(self) -> None:
        """Answers blank images, dense and pruned: allocations and kernel choices of first calls are
        then over. Raises PruningHadNoEffect where the model does not see a selection, before any
        corpus has cost anything; EngineError where it cannot answer at all."""
        blank = Image.new("RGB", (64, 64), "gray")
        half = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))
        for spec in (DENSE, half):
            requests = [
                Request(
                    id=str(number),
                    prompt="warm up",
                    images=(blank,),
                    spec=spec,
                    generation=Generation(max_new_tokens=2),
                )
                for number in range(min(_WARM_UP_ROWS, self.max_batch_rows))
            ]
            for result in self.run(requests):
                if result.error_code == _NO_EFFECT:
                    raise PruningHadNoEffect(str(result.error_message))
                if result.error_code is not None:
                    raise EngineError(f"{self.model_id} cannot answer: {result.error_message}")

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; a bad request becomes an error result."""
        results: dict[int, Result] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            alone = i if request.generation.temperature > 0 else -1
            policy = None if request.spec.is_dense else request.spec.positions
            key = (request.generation, request.control, bool(request.images), policy, alone)
            groups.setdefault(key, []).append(i)
        for members in groups.values():
            for start in range(0, len(members), self.max_batch_rows):
                chunk = members[start : start + self.max_batch_rows]
                batch = [requests[i] for i in chunk]
                answer = self._control if batch[0].control else self._answer
                results.update(zip(chunk, answer(batch), strict=True))
        return [results[i] for i in range(len(requests))]

    def _control(self, batch: list[Request]) -> list[Result]:
        """Both ways on the same rows. Which goes first is decided by the rows, so that neither
        side always meets the warmer cache."""
        dense = [replace(request, spec=DENSE) for request in batch]
        if zlib.crc32(batch[0].id.encode()) % 2:
            twins, pruned = self._answer(dense), self._answer(batch)
        else:
            pruned, twins = self._answer(batch), self._answer(dense)
        return [
            replace(p, control_text=d.text, control_seconds=d.seconds)
            if p.error_code is None and d.error_code is None
            else p
            for p, d in zip(pruned, twins, strict=True)
        ]

    def _answer(self, batch: list[Request]) -> list[Result]:
        """One batch; if it fails as a whole its halves are tried, down to single rows, so that a
        bad row is the only one to become an error and most neighbours still share a batch."""
        try:
            return self._generate(batch)
        except torch.AcceleratorError:
            raise  # A faulted device answers nothing more: the engine is broken, not a row.
        except Exception as error:  # The row boundary: whatever a row provokes stays with the row.
            if len(batch) > 1:
                half = len(batch) // 2
                return self._answer(batch[:half]) + self._answer(batch[half:])
            return [_failed(batch[0], error)]

    def _generate(self, batch: list[Request]) -> list[Result]:
        started = time.perf_counter()
        inputs = ask_about(
            self._processor,
            [request.prompt for request in batch],
            [request.images for request in batch],
            [request.system for request in batch],
        ).to(self._model.device)
        generation = batch[0].generation
        specs = [request.spec for request in batch]
        self._check_length(inputs, generation)
        if generation.temperature > 0:
            torch.manual_seed(generation.seed)
        generated = self._pruner.generate(
            inputs,
            specs,
            [request.prompt for request in batch],
            **self._generate_kwargs(generation),
        )
        rows = generated.tokens_BT.tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            self._result(request, report, tokens, seconds)
            for request, report, tokens in zip(batch, generated.reports, rows, strict=True)
        ]

    def _check_length(self, inputs: Any, generation: Generation) -> None:
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        if longest + generation.max_new_tokens > self._context:
            raise InputError(
                f"{longest} prompt tokens and max_new_tokens {generation.max_new_tokens} exceed "
                f"the model's context of {self._context}: shorten one of them"
            )

    def _generate_kwargs(self, generation: Generation) -> dict[str, Any]:
        # A generated placeholder would be read as a visual token later: never emit one.
        common = {
            "max_new_tokens": generation.max_new_tokens,
            "suppress_tokens": self._pruner.adapter.placeholder_ids,
        }
        if generation.temperature == 0:
            return common | {"do_sample": False}
        return common | {
            "do_sample": True,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": 0,
        }

    def _result(
        self, request: Request, report: PruneReport, tokens: list[int], seconds: float
    ) -> Result:
        end = next((i for i, token in enumerate(tokens) if token in self._end_ids), None)
        new_tokens = len(tokens) if end is None else end + 1
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
            finish_reason="length" if end is None else "stop",
            prompt_tokens=report.prompt_tokens,
            completion_tokens=new_tokens,
            visual_tokens=report.visual_tokens,
            visual_tokens_kept=report.visual_tokens_kept,
            kept_tokens=report.kept_tokens,
            seconds=seconds,
            cost=cost,
        )


def _failed(request: Request, error: Exception) -> Result:
    if isinstance(error, PruningHadNoEffect):
        code = _NO_EFFECT
    elif isinstance(error, SpprunerError):
        code = "prompt_invalid"
    else:
        code = "inference_failed"
    return Result(
        id=request.id,
        text=None,
        error_code=code,
        error_message=f"{type(error).__name__}: {error}",
    )
