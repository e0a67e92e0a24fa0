"""The reference engine: static batches through `generate`, each request under its own spec."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sppruner.engine.answer_format import AnswerFormat
from sppruner.engine.base import ModelEngine, check_characters, fit_length
from sppruner.engine.detokenizer import Detokenizer
from sppruner.engine.format_guide import FormatGuides, format_guides
from sppruner.engine.interface import Request, Result, SamplingParams, error_result
from sppruner.engine.isolation import run_isolating_failures
from sppruner.engine.queued import QueuedEngine
from sppruner.errors import InputError
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_chat_inputs


class BatchEngine(QueuedEngine, ModelEngine):
    """Answers requests a batch at a time. Settings: see `ModelEngine`.

    Greedy requests with the same generation settings share a batch whatever their specs are. A
    sampled request has a batch of its own, so that a seed gives the same text in any company; so
    has one whose answer may be shorter than it asks for.
    """

    def __init__(self, model: str | LoadedModel, **settings: Any) -> None:
        ModelEngine.__init__(self, model, **settings)
        self._guides = format_guides(self._processor.tokenizer, self._model.config)
        QueuedEngine.__init__(self, self.slots)

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        results: dict[int, Result] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            alone = request.generation.temperature > 0 or request.fit_context
            exclusive = i if alone else -1
            policy = None if request.spec.is_dense else request.spec.positions
            key = (request.generation, bool(request.images), policy, exclusive)
            groups.setdefault(key, []).append(i)
        for members in groups.values():
            for start in range(0, len(members), self.slots):
                chunk = members[start : start + self.slots]
                batch = [requests[i] for i in chunk]
                answers = run_isolating_failures(self._generate, batch, error_result)
                results.update(zip(chunk, answers, strict=True))
        return [results[i] for i in range(len(requests))]

    def _generate(self, batch: Sequence[Request]) -> list[Result]:
        started = time.perf_counter()
        for request in batch:
            check_characters(request, self._context)
            if request.logprobs is not None:
                raise InputError("logprobs: a BatchEngine does not tell them, use a continuous one")
        inputs = build_chat_inputs(
            self._processor,
            [request.conversation for request in batch],
            [request.images for request in batch],
        ).to(self._model.device)
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        generation = fit_length(longest, batch[0], self._context)
        specs = [request.spec for request in batch]
        if generation.temperature > 0:
            torch.manual_seed(generation.seed)
        prompts = [request.prompt for request in batch]
        generate_kwargs = self._generate_kwargs(generation)
        stops = None
        criteria = StoppingCriteriaList([_Heartbeat(self)])
        follower = None
        if generation.format is not None:
            follower = _FormatFollower(self._guides, generation.format, rows=len(batch))
            generate_kwargs["logits_processor"] = LogitsProcessorList([follower])
        if generation.stop:
            stops = _StopStrings(self._processor.tokenizer, generation.stop, rows=len(batch))
            criteria.append(stops)
        if follower is not None:
            criteria.append(_FormatEnds(follower, stops))
        generate_kwargs["stopping_criteria"] = criteria
        generated = self._pruner.generate(inputs, specs, prompts, **generate_kwargs)
        rows = generated.tokens_BT.tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        cut = [None] * len(batch) if stops is None else stops.cut
        return [
            # What follows in the row of a stopped answer is padding.
            self._result(request, report, tokens, seconds)
            if stopped is None
            else self._result(request, report, tokens[: stopped[0]], seconds, text=stopped[1])
            for request, report, tokens, stopped in zip(
                batch, generated.reports, rows, cut, strict=True
            )
        ]

    def _generate_kwargs(self, generation: SamplingParams) -> dict[str, Any]:
        # A generated placeholder would be read as a visual token later, so none is ever generated.
        own = self._model.generation_config.suppress_tokens or ()
        common: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "suppress_tokens": sorted({*self._pruner.adapter.placeholder_ids, *own}),
        }
        if generation.temperature == 0:
            return common | {"do_sample": False}
        return common | {
            "do_sample": True,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": 0,
        }


class _Heartbeat(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; the engine's heart beats with every token."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine = engine

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._engine.heartbeat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _FormatFollower(LogitsProcessor):  # type: ignore[misc]
    """Lets each row choose only tokens that its structured answer can go on with."""

    def __init__(self, guides: FormatGuides, form: AnswerFormat, *, rows: int) -> None:
        self.guides = [guides.start(form) for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [B, V]."""
        allowed_BV = torch.stack([guide.allowed_V(scores.shape[1]) for guide in self.guides])
        return scores.masked_fill(~allowed_BV.to(scores.device), float("-inf"))


class _FormatEnds(StoppingCriteria):  # type: ignore[misc]
    """Tells the guides each token, and ends rows whose answer is complete."""

    def __init__(self, follower: _FormatFollower, stops: _StopStrings | None) -> None:
        self._guides, self._stops = follower.guides, stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row has ended, [B] bool. Raises SpecError for an answer that cannot go
        on."""
        for row, (guide, token) in enumerate(
            zip(self._guides, input_ids[:, -1].tolist(), strict=True)
        ):
            cut = self._stops is not None and self._stops.cut[row] is not None
            if not guide.ended and not cut:  # behind a stop string there is padding
                guide.add(token)
            if guide.failure is not None:
                raise guide.failure
        return torch.tensor([guide.ended for guide in self._guides], device=input_ids.device)


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its first stop string, as `ContinuousEngine` does.

    The criterion of `transformers` matches tokens: it stops at white space in front of an answer,
    which is no part of it, and refuses strings that no token can end.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, rows: int) -> None:
        self._rows = [Detokenizer(tokenizer, stops) for _ in range(rows)]
        self._tokens = 0
        self.cut: list[tuple[int, str] | None] = [None] * rows
        """Of each row its number of tokens and its text up to the stop string; None where the
        answer has none."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """One more token of every row; whether each has ended, [B] bool."""
        self._tokens += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.cut[row] is None:
                self._rows[row].add(token)
                if self._rows[row].stopped:
                    self.cut[row] = self._tokens, self._rows[row].text
        ended = [cut is not None for cut in self.cut]
        return torch.tensor(ended, device=input_ids.device)
