"""`Pruner`: `generate` with pruned visual tokens, on an unmodified Hugging Face model.

    pruner = Pruner(model, tokenizer=processor.tokenizer)
    generated = pruner.generate(processor(images=…, text=…, return_tensors="pt"), spec)

Images are encoded once, each prompt's tokens are selected under its own spec, the batch is
re-packed at its shorter length, and `generate` takes the pruned features through transformers' own
`mm_encoder_outputs`: KV cache, beams, sampling and stopping work as without pruning.

Shapes: B batch rows, S length of the processor's prompts, L length of the packed prompts, R rows of
position ids (one, or four with M-RoPE), T generated tokens.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter, Encoded, EncodedImage, Kept, adapter_for
from sppruner.capabilities import Capabilities
from sppruner.compact import compact
from sppruner.errors import InputError, UnsupportedModel
from sppruner.relevance import ClipText, EmbeddingCosine, TextRelevance
from sppruner.reports import dense_reports, pruned_reports
from sppruner.resolved_spec import AnySpec, ResolvedSpec, resolve_spec, selector_on
from sppruner.selection import keep, kept_mask, select, selection_flops, token_schedules
from sppruner.spec import DENSE, PruneSpec
from sppruner.stages import StageDriver, StagePlan
from sppruner.types import PruneReport, RelevanceSource, Selection, VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A batch ready for `Pruner.run`."""

    inputs: dict[str, Any]
    """Keyword arguments of `generate`, to be used inside a `StageDriver` of `stages` if set."""

    reports: list[PruneReport]
    """One per prompt."""

    images: tuple[EncodedImage, ...]
    """What was encoded, in prompt order."""

    kept: list[Kept]
    """What stays of each image."""

    selections: list[tuple[VisualTokens, Selection]]
    """(tokens, selection) of each plane of each image in prompt order, for pictures and
    statistics."""

    stages: StagePlan | None = None
    """What is pruned inside the decoder; None for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """The result of `generate` on a batch."""

    tokens_BT: Tensor
    """New tokens only, as `generate` pads them."""

    reports: list[PruneReport]
    """One per prompt."""

    output: Any
    """What `generate` returned, unchanged."""


def check_spec(
    spec: PruneSpec, can: Capabilities, *, sources: Container[RelevanceSource] = ("embed",)
) -> None:
    """Raises what `resolve_spec` raises for a spec that a model cannot run; needs no weights."""
    resolve_spec(spec, can, sources=sources)


class Pruner:
    """Prunes visual tokens of one model instance. Not thread-safe: one call at a time.

    tokenizer: needed by methods that use the instruction's text ("embed" relevance).
    clip_text: needed by methods with "clip" relevance.
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

    def resolve(self, spec: PruneSpec) -> ResolvedSpec:
        """The spec with its method, for `prepare` and `generate`, which then check nothing again.

        Raises what `prepare` would raise later: unknown method, bad option, missing signal,
        tokenizer or text tower.
        """
        return resolve_spec(spec, self.adapter.capabilities, sources=self._relevance.sources)

    def check(self, spec: PruneSpec) -> None:
        """Raises what `resolve` raises."""
        self.resolve(spec)

    def signals(self, specs: Sequence[AnySpec]) -> frozenset[str]:
        """The signals that the encoder must read for these specs."""
        can = self.adapter.capabilities
        selectors = [
            s.selector if isinstance(s, ResolvedSpec) else selector_on(s, can) for s in specs
        ]
        return frozenset[str]().union(*(s.signals for s in selectors if s is not None))

    @torch.no_grad()
    def prepare(
        self,
        inputs: Mapping[str, Tensor],
        specs: AnySpec | Sequence[AnySpec],
        instructions: Sequence[str] | None = None,
        *,
        encoded: Encoded | None = None,
    ) -> Prepared:
        """Encodes, selects and re-packs a processor's batch.

        specs: one for all prompts, or one each. instructions: the user's text per prompt, for text
        relevance, which is not used without it. encoded: the result of
        `adapter.encode` for these inputs and `signals(specs)`, to run many specs on images that are
        encoded once; `inputs` then need no pixels. Raises InputError for prompts that do not fit
        their images, SpecError for bad specs.
        """
        ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        resolved = self._resolve_rows(specs, ids_BS.shape[0])
        per_row = [row.spec for row in resolved]
        if encoded is None and inputs.get("pixel_values") is None:
            plain = {"input_ids": ids_BS, "attention_mask": mask_BS}
            reports = dense_reports(self.adapter, per_row, inputs)
            return Prepared(inputs=plain, reports=reports, images=(), kept=[], selections=[])

        selectors = [row.selector for row in resolved]
        if encoded is None:
            encoded = self.adapter.encode(inputs, self.signals(resolved))
        images = encoded.images
        if instructions is not None:
            images = self._relevance.add_relevance(images, selectors, instructions)
        layers = self.adapter.capabilities.decoder_layers
        schedules = token_schedules(images, per_row, selectors, layers)
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
                features=self.adapter.packed_features(packed),
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
            stages=StagePlan.from_schedules(
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
        specs: AnySpec | Sequence[AnySpec] = DENSE,
        instructions: Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> Generated:
        """`model.generate` on the pruned batch; the keyword arguments are its own.

        A batch that is dense throughout goes to `generate` unchanged, so that it is a true dense
        control.
        """
        resolved = self._resolve_rows(specs, inputs["input_ids"].shape[0])
        if all(row.selector is None for row in resolved):
            reports = dense_reports(self.adapter, [row.spec for row in resolved], inputs)
            output = self.model.generate(**inputs, **generate_kwargs)
            return self._generated(output, inputs["input_ids"].shape[1], reports)
        return self.run(self.prepare(inputs, resolved, instructions), **generate_kwargs)

    @torch.no_grad()
    def run(self, prepared: Prepared, **generate_kwargs: Any) -> Generated:
        """`model.generate` on a prepared batch, once only: beam search rewrites what was packed.

        Raises InputError for a `prefill_chunk_size` that a prompt of embeddings cannot be cut to.
        """
        self._check_chunks(prepared.inputs, generate_kwargs)
        stages = prepared.stages
        with nullcontext() if stages is None else StageDriver(self.adapter, stages):
            output = self.model.generate(**prepared.inputs, **generate_kwargs)
        return self._generated(output, prepared.inputs["input_ids"].shape[1], prepared.reports)

    def _check_chunks(self, inputs: Mapping[str, Any], generate_kwargs: Mapping[str, Any]) -> None:
        """transformers cuts ids and positions into chunks, but passes all of the embeddings with
        every chunk: a shape error or, in chunks of one token, a wrong answer."""
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
        """The model's padding id. Padding is masked, so any id but the placeholder's works."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None else int(self.adapter.image_token_id == 0)

    def _resolve_rows(self, specs: AnySpec | Sequence[AnySpec], rows: int) -> list[ResolvedSpec]:
        """One resolved spec per prompt; equal specs are resolved once."""
        per_row = [specs] * rows if isinstance(specs, PruneSpec | ResolvedSpec) else list(specs)
        if len(per_row) != rows:
            raise InputError(f"{len(per_row)} specs for {rows} prompts")
        found = {s: self.resolve(s) for s in {s for s in per_row if isinstance(s, PruneSpec)}}
        return [spec if isinstance(spec, ResolvedSpec) else found[spec] for spec in per_row]

    @staticmethod
    def _policy(specs: Sequence[PruneSpec]) -> Any:
        policies = {spec.positions for spec in specs if not spec.is_dense}
        if len(policies) > 1:
            raise InputError("one batch cannot mix positions 'keep' and 'renumber': split it")
        return policies.pop() if policies else "keep"
