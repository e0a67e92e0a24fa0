"""Asking one model the same questions under many specs.

A batch of questions is processed once and encoded once per set of signals, however many methods
and budgets are asked of it: on small models the encoder is most of the work.
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
from sppruner.evaluation.dataset import Item
from sppruner.evaluation.logprobs import AnswerReader, divergence_B, up_to_end
from sppruner.models.loading import LoadedModel
from sppruner.pictures.geometry import covered, plane_boxes, seen
from sppruner.prompts import build_inputs
from sppruner.pruner import Generated, Prepared, Pruner
from sppruner.relevance import ClipText
from sppruner.selection import kept_mask
from sppruner.spec import DENSE, PruneSpec
from sppruner.types import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """The full model's answers to a batch, which pruned ones are held against. first_BV:
    log-probabilities of the first token."""

    texts: list[str]
    tokens: list[list[int]]
    first_BV: Tensor
    logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and how faithful it is.

    kept, total: visual tokens as the budget counts them. kept_layers: mean share of them over the
    decoder's layers. agrees: the dense answer, token by token. first_kl: KL of the first token to
    dense, in nats. dense_logprob: mean log-probability per token of the dense answer under this
    spec. found: (all subjects keep a token, share of their tokens kept), where subjects are known.
    """

    text: str
    kept: int
    total: int
    kept_layers: float
    agrees: bool
    first_kl: float
    dense_logprob: float
    found: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Items with the processor's tensors for them; sizes: each image as the encoder sees it;
    encoded: the images once encoded, by the signals that were read on the way."""

    items: Sequence[Item]
    inputs: Mapping[str, Tensor]
    sizes: Sequence[tuple[int, int]]
    encoded: dict[frozenset[str], Encoded] = field(default_factory=dict)


class Asker:
    """Asks one loaded model, greedily. clip_text: needed by methods with "clip" relevance."""

    def __init__(
        self, loaded: LoadedModel, *, max_new_tokens: int, clip_text: ClipText | None = None
    ) -> None:
        self._model, self._processor = loaded.model, loaded.processor
        tokenizer = loaded.processor.tokenizer
        self._pruner = Pruner(loaded.model, tokenizer=tokenizer, clip_text=clip_text)
        self._max_new_tokens = max_new_tokens
        ends = loaded.model.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    def check(self, spec: PruneSpec) -> None:
        """Raises SpprunerError for a spec this model cannot run."""
        self._pruner.check(spec)

    def batch(self, items: Sequence[Item]) -> Batch:
        """The processor's tensors for the items, one image each. Raises InputError for words that
        would read as one more image."""
        images = [item.image() for item in items]
        inputs = build_inputs(self._processor, [item.prompt for item in items], images)
        inputs = inputs.to(self._model.device)
        sizes = [seen(image, self._processor.image_processor).size for image in images]
        return Batch(items=items, inputs=inputs, sizes=sizes)

    def dense(self, batch: Batch) -> tuple[Dense, list[Answer]]:
        """The full model's answers, twice: as what others are held against, and as answers."""
        reader = AnswerReader()
        generated = self._pruner.generate(
            batch.inputs, DENSE, **self._settings(reader, self._max_new_tokens)
        )
        tokens, reports = self._rows(generated), generated.reports
        logprobs = reader.mean_logprobs([len(row) for row in tokens])
        assert reader.first_BV is not None
        dense = Dense(
            texts=self._decode(tokens), tokens=tokens, first_BV=reader.first_BV, logprobs=logprobs
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
                found=(1.0, 1.0) if item.subjects else None,
            )
            for item, text, report, logprob in zip(
                batch.items, dense.texts, reports, logprobs, strict=True
            )
        ]
        return dense, answers

    def pruned(self, batch: Batch, spec: PruneSpec, dense: Dense) -> list[Answer]:
        """Answers under a spec. Raises SpprunerError where the model cannot run it."""
        reader = AnswerReader(dense.tokens)
        prepared = self._prepare(batch, spec)
        generated = self._pruner.run(prepared, **self._settings(reader, self._max_new_tokens))
        tokens, reports = self._rows(generated), generated.reports
        found = _found(batch, prepared)
        agrees = [row == due for row, due in zip(tokens, dense.tokens, strict=True)]
        lengths = [len(row) for row in dense.tokens]
        assert reader.first_BV is not None
        kl_B = divergence_B(dense.first_BV, reader.first_BV)
        if not all(agrees):
            reader = AnswerReader(dense.tokens, force=True)
            self._pruner.run(self._prepare(batch, spec), **self._settings(reader, max(lengths)))
        return [
            Answer(
                text=text,
                kept=report.visual_tokens_kept,
                total=report.visual_tokens,
                kept_layers=_kept_layers(report),
                agrees=agree,
                first_kl=kl,
                dense_logprob=logprob,
                found=share,
            )
            for text, report, agree, kl, logprob, share in zip(
                self._decode(tokens),
                reports,
                agrees,
                kl_B.tolist(),
                reader.mean_logprobs(lengths),
                found,
                strict=True,
            )
        ]

    def _prepare(self, batch: Batch, spec: PruneSpec) -> Prepared:
        signals = self._pruner.signals([spec])
        if signals not in batch.encoded:
            with torch.no_grad():
                batch.encoded[signals] = self._pruner.adapter.encode(batch.inputs, signals)
        prompts = [item.prompt for item in batch.items]
        return self._pruner.prepare(batch.inputs, spec, prompts, encoded=batch.encoded[signals])

    def _settings(self, reader: AnswerReader, length: int) -> dict[str, Any]:
        return {
            "max_new_tokens": length,
            "do_sample": False,
            "suppress_tokens": self._pruner.adapter.placeholder_ids,
            "logits_processor": LogitsProcessorList([reader]),
        }

    def _rows(self, generated: Generated) -> list[list[int]]:
        return [up_to_end(row, self._ends) for row in generated.tokens_BT.tolist()]

    def _decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        decode = self._processor.tokenizer.decode
        return [decode(row, skip_special_tokens=True).strip() for row in tokens]


def _found(batch: Batch, prepared: Prepared) -> list[tuple[float, float] | None]:
    """What is left of each item's subjects among the tokens that enter the decoder."""
    found: list[tuple[float, float] | None] = [None] * len(batch.items)
    for image, stays in zip(prepared.images, prepared.kept, strict=True):
        subjects = batch.items[image.row].subjects
        if not subjects:
            continue
        stays_N = kept_mask(image, stays).cpu()
        kept_PN = [stays_N[place.cpu()].numpy() for place in image.places]
        boxes = plane_boxes(image.planes, batch.sizes[image.row])
        shares = []
        for subject in subjects:
            mask_N = np.concatenate(covered(subject, image.planes, boxes))
            shares.append(float(np.concatenate(kept_PN)[mask_N].mean()))
        found[image.row] = float(all(shares)), float(np.mean(shares))
    return found


def _kept_layers(report: PruneReport) -> float:
    """Mean share of visual tokens over the decoder's layers."""
    if report.visual_tokens == 0:
        return 1.0
    text = report.prompt_tokens_dense - report.visual_tokens
    visual = [tokens - text for tokens in report.layer_tokens]
    return sum(visual) / len(visual) / report.visual_tokens
