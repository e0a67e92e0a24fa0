"""`PruningModel`: the back half of the plugin, in front of a family's model class of vLLM.

vLLM's own tower and projector run; the library's adapter makes planes of what was read from them,
its selectors choose, and what stays leaves in place of all.

Shapes: N tokens of an image's run, K kept tokens, D width of the language model, V width of the
vision encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from sppruner.adapters import EncodedImage, Kept, TowerOutput, adapter_class
from sppruner.engine.isolation import run_isolating_failures
from sppruner.errors import PruningHadNoEffect
from sppruner.integrations.vllm.image_reports import MOST_AHEAD, ImageReport, ReportBook
from sppruner.integrations.vllm.listening import Ears, Heard, listening
from sppruner.integrations.vllm.positions import KeptPositions
from sppruner.integrations.vllm.settings import PluginSettings
from sppruner.integrations.vllm.wire import FIELD, ImageRequest
from sppruner.relevance import EmbeddingCosine
from sppruner.reports import pack_bits
from sppruner.resolved_spec import RESOLVED_DENSE, ResolvedSpec
from sppruner.selection import (
    budget_counts,
    keep,
    kept_mask,
    select,
    selection_flops,
    token_schedules,
)
from sppruner.selectors import Selector
from sppruner.signals import CONTENT_SEED
from sppruner.spec import PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedInVllm:
    """What the tower made of an image."""

    image: EncodedImage
    layout: Any
    """As the family's adapter describes one."""
    run: Tensor
    """[N, D] and columns that follow the kept tokens."""
    width: int
    """D."""


class PruningModel(KeptPositions):
    """In front of a model class of vLLM."""

    config: Any
    _adapter: Any  # the family's own; its class says what a layout is

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = PluginSettings.of(self.config)
        self.reports = ReportBook()
        self.isolates = False
        """Whether reports are read, so that an image of which nothing can be selected may fail
        alone."""
        scheduler = vllm_config.scheduler_config
        # vLLM plans the tower's memory for so many tokens, and counts shortened images against it.
        self._most_tower_tokens = int(scheduler.max_num_encoder_input_tokens)
        if self.settings.keeps:
            self.hold_offsets(scheduler.max_num_batched_tokens)
        if self.settings.refused is None:
            self._adapter = adapter_class(self.config)(SimpleNamespace(config=self.config))
        self._resolved: dict[str, ResolvedSpec] = {}
        self._ahead: LRUCache[tuple[str, frozenset[str]], EncodedInVllm] = LRUCache(MOST_AHEAD)

    @abstractmethod
    def ears(self) -> Ears:
        """Where the tower is listened to."""

    @abstractmethod
    def layouts(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The layout of each image of a call, as the family's adapter describes one."""

    @abstractmethod
    def tower_output(
        self, runs: Sequence[Tensor], heard: Heard, inputs: Mapping[str, Any], signals: bool
    ) -> TowerOutput:
        """What the adapter needs of a call of the tower. runs: what the model made of each image.
        signals: whether the attention was probed."""

    @abstractmethod
    def project(self, states_KV: Tensor) -> Tensor:
        """[K, D] features of encoder states, for methods that merge before the projector."""

    def patches(self, inputs: Mapping[str, Any]) -> list[int] | None:
        """Patches of each image of a call, for a tower that packs them into one sequence."""
        return None

    def part(self, inputs: Mapping[str, Any], images: slice) -> dict[str, Any]:
        """The inputs of some images of a call."""
        return {name: values[images] for name, values in inputs.items()}

    @torch.no_grad()
    def embed_multimodal(self, **inputs: Any) -> Any:
        """As vLLM's: what stays of each image, [K, D] and the columns of `KeptPositions`."""
        fields = inputs.pop(FIELD, None)
        if fields is None or inputs.get("pixel_values") is None:  # videos; images as embeddings
            outputs = super().embed_multimodal(**inputs)
            return outputs if outputs is None else [self.carry(one, None) for one in outputs]
        requests = [ImageRequest.from_tensor(field) for field in fields]
        kept: list[Tensor] = []
        for images in self._parts(requests):
            whole = len(requests) == images.stop - images.start
            kept += self._embed(inputs if whole else self.part(inputs, images), requests[images])
        return kept

    def _parts(self, requests: Sequence[ImageRequest]) -> Iterator[slice]:
        """Consecutive images that the tower's memory was planned for, those that it has seen apart
        from those that it has not."""
        seen = [self._ahead_key(request) in self._ahead for request in requests]
        start = tokens = 0
        for at, request in enumerate(requests):
            full = tokens + request.tokens > self._most_tower_tokens
            if at > start and (full or seen[at] != seen[start]):
                yield slice(start, at)
                start, tokens = at, 0
            tokens += request.tokens
        yield slice(start, len(requests))

    def _embed(self, inputs: dict[str, Any], requests: Sequence[ImageRequest]) -> list[Tensor]:
        selectors = [self._resolve(request).selector for request in requests]
        if all(selector is None for selector in selectors):
            runs = list(super().embed_multimodal(**inputs))
            self._report_dense(inputs, requests, runs)
            return [self.carry(run, None) for run in runs]
        ahead = [self._ahead.pop(self._ahead_key(request), None) for request in requests]
        encoded = [one for one in ahead if one is not None]
        if len(encoded) < len(requests):
            wanted = frozenset[str]().union(*(one.signals for one in selectors if one))
            encoded = self._encode(inputs, len(requests), wanted)
        pairs = list(zip(encoded, requests, strict=True))
        return run_isolating_failures(self._prune, pairs, self._give_up)

    def _ahead_key(self, request: ImageRequest) -> tuple[str, frozenset[str]]:
        """Under which an image that was counted is held; another method reads other signals."""
        selector = self._resolve(request).selector if request.counted_as else None
        return request.counted_as, frozenset() if selector is None else selector.signals

    def _prune(self, pairs: Sequence[tuple[EncodedInVllm, ImageRequest]]) -> list[Tensor]:
        """What stays of each image, reported."""
        resolved = [self._resolve(request) for _, request in pairs]
        selectors = [one.selector for one in resolved]
        images = [
            self._with_relevance(replace(one.image, row=row), selector, request)
            for row, ((one, request), selector) in enumerate(zip(pairs, selectors, strict=True))
        ]
        layers = self._adapter.capabilities.decoder_layers
        schedules = token_schedules(images, [one.spec for one in resolved], selectors, layers)
        chosen = select(images, schedules, selectors)
        kept = [
            keep(image, schedule.before, choice, self.project)
            for image, schedule, choice in zip(images, schedules, chosen, strict=True)
        ]
        outputs = []
        for image, choice, left, selector, (one, request) in zip(
            images, chosen, kept, selectors, pairs, strict=True
        ):
            flops = selection_flops(image, choice, selector)
            self._report(request, image.count, kept_mask(image, left), flops, image.shape)
            outputs.append(self._leave(request, one.layout, left, one.run, one.width))
        return outputs

    def _give_up(self, pair: tuple[EncodedInVllm, ImageRequest], error: Exception) -> Tensor:
        """The first tokens of an image of which nothing could be selected, for its prompt has
        places; the report says why. An exception would end all requests of this vLLM: where nobody
        reads reports, that is better than an answer about something else."""
        if not self.isolates:
            raise error
        one, request = pair
        index_K = torch.arange(request.kept, device=one.run.device).clamp(max=len(one.run) - 1)
        left = Kept(index_K=index_K, features_KD=one.run[index_K, : one.width])
        report = ImageReport(
            tokens=request.tokens,
            kept_tokens=b"",
            selection_flops=0,
            shape=one.image.shape,
            failed=f"{type(error).__name__}: {error}",
        )
        self.reports.write(request.key, report)
        return self._leave(request, one.layout, left, one.run, one.width)

    def _encode(
        self, inputs: dict[str, Any], count: int, wanted: frozenset[str]
    ) -> list[EncodedInVllm]:
        """What the tower makes of so many images. wanted: names of signals."""
        probe = bool(wanted - {CONTENT_SEED})
        with listening(self.ears(), self.patches(inputs), probe=probe) as heard:
            runs = list(super().embed_multimodal(**inputs))
        width = self.feature_width(runs[0])
        tower = self.tower_output([run[:, :width] for run in runs], heard, inputs, probe)
        layouts = self.layouts(inputs)
        images = self._adapter.images(tower, [(row, 0) for row in range(count)], layouts, wanted)
        return [
            EncodedInVllm(image=image, layout=layout, run=run, width=width)
            for image, layout, run in zip(images, layouts, runs, strict=True)
        ]

    @torch.no_grad()
    def count_tokens(
        self, images: Sequence[dict[str, Any]], spec: PruneSpec, keys: Sequence[str]
    ) -> list[int]:
        """How many tokens of each image of one prompt the spec's budget keeps. images: the inputs
        of each. keys: their hashes, under which what the tower made of them is held for the prompt
        itself."""
        resolved = self.settings.resolve(spec, self._adapter.capabilities, counted=True)
        assert resolved.selector is not None
        encoded = []
        for inputs in images:  # one by one: memory was planned for few of the largest
            inputs = {name: value for name, value in inputs.items() if name != FIELD}
            encoded += self._encode(inputs, 1, resolved.selector.signals)
        signals = resolved.selector.signals
        for key, one in zip(keys, encoded, strict=True):
            self._ahead[key, signals] = one
        return budget_counts([one.image for one in encoded], spec.budget, resolved.selector)

    def feature_width(self, run: Tensor) -> int:
        """D of what the model makes of an image; columns behind it follow the kept tokens."""
        return run.shape[1]

    def _leave(
        self, request: ImageRequest, layout: Any, left: Kept, run: Tensor, width: int
    ) -> Tensor:
        features_KD = left.features_KD
        if width < run.shape[1]:
            features_KD = torch.cat([features_KD, run[left.index_K, width:]], dim=1)
        if not request.keeps_positions:
            return self.carry(features_KD, None)
        return self.carry(features_KD, self.offsets(request, layout, left.index_K))

    def _resolve(self, request: ImageRequest) -> ResolvedSpec:
        if request.spec.is_dense:
            return RESOLVED_DENSE
        name = request.spec.to_json()
        if name not in self._resolved:
            if len(self._resolved) > 1000:
                self._resolved.clear()
            self._resolved[name] = self.settings.resolve(request.spec, self._adapter.capabilities)
        return self._resolved[name]

    def _with_relevance(
        self, image: EncodedImage, selector: Selector | None, request: ImageRequest
    ) -> EncodedImage:
        if selector is None or selector.relevance_source == "none" or not request.words:
            return image
        cosine = EmbeddingCosine(self._word_embedding())
        planes = tuple(
            replace(
                plane,
                relevance_N=cosine.score_words(plane, request.words, selector.relevance_pooling),
            )
            for plane in image.planes
        )
        return replace(image, planes=planes)

    def _word_embedding(self) -> nn.Module:
        """The decoder's, without the adapters that vLLM may have put around it: they are planned
        for the tokens of a step."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        return next(
            module
            for module in self.get_language_model().modules()
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        )

    def _report_dense(
        self, inputs: Mapping[str, Any], requests: Sequence[ImageRequest], runs: Sequence[Tensor]
    ) -> None:
        if self.settings.refused is not None:
            return
        for request, layout, run in zip(requests, self.layouts(inputs), runs, strict=True):
            shape = layout.shape() if callable(getattr(layout, "shape", None)) else layout
            mask_N = torch.ones(run.shape[0], dtype=torch.bool)
            self._report(request, run.shape[0], mask_N, 0, shape)

    def _report(
        self,
        request: ImageRequest,
        tokens: int,
        mask_N: Tensor,
        flops: int,
        shape: Any,
    ) -> None:
        """Raises PruningHadNoEffect where other tokens leave than the prompt has places for: vLLM
        would take the first ones, or wait for more, without a word."""
        kept = int(mask_N.sum())
        if request.runs and (kept, tokens) != (request.kept, request.tokens):
            raise PruningHadNoEffect(
                f"{kept} of {tokens} visual tokens are left of an image, and the prompt has places "
                f"for {request.kept} of {request.tokens}"
            )
        if request.key:
            report = ImageReport(
                tokens=tokens,
                kept_tokens=pack_bits(mask_N.cpu().numpy()),
                selection_flops=flops,
                shape=shape,
            )
            self.reports.write(request.key, report)
