"""The public face: generate with pruned visual tokens, on an unmodified Hugging Face model.

    pruner = Pruner(model, tokenizer=processor.tokenizer)
    generated = pruner.generate(processor(images=…, text=…, return_tensors="pt"), spec)

The images are encoded once, each prompt's tokens are selected under its own spec, the batch is
re-packed at its shorter length, and `generate` gets the pruned features through transformers' own
`mm_encoder_outputs`: KV cache, beams, sampling and stopping work as always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sppruner.adapters import Adapter, Capabilities, Encoded, EncodedImage, Kept, adapter_for
from sppruner.compact import Compacted, compact
from sppruner.errors import InputError, MissingSignal, PruningHadNoEffect, UnsupportedModel
from sppruner.relevance import ClipText, EmbeddingCosine
from sppruner.selectors import Selector, selector_for
from sppruner.spec import DENSE, PruneSpec, shares
from sppruner.stages import Schedule, StageDriver, StagePlan
from sppruner.types import PruneReport, Selection, VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A batch ready for `generate`: `inputs` are its keyword arguments, to be used inside a
    `StageDriver` of `stages` where there are any. One report per prompt and, per image plane in
    prompt order, one (tokens, selection) pair for pictures and statistics."""

    inputs: dict[str, Any]
    reports: list[PruneReport]
    selections: list[tuple[VisualTokens, Selection]]
    stages: StagePlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """tokens_BT: new tokens only. output: what `generate` returned, untouched."""

    tokens_BT: Tensor
    reports: list[PruneReport]
    output: Any


def check_spec(spec: PruneSpec, can: Capabilities, *, clip_text: bool = False) -> None:
    """Whether a model can run `spec`, before any weights are loaded.

    Raises UnknownMethod, SpecError (a bad option) or MissingSignal (the family cannot do what the
    method needs, or there is no CLIP text tower for the relevance asked for).
    """
    selector = selector_for(spec)
    if selector is None:
        return
    missing = selector.signals - can.signals
    if missing:
        raise MissingSignal(f"method {spec.method!r} needs {', '.join(sorted(missing))}: not {can}")
    if spec.positions not in can.positions:
        raise MissingSignal(f"positions {spec.positions!r} cannot run on {can}")
    if selector.relevance_source == "clip" and not clip_text:
        raise MissingSignal(
            "relevance 'clip' needs the matching CLIP text tower: Pruner(clip_text=ClipText"
            "(clip, tokenizer)), or choose relevance 'embed' or 'none'"
        )
    selector.check(spec.budget, can)


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
        check_spec(spec, self.adapter.capabilities, clip_text=self._clip_text is not None)
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
            return Prepared(
                inputs=plain, reports=self._dense_reports(per_row, inputs), selections=[]
            )

        selectors = [selector_for(spec) for spec in per_row]
        wanted = frozenset[str]().union(*(s.signals for s in selectors if s is not None))
        encoded = self.adapter.encode(inputs, wanted)
        encoded = self._with_relevance(encoded, selectors, instructions)
        schedules = self._schedules(encoded.images, per_row, selectors)
        selections = self._select(encoded.images, schedules, selectors)
        kept = [
            self._keep(image, schedule.before, chosen)
            for image, schedule, chosen in zip(encoded.images, schedules, selections, strict=True)
        ]

        keep_BS = mask_BS.bool()
        masks = [
            _mask(image.count, k.index_K) for image, k in zip(encoded.images, kept, strict=True)
        ]
        keep_BS[self.adapter.placeholders(ids_BS) & keep_BS] = torch.cat(masks)
        compacted = compact(
            input_ids_BS=ids_BS,
            keep_BS=keep_BS,
            positions_RBS=self.adapter.positions(inputs),
            policy=self._policy(per_row),
            pad_id=self._pad_id(),
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
            reports=self._reports(
                per_row, inputs, compacted, encoded.images, schedules, self.adapter.fed(packed)
            ),
            selections=[
                (plane, choice)
                for image, chosen in zip(encoded.images, selections, strict=True)
                for plane, choice in zip(image.planes, chosen, strict=True)
            ],
            stages=StagePlan.of(
                [image.row for image in encoded.images],
                schedules,
                attention_mask_BL=compacted.attention_mask_BL,
                visual_BL=self.adapter.placeholders(compacted.input_ids_BL),
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
            reports = self._dense_reports(per_row, inputs)
            output = self.model.generate(**inputs, **generate_kwargs)
            return self._generated(output, inputs["input_ids"].shape[1], reports)
        prepared = self.prepare(inputs, per_row, instructions)
        stages = prepared.stages
        with nullcontext() if stages is None else StageDriver(self.adapter, stages):
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
    ) -> Encoded:
        if instructions is None:
            return encoded
        if len(instructions) != len(selectors):
            raise InputError(f"{len(instructions)} instructions for {len(selectors)} prompts")
        images = []
        for image in encoded.images:
            selector = selectors[image.row]
            score = None if selector is None else self._relevance(selector)
            if score is not None:
                text = instructions[image.row]
                planes = tuple(replace(p, relevance_N=score(p, text)) for p in image.planes)
                image = replace(image, planes=planes)
            images.append(image)
        return replace(encoded, images=tuple(images))

    def _schedules(
        self,
        images: Sequence[EncodedImage],
        specs: Sequence[PruneSpec],
        selectors: Sequence[Selector | None],
    ) -> list[Schedule]:
        """How many tokens of each image enter the decoder, and how many stay at its stages."""
        layers = self.adapter.capabilities.decoder_layers
        by_row: dict[int, list[EncodedImage]] = {}
        for image in images:
            by_row.setdefault(image.row, []).append(image)
        schedules = []
        for row, members in by_row.items():
            selector, budget = selectors[row], specs[row].budget
            sizes = [image.count for image in members]
            if selector is None:
                schedules += [Schedule(before=n, counted=n) for n in sizes]
                continue
            for image, k in zip(members, budget.per_image(sizes), strict=True):
                if budget.spread:
                    k = budget.weighed(k, image.count, selector.information(image.planes))
                schedules.append(selector.schedule(image.count, k, layers))
        return schedules

    def _select(
        self,
        images: Sequence[EncodedImage],
        schedules: Sequence[Schedule],
        selectors: Sequence[Selector | None],
    ) -> list[list[Selection]]:
        """One selection per plane of each image; planes that share a method go through it
        together. An image's tokens are divided among its planes by size."""
        counts = []
        for image, schedule in zip(images, schedules, strict=True):
            sizes = [plane.count for plane in image.planes]
            counts.append(shares(min(schedule.before, sum(sizes)), sizes))
        groups: dict[Selector | None, list[tuple[int, int]]] = {}
        for i, image in enumerate(images):
            for p in range(len(image.planes)):
                groups.setdefault(selectors[image.row], []).append((i, p))
        chosen: dict[tuple[int, int], Selection] = {}
        for selector, members in groups.items():
            planes = [images[i].planes[p] for i, p in members]
            if selector is None:
                device = planes[0].features_ND.device
                picked = [Selection(index_K=torch.arange(g.count, device=device)) for g in planes]
            else:
                picked = selector.select(planes, [counts[i][p] for i, p in members])
            chosen.update(zip(members, picked, strict=True))
        return [[chosen[i, p] for p in range(len(im.planes))] for i, im in enumerate(images)]

    def _keep(self, image: EncodedImage, count: int, chosen: Sequence[Selection]) -> Kept:
        """What stays of an image's run. Row ends and the like stay, in order, only where the
        budget has room left beside all of the planes."""
        features_ND = image.run_ND.clone()
        mask_N = torch.zeros(image.count, dtype=torch.bool, device=features_ND.device)
        free_N = ~mask_N
        for places_P, choice in zip(image.places, chosen, strict=True):
            at_K = places_P[choice.index_K]
            mask_N[at_K], free_N[places_P] = True, False
            replaced_KD = choice.replace_KD
            if choice.replace_KV is not None:
                replaced_KD = self.adapter.project(choice.replace_KV.to(features_ND.dtype))
            if replaced_KD is not None:
                features_ND[at_K] = replaced_KD.to(features_ND.dtype)
        room = count - sum(choice.count for choice in chosen)
        mask_N[free_N.nonzero().squeeze(1)[: max(0, room)]] = True
        index_K = mask_N.nonzero().squeeze(1)
        return Kept(index_K=index_K, features_KD=features_ND[index_K])

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

    def _dense_reports(
        self, specs: Sequence[PruneSpec], inputs: Mapping[str, Tensor]
    ) -> list[PruneReport]:
        visual_B = self.adapter.placeholders(inputs["input_ids"]).sum(dim=1).tolist()
        length_B = inputs["attention_mask"].sum(dim=1).tolist()
        shapes = self.adapter.shapes(inputs)
        layers = self.adapter.capabilities.decoder_layers
        return [
            PruneReport(
                spec=spec,
                visual_tokens=visual,
                visual_tokens_kept=visual,
                prompt_tokens=length,
                prompt_tokens_dense=length,
                layer_tokens=(length,) * layers,
                image_shapes=tuple(shape for at, shape in shapes if at == row),
            )
            for row, (spec, visual, length) in enumerate(
                zip(specs, visual_B, length_B, strict=True)
            )
        ]

    def _reports(
        self,
        specs: Sequence[PruneSpec],
        inputs: Mapping[str, Tensor],
        compacted: Compacted,
        images: Sequence[EncodedImage],
        schedules: Sequence[Schedule],
        features: Sequence[Tensor],
    ) -> list[PruneReport]:
        """Counts on the tensors the model will see, held against what the budget asked for.

        Raises PruningHadNoEffect if they differ: a row must never be called pruned when the model
        read something else.
        """
        before_B = self.adapter.placeholders(inputs["input_ids"]).sum(dim=1).tolist()
        length_B = inputs["attention_mask"].sum(dim=1).tolist()
        after_B = self.adapter.placeholders(compacted.input_ids_BL).sum(dim=1).tolist()
        short_B = compacted.attention_mask_BL.sum(dim=1).tolist()
        layers = self.adapter.capabilities.decoder_layers
        reports = []
        for row, spec in enumerate(specs):
            mine = [i for i, image in enumerate(images) if image.row == row]
            due = sum(schedules[i].before for i in mine)
            fed = sum(int(features[i].shape[0]) for i in mine)
            if not after_B[row] == fed == due:
                raise PruningHadNoEffect(
                    f"prompt {row}: {spec.method} was to leave {due} of {before_B[row]} visual "
                    f"tokens; the prompt holds {after_B[row]}, the encoder output {fed}"
                )
            text = short_B[row] - due
            reports.append(
                PruneReport(
                    spec=spec,
                    visual_tokens=before_B[row],
                    visual_tokens_kept=sum(schedules[i].counted for i in mine),
                    prompt_tokens=short_B[row],
                    prompt_tokens_dense=length_B[row],
                    layer_tokens=tuple(
                        text + sum(schedules[i].at(layer) for i in mine) for layer in range(layers)
                    ),
                    image_shapes=tuple(images[i].shape for i in mine),
                )
            )
        return reports


def _mask(n: int, index_K: Tensor) -> Tensor:
    mask_N = torch.zeros(n, dtype=torch.bool, device=index_K.device)
    mask_N[index_K] = True
    return mask_N
