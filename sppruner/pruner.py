"""The public face: generate with pruned visual tokens, on an unmodified Hugging Face model.

    pruner = Pruner(model, tokenizer=processor.tokenizer)
    generated = pruner.generate(processor(images=…, text=…, return_tensors="pt"), spec)

The images are encoded once, each prompt's tokens are selected under its own spec, the batch is
re-packed at its shorter length, and `generate` gets the pruned features through transformers' own
`mm_encoder_outputs`: KV cache, beams, sampling and stopping work as always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter, Encoded, adapter_for
from sppruner.compact import Compacted, compact
from sppruner.errors import InputError, MissingSignal, PruningHadNoEffect, UnsupportedModel
from sppruner.relevance import ClipText, EmbeddingCosine
from sppruner.selectors import Selector, selector_for
from sppruner.spec import DENSE, PruneSpec
from sppruner.types import PruneReport, Selection, VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A batch ready for `generate`: `inputs` are its keyword arguments. One report and, per image
    in prompt order, one (tokens, selection) pair for pictures and statistics."""

    inputs: dict[str, Any]
    reports: list[PruneReport]
    selections: list[tuple[VisualTokens, Selection]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """tokens_BT: new tokens only. output: what `generate` returned, untouched."""

    tokens_BT: Tensor
    reports: list[PruneReport]
    output: Any


def check_spec(spec: PruneSpec, adapter: type[Adapter], *, clip_text: bool = False) -> None:
    """Whether a family can run `spec`, before any weights are loaded.

    Raises UnknownMethod, SpecError (a bad option) or MissingSignal (the family does not give a
    signal, or there is no CLIP text tower for the relevance asked for).
    """
    selector = selector_for(spec)
    if selector is None:
        return
    missing = selector.signals - adapter.signals
    if missing:
        raise MissingSignal(
            f"method {spec.method!r} needs {sorted(missing)}; "
            f"{adapter.family} gives {sorted(adapter.signals)}"
        )
    if selector.relevance_source == "clip" and not clip_text:
        raise MissingSignal(
            "relevance 'clip' needs the matching CLIP text tower: Pruner(clip_text=ClipText"
            "(clip, tokenizer)), or choose relevance 'embed' or 'none'"
        )


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
        if not model._supports_mm_encoder_outputs():
            raise UnsupportedModel(
                f"{type(model).__name__} takes no pre-computed encoder outputs: "
                "use a transformers version from 5.19 to 5.23"
            )
        self.model = model
        self.adapter = adapter or adapter_for(model)
        self._clip_text = clip_text
        self._words = None
        if tokenizer is not None:
            self._words = EmbeddingCosine(
                self.adapter.input_embedding,
                lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            )

    def check(self, spec: PruneSpec) -> None:
        """Raises now what `prepare` would raise later: unknown method, bad option, missing signal
        or missing text tower."""
        check_spec(spec, type(self.adapter), clip_text=self._clip_text is not None)
        selector = selector_for(spec)
        if selector is not None:
            self._relevance(selector)

    @torch.no_grad()
    def prepare(
        self,
        inputs: Mapping[str, Tensor],
        specs: PruneSpec | Sequence[PruneSpec],
        instructions: Sequence[str] | None = None,
    ) -> Prepared:
        """Encodes, selects and re-packs a processor's batch.

        specs: one for all prompts, or one each. instructions: the users' words per prompt, for
        text relevance; without them every prompt is treated as saying nothing about its image.
        Raises InputError for prompts that do not fit their images, SpecError for bad specs.
        """
        ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        per_row = _per_row(specs, ids_BS.shape[0])
        for spec in set(per_row):
            self.check(spec)
        if inputs.get("pixel_values") is None:
            plain = {"input_ids": ids_BS, "attention_mask": mask_BS}
            return Prepared(inputs=plain, reports=self._reports(per_row, inputs, None, [], []),
                            selections=[])  # fmt: skip

        selectors = [selector_for(spec) for spec in per_row]
        wanted = frozenset[str]().union(*(s.signals for s in selectors if s is not None))
        encoded = self.adapter.encode(inputs, wanted)
        images = self._with_relevance(encoded, selectors, instructions)
        selections = self._select(images, per_row, selectors)

        features = [
            image.features_ND[chosen.index_K] if chosen.replace_KD is None else chosen.replace_KD
            for image, chosen in zip(images, selections, strict=True)
        ]
        keep_BS = mask_BS.bool()
        kept = [self._kept(image, chosen) for image, chosen in zip(images, selections, strict=True)]
        keep_BS[self.adapter.placeholders(ids_BS) & keep_BS] = torch.cat(kept)
        compacted = compact(
            input_ids_BS=ids_BS,
            keep_BS=keep_BS,
            positions_RBS=self.adapter.positions(inputs),
            policy=self._policy(per_row),
            pad_id=self._pad_id(),
        )
        packed = self.adapter.pack(encoded, features)
        reports = self._reports(per_row, inputs, compacted, images, packed.pooler_output)
        positions_RBL = compacted.positions_RBL
        return Prepared(
            inputs={
                "input_ids": compacted.input_ids_BL,
                "attention_mask": compacted.attention_mask_BL,
                "position_ids": positions_RBL[0] if len(positions_RBL) == 1 else positions_RBL,
                "mm_encoder_outputs": {"image": packed},
            },
            reports=reports,
            selections=list(zip(images, selections, strict=True)),
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
            reports = self._reports(per_row, inputs, None, [], [])
            output = self.model.generate(**inputs, **generate_kwargs)
            return self._generated(output, inputs["input_ids"].shape[1], reports)
        prepared = self.prepare(inputs, per_row, instructions)
        output = self.model.generate(**prepared.inputs, **generate_kwargs)
        return self._generated(output, prepared.inputs["input_ids"].shape[1], prepared.reports)

    @staticmethod
    def _generated(output: Any, prompt_length: int, reports: list[PruneReport]) -> Generated:
        sequences = output if isinstance(output, Tensor) else output.sequences
        return Generated(tokens_BT=sequences[:, prompt_length:], reports=reports, output=output)

    def _relevance(self, selector: Selector) -> Callable[[VisualTokens, str], Tensor | None] | None:
        """How to score the text for this method, or None if it asks for no text."""
        source, pool = selector.relevance_source, selector.relevance_join
        if source == "none":
            return None
        if source == "clip":
            clip = self._clip_text
            assert clip is not None, "check_spec has seen to it"
            return lambda image, text: clip.score(image, text, pool)
        words = self._words
        if words is None:
            raise MissingSignal(
                "relevance 'embed' needs Pruner(tokenizer=…), or choose relevance 'none'"
            )
        return lambda image, text: words.score(image, text, pool)

    def _with_relevance(
        self,
        encoded: Encoded,
        selectors: Sequence[Selector | None],
        instructions: Sequence[str] | None,
    ) -> list[VisualTokens]:
        images = []
        for image in encoded.images:
            selector = selectors[image.row]
            score = None if selector is None else self._relevance(selector)
            text = "" if instructions is None else instructions[image.row]
            relevance_N = None if score is None else score(image, text)
            images.append(replace(image, relevance_N=relevance_N))
        return images

    def _select(
        self,
        images: Sequence[VisualTokens],
        specs: Sequence[PruneSpec],
        selectors: Sequence[Selector | None],
    ) -> list[Selection]:
        """One selection per image; images that share a method go through it together."""
        chosen: dict[int, Selection] = {}
        groups: dict[Selector | None, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(selectors[image.row], []).append(i)
        for selector, members in groups.items():
            group = [images[i] for i in members]
            if selector is None:
                device = images[0].features_ND.device
                picked = [Selection(index_K=torch.arange(g.count, device=device)) for g in group]
            else:
                counts = [specs[image.row].budget.count(image.count) for image in group]
                picked = selector.select(group, counts)
            chosen.update(zip(members, picked, strict=True))
        return [chosen[i] for i in range(len(images))]

    @staticmethod
    def _kept(image: VisualTokens, chosen: Selection) -> Tensor:
        keep_N = torch.zeros(image.count, dtype=torch.bool, device=image.features_ND.device)
        keep_N[chosen.index_K] = True
        return keep_N

    def _pad_id(self) -> int:
        """The model's padding id; any id but the placeholder's will do, masked as it is."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None else int(self.adapter.image_token_id == 0)

    @staticmethod
    def _policy(specs: Sequence[PruneSpec]) -> Any:
        policies = {spec.positions for spec in specs if not spec.is_dense}
        if len(policies) > 1:
            raise InputError("one batch cannot mix positions 'keep' and 'renumber': split it")
        return policies.pop() if policies else "keep"

    def _reports(
        self,
        specs: Sequence[PruneSpec],
        inputs: Mapping[str, Tensor],
        compacted: Compacted | None,
        images: Sequence[VisualTokens],
        features: Sequence[Tensor],
    ) -> list[PruneReport]:
        """Counts on the tensors the model will see, held against what the budget asked for.

        Raises PruningHadNoEffect if they differ: a row must never be called pruned when the model
        read something else.
        """
        before_B = self.adapter.placeholders(inputs["input_ids"]).sum(dim=1).tolist()
        length_B = inputs["attention_mask"].sum(dim=1).tolist()
        after_B, short_B = before_B, length_B
        if compacted is not None:
            after_B = self.adapter.placeholders(compacted.input_ids_BL).sum(dim=1).tolist()
            short_B = compacted.attention_mask_BL.sum(dim=1).tolist()
            fed = [0] * len(specs)
            due = [0] * len(specs)
            for image, given in zip(images, features, strict=True):
                spec = specs[image.row]
                fed[image.row] += int(given.shape[0])
                due[image.row] += image.count if spec.is_dense else spec.budget.count(image.count)
            for row, spec in enumerate(specs):
                if not after_B[row] == fed[row] == due[row]:
                    raise PruningHadNoEffect(
                        f"prompt {row}: {spec.method} was to leave {due[row]} of {before_B[row]} "
                        f"visual tokens; the prompt holds {after_B[row]}, the encoder output "
                        f"{fed[row]}"
                    )
        return [
            PruneReport(
                spec=spec,
                visual_tokens=before_B[row],
                visual_tokens_kept=after_B[row],
                prompt_tokens=short_B[row],
                prompt_tokens_dense=length_B[row],
            )
            for row, spec in enumerate(specs)
        ]
