"""Answers of one model to the same questions under many specs, with their fidelity to dense.

A batch of questions is processed once and encoded once per set of signals, however many methods
and budgets are evaluated on it: on small models the encoder takes most of the time.

Shapes: B batch rows, V vocabulary, T new tokens, N visual tokens of one image's run, P tokens of
the planes that are looked at, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from sppruner.adapters import Encoded
from sppruner.engine.answer_rules import end_ids
from sppruner.evaluation.dataset import Item
from sppruner.evaluation.logprobs import LogprobRecorder, kl_divergence_B, trim_after_eos
from sppruner.models.loading import LoadedModel
from sppruner.pictures.geometry import covered_tokens, plane_boxes, visible_crop
from sppruner.prompts import build_inputs
from sppruner.pruner import Generated, Prepared, Pruner
from sppruner.relevance import ClipText
from sppruner.selection import kept_mask
from sppruner.spec import DENSE, PruneSpec
from sppruner.types import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseAnswers:
    """The dense model's answers to a batch: the reference for every pruned answer."""

    texts: list[str]
    """One answer per item, without special tokens."""
    tokens: list[list[int]]
    """The ids of each answer, its end token included."""
    first_BV: Tensor
    """Log-probabilities of the first token of each answer."""
    logprobs: list[float]
    """Mean log-probability per token of each answer, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer under one spec and how close it is to dense."""

    text: str
    """The answer, without special tokens."""
    kept: int
    """Visual tokens kept, as the budget counts them."""
    total: int
    """Visual tokens of the prompt before pruning."""
    kept_layers: float
    """Mean share of the visual tokens over the decoder's layers."""
    agrees: bool
    """Whether the answer equals the dense one token by token."""
    first_kl: float
    """KL divergence of the first token from dense, in nats."""
    dense_logprob: float
    """Mean log-probability per token of the dense answer under this spec, in nats."""
    subject_recall: tuple[float, float] | None = None
    """(1.0 if every subject keeps a token else 0.0, mean share of the subjects' tokens kept); None
    if the item has no subjects."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationBatch:
    """Items with the processor's tensors for them."""

    items: Sequence[Item]
    """One item per batch row, each with one image."""
    inputs: Mapping[str, Tensor]
    """The processor's tensors, on the model's device."""
    sizes: Sequence[tuple[int, int]]
    """(width, height) in pixels of the part of each image that the encoder sees."""
    encoded: dict[frozenset[str], Encoded] = field(default_factory=dict)
    """The encoded images by the set of signals read during encoding; filled on first use."""


class SpecEvaluator:
    """Evaluates specs on one loaded model, greedily. clip_text: needed by specs with "clip"
    relevance."""

    def __init__(
        self, loaded: LoadedModel, *, max_new_tokens: int, clip_text: ClipText | None = None
    ) -> None:
        self._model, self._processor = loaded.model, loaded.processor
        tokenizer = loaded.processor.tokenizer
        self._pruner = Pruner(loaded.model, tokenizer=tokenizer, clip_text=clip_text)
        self._max_new_tokens = max_new_tokens
        self._eos_ids = end_ids(loaded.model.generation_config)

    def check(self, spec: PruneSpec) -> None:
        """Raises SpprunerError for a spec this model cannot run."""
        self._pruner.check(spec)

    def build_batch(self, items: Sequence[Item]) -> EvaluationBatch:
        """The processor's tensors for the items, one image each. Raises InputError for a prompt
        that contains an image or video placeholder."""
        images = [item.image() for item in items]
        inputs = build_inputs(self._processor, [item.prompt for item in items], images)
        inputs = inputs.to(self._model.device)
        sizes = [visible_crop(image, self._processor.image_processor).size for image in images]
        return EvaluationBatch(items=items, inputs=inputs, sizes=sizes)

    def answer_dense(self, batch: EvaluationBatch) -> tuple[DenseAnswers, list[Answer]]:
        """The dense model's answers: as the reference for `answer_pruned`, and as `Answer`s."""
        recorder = LogprobRecorder()
        generated = self._pruner.generate(
            batch.inputs, DENSE, **self._generate_kwargs(recorder, self._max_new_tokens)
        )
        tokens, reports = self._answer_tokens(generated), generated.reports
        logprobs = recorder.mean_logprobs([len(row) for row in tokens])
        assert recorder.first_BV is not None
        dense = DenseAnswers(
            texts=self._decode(tokens), tokens=tokens, first_BV=recorder.first_BV, logprobs=logprobs
        )
        answers = [
            Answer(
                text=text,
                kept=report.visual_tokens_kept,
                total=report.visual_tokens,
                kept_layers=1.0,
                agrees=True,
                first_kl=0.0,
                dense_logprob=logprob,
                subject_recall=(1.0, 1.0) if item.subjects else None,
            )
            for item, text, report, logprob in zip(
                batch.items, dense.texts, reports, logprobs, strict=True
            )
        ]
        return dense, answers

    def answer_pruned(
        self, batch: EvaluationBatch, spec: PruneSpec, dense: DenseAnswers
    ) -> list[Answer]:
        """Answers under a spec. Raises SpprunerError if the model cannot run it."""
        recorder = LogprobRecorder(dense.tokens)
        prepared = self._prepare(batch, spec)
        kwargs = self._generate_kwargs(recorder, self._max_new_tokens)
        generated = self._pruner.run(prepared, **kwargs)
        tokens, reports = self._answer_tokens(generated), generated.reports
        recalls = _subject_recalls(batch, prepared)
        agrees = [row == reference for row, reference in zip(tokens, dense.tokens, strict=True)]
        lengths = [len(row) for row in dense.tokens]
        assert recorder.first_BV is not None
        kl_B = kl_divergence_B(dense.first_BV, recorder.first_BV)
        if not all(agrees):
            recorder = LogprobRecorder(dense.tokens, force=True)
            kwargs = self._generate_kwargs(recorder, max(lengths))
            self._pruner.run(self._prepare(batch, spec), **kwargs)
        return [
            Answer(
                text=text,
                kept=report.visual_tokens_kept,
                total=report.visual_tokens,
                kept_layers=_kept_layers(report),
                agrees=agree,
                first_kl=kl,
                dense_logprob=logprob,
                subject_recall=recall,
            )
            for text, report, agree, kl, logprob, recall in zip(
                self._decode(tokens),
                reports,
                agrees,
                kl_B.tolist(),
                recorder.mean_logprobs(lengths),
                recalls,
                strict=True,
            )
        ]

    def _prepare(self, batch: EvaluationBatch, spec: PruneSpec) -> Prepared:
        signals = self._pruner.signals([spec])
        if signals not in batch.encoded:
            with torch.no_grad():
                batch.encoded[signals] = self._pruner.adapter.encode(batch.inputs, signals)
        prompts = [item.prompt for item in batch.items]
        return self._pruner.prepare(batch.inputs, spec, prompts, encoded=batch.encoded[signals])

    def _generate_kwargs(self, recorder: LogprobRecorder, max_new_tokens: int) -> dict[str, Any]:
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "suppress_tokens": self._pruner.adapter.placeholder_ids,
            "logits_processor": LogitsProcessorList([recorder]),
        }

    def _answer_tokens(self, generated: Generated) -> list[list[int]]:
        return [trim_after_eos(row, self._eos_ids) for row in generated.tokens_BT.tolist()]

    def _decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        decode = self._processor.tokenizer.decode
        return [decode(row, skip_special_tokens=True).strip() for row in tokens]


def _subject_recalls(
    batch: EvaluationBatch, prepared: Prepared
) -> list[tuple[float, float] | None]:
    """`Answer.subject_recall` of each item, on the tokens that enter the decoder."""
    recalls: list[tuple[float, float] | None] = [None] * len(batch.items)
    for image, kept in zip(prepared.images, prepared.kept, strict=True):
        subjects = batch.items[image.row].subjects
        if not subjects:
            continue
        kept_N = kept_mask(image, kept).cpu()
        kept_P = np.concatenate([kept_N[place_P.cpu()].numpy() for place_P in image.places])
        boxes = plane_boxes(image.planes, batch.sizes[image.row])
        shares = []
        for subject in subjects:
            subject_P = np.concatenate(covered_tokens(subject, image.planes, boxes))
            shares.append(float(kept_P[subject_P].mean()))
        recalls[image.row] = float(all(shares)), float(np.mean(shares))
    return recalls


def _kept_layers(report: PruneReport) -> float:
    """Mean share of visual tokens over the decoder's layers."""
    if report.visual_tokens == 0:
        return 1.0
    text = report.prompt_tokens_dense - report.visual_tokens
    visual = [tokens - text for tokens in report.layer_tokens]
    return sum(visual) / len(visual) / report.visual_tokens
