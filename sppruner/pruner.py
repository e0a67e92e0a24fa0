"""The public face: generate with pruned visual tokens, on an unmodified Hugging Face model.

    pruner = Pruner(model, tokenizer=processor.tokenizer)
    generated = pruner.generate(processor(images=…, text=…, return_tensors="pt"), spec)

The images are encoded once, each prompt's tokens are selected under its own spec, the batch is
re-packed at its shorter length, and `generate` gets the pruned features through transformers' own
`mm_encoder_outputs`: KV cache, beams, sampling and stopping work as always.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter, Capabilities, Encoded, EncodedImage, Kept, adapter_for
from sppruner.choosing import keep, kept_mask, schedules_of, select, selection_flops
from sppruner.compact import compact
from sppruner.errors import InputError, MissingSignal, UnsupportedModel
from sppruner.proof import dense_reports, pruned_reports
from sppruner.relevance import ClipText, EmbeddingCosine, Source, TextRelevance, require_source
from sppruner.selectors import Selector, selector_for
from sppruner.spec import DENSE, PruneSpec
from sppruner.stages import StageDriver, StagePlan
from sppruner.types import PruneReport, Selection, VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A batch ready for `Pruner.run`: `inputs` are `generate`'s keyword arguments, to be used
    inside a `StageDriver` of `stages` where there are any.

    reports: one per prompt. images, kept: what was encoded, and what stays of each. selections: per
    plane of an image, in prompt order, (tokens, selection) for pictures and statistics.
    """

    inputs: dict[str, Any]
    reports: list[PruneReport]
    images: tuple[EncodedImage, ...]
    kept: list[Kept]
    selections: list[tuple[VisualTokens, Selection]]
    stages: StagePlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """tokens_BT: new tokens only. output: what `generate` returned, untouched."""

    tokens_BT: Tensor
    reports: list[PruneReport]
    output: Any


def check_spec(
    spec: PruneSpec, can: Capabilities, *, sources: Container[Source] = ("embed",)
) -> None:
    """Whether a model can run `spec`, before any weights are loaded.

    sources: what text relevance can come from. A model comes with its tokenizer, which is enough
    for "embed", but not with a CLIP text tower. Raises UnknownMethod, SpecError (a bad option) or
    MissingSignal (the family cannot do what the method needs, or the relevance asked for has no
    source).
    """
    selector = _selector(spec, can)
    if selector is None:
        return
    missing = selector.signals - can.signals
    if missing:
        raise MissingSignal(f"method {spec.method!r} needs {', '.join(sorted(missing))}: not {can}")
    if spec.positions not in can.positions:
        raise MissingSignal(f"positions {spec.positions!r} cannot run on {can}")
    selector.check(spec.budget, can)
    require_source(selector.relevance_source, sources)


def _selector(spec: PruneSpec, can: Capabilities) -> Selector | None:
    """A spec's method as it runs on a model that can do `can`, or None for dense."""
    selector = selector_for(spec)
    return None if selector is None else selector.on(can)


def _per_row(specs: PruneSpec | Sequence[PruneSpec], rows: int) -> list[PruneSpec]:
    per_row = [specs] * rows if isinstance(specs, PruneSpec) else list(specs)
    if len(per_row) != rows:
        raise InputError(f"{len(per_row)} specs for {rows} prompts")
    return per_row


class Pruner:
    """Prunes visual tokens of one model instance. Not thread-safe: one call at a time.

    tokenizer: needed by methods that use the instruction's text ("embed" relevance).
    clip_text: needed by methods asked for "clip" relevance.
    Raises UnsupportedModel for a family without an adapter.
    """

    def __init__(
        self,
        model: Any,
        *,
        adapter: Adapter | None = None,
        tokenizer: Any = None,
        clip_text: ClipText | None = None,
    ) -> None:
        self.model = model
        self.adapter = adapter or adapter_for(model)
        if not model._supports_mm_encoder_outputs():
            raise UnsupportedModel(
                f"{type(model).__name__} takes no pre-computed encoder outputs: "
                "use a transformers version from 5.19 to 5.23"
            )
        words = None
        if tokenizer is not None:
            words = EmbeddingCosine(
                self.adapter.input_embedding,
                lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            )
        self._relevance = TextRelevance(words, clip_text)

    def check(self, spec: PruneSpec) -> None:
        """Raises now what `prepare` would raise later: unknown method, bad option, missing signal,
        tokenizer or text tower."""
        check_spec(spec, self.adapter.capabilities, sources=self._relevance.sources)

    def signals(self, specs: Sequence[PruneSpec]) -> frozenset[str]:
        """What the encoder must be asked for on the way."""
        selectors = [_selector(spec, self.adapter.capabilities) for spec in specs]
        return frozenset[str]().union(*(s.signals for s in selectors if s is not None))

    @torch.no_grad()
    def prepare(
        self,
        inputs: Mapping[str, Tensor],
        specs: PruneSpec | Sequence[PruneSpec],
        instructions: Sequence[str] | None = None,
        *,
        encoded: Encoded | None = None,
    ) -> Prepared:
        """Encodes, selects and re-packs a processor's batch.

        specs: one for all prompts, or one each. instructions: the users' words per prompt, for
        text relevance; without them every prompt is treated as saying nothing about its image.
        encoded: what `adapter.encode` gave for these inputs and `signals(specs)`, to ask many specs
        of images that are encoded once; `inputs` then need no pixels. Raises InputError for prompts
        that do not fit their images, SpecError for bad specs.
        """
        ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        per_row = _per_row(specs, ids_BS.shape[0])
        for spec in set(per_row):
            self.check(spec)
        if encoded is None and inputs.get("pixel_values") is None:
            plain = {"input_ids": ids_BS, "attention_mask": mask_BS}
            reports = dense_reports(self.adapter, per_row, inputs)
            return Prepared(inputs=plain, reports=reports, images=(), kept=[], selections=[])

        selectors = [_selector(spec, self.adapter.capabilities) for spec in per_row]
        if encoded is None:
            encoded = self.adapter.encode(inputs, self.signals(per_row))
        images = encoded.images
        if instructions is not None:
            images = self._relevance.of(images, selectors, instructions)
        layers = self.adapter.capabilities.decoder_layers
        schedules = schedules_of(images, per_row, selectors, layers)
        selections = select(images, schedules, selectors)
        kept = [
            keep(image, schedule.before, chosen, self.adapter.project)
            for image, schedule, chosen in zip(images, schedules, selections, strict=True)
        ]

        keep_BS = mask_BS.bool()
        stays = [kept_mask(image, left) for image, left in zip(images, kept, strict=True)]
        keep_BS[self.adapter.placeholders(ids_BS) & keep_BS] = torch.cat(stays)
        compacted = compact(
            input_ids_BS=ids_BS,
            keep_BS=keep_BS,
            positions_RBS=self.adapter.positions(inputs),
            policy=self._policy(per_row),
            pad_id=self.pad_id,
        )
        packed = self.adapter.pack(encoded, kept)
        positions_RBL = compacted.positions_RBL
        return Prepared(
            inputs={
                "input_ids": compacted.input_ids_BL,
                "attention_mask": compacted.attention_mask_BL,
                "position_ids": positions_RBL[0] if len(positions_RBL) == 1 else positions_RBL,
                **self.adapter.prompt(packed, compacted),
            },
            reports=pruned_reports(
                self.adapter,
                per_row,
                inputs,
                keep_BS=keep_BS,
                compacted=compacted,
                images=images,
                schedules=schedules,
                features=self.adapter.fed(packed),
                selection_flops=[
                    selection_flops(image, chosen, selectors[image.row])
                    for image, chosen in zip(images, selections, strict=True)
                ],
            ),
            images=images,
            kept=kept,
            selections=[
                (plane, choice)
                for image, chosen in zip(images, selections, strict=True)
                for plane, choice in zip(image.planes, chosen, strict=True)
            ],
            stages=StagePlan.of(
                [image.row for image in images],
                schedules,
                attention_mask_BL=compacted.attention_mask_BL,
                visual_BL=self.adapter.placeholders(compacted.input_ids_BL),
                renumber=self._policy(per_row) == "renumber",
            ),
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Mapping[str, Tensor],
        specs: PruneSpec | Sequence[PruneSpec] = DENSE,
        instructions: Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> Generated:
        """`model.generate` on the pruned batch; the keyword arguments are its own.

        A batch that is dense throughout goes to `generate` untouched: the honest control.
        """
        per_row = _per_row(specs, inputs["input_ids"].shape[0])
        if all(spec.is_dense for spec in per_row):
            reports = dense_reports(self.adapter, per_row, inputs)
            output = self.model.generate(**inputs, **generate_kwargs)
            return self._generated(output, inputs["input_ids"].shape[1], reports)
        return self.run(self.prepare(inputs, per_row, instructions), **generate_kwargs)

    @torch.no_grad()
    def run(self, prepared: Prepared, **generate_kwargs: Any) -> Generated:
        """`model.generate` on a prepared batch, once: beam search rewrites what was packed.

        Raises InputError for a `prefill_chunk_size` that a prompt of embeddings cannot be cut to.
        """
        self._check_chunks(prepared.inputs, generate_kwargs)
        stages = prepared.stages
        with nullcontext() if stages is None else StageDriver(self.adapter, stages):
            output = self.model.generate(**prepared.inputs, **generate_kwargs)
        return self._generated(output, prepared.inputs["input_ids"].shape[1], prepared.reports)

    def _check_chunks(self, inputs: Mapping[str, Any], generate_kwargs: Mapping[str, Any]) -> None:
        """transformers cuts ids and positions into chunks, but hands every chunk all of the
        embeddings: a shape error or, in chunks of one token, a wrong answer."""
        if "inputs_embeds" not in inputs:
            return
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        size = generate_kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        if size is not None and size < inputs["input_ids"].shape[1]:
            raise InputError(
                f"prefill_chunk_size={size}: {self.adapter.capabilities.family} prompts are packed "
                "as embeddings, which generate cannot read in chunks: leave it out"
            )

    @staticmethod
    def _generated(output: Any, prompt_length: int, reports: list[PruneReport]) -> Generated:
        sequences = output if isinstance(output, Tensor) else output.sequences
        return Generated(tokens_BT=sequences[:, prompt_length:], reports=reports, output=output)

    @property
    def pad_id(self) -> int:
        """The model's padding id; any id but the placeholder's will do, masked as it is."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None else int(self.adapter.image_token_id == 0)

    @staticmethod
    def _policy(specs: Sequence[PruneSpec]) -> Any:
        policies = {spec.positions for spec in specs if not spec.is_dense}
        if len(policies) > 1:
            raise InputError("one batch cannot mix positions 'keep' and 'renumber': split it")
        return policies.pop() if policies else "keep"
