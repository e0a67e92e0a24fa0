"""`PruningProcessor`: the front half of the plugin, in front of a family's processor class of vLLM.

It checks a request's spec, shortens the image's placeholders to what will stay, and puts an
`ImageRequest` among the inputs of each image. An image's hash depends on its spec in its one form
and, for methods that read the instruction, on its words: requests that would keep the same tokens
share vLLM's caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import compress
from typing import Any, Final

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement
from vllm.multimodal.processing.processor import PromptUpdateDetails

from sppruner.adapters import capabilities
from sppruner.engine.base import CHARACTERS_PER_TOKEN
from sppruner.errors import InputError, SpecError
from sppruner.integrations.vllm.settings import PluginSettings, check_tokens
from sppruner.integrations.vllm.wire import (
    COUNTED,
    FIELD,
    INSTRUCTION,
    PRUNE,
    ImageRequest,
    shorten,
)
from sppruner.relevance import instruction_words
from sppruner.resolved_spec import RESOLVED_DENSE, ResolvedSpec
from sppruner.spec import DENSE, Budget, PruneSpec, shares

_OURS: Final = "sppruner"
_IMAGE: Final = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What one prompt asks, among the arguments of vLLM's processing."""

    resolved: ResolvedSpec
    words: tuple[int, ...]
    hashes: Mapping[str, Sequence[str]]
    """Of all items of the prompt."""
    keys: tuple[str, ...]
    """Of the images that are processed now."""
    counted: tuple[tuple[int, str], ...] | None
    """Of the same images, what they keep and their hash as a dense image; None where that follows
    from their size."""

    def requests(self) -> list[ImageRequest]:
        """Of the images that are processed now."""
        spec, words = self.resolved.spec, self.words
        if self.counted is None:
            return [ImageRequest(spec=spec, words=words, key=key) for key in self.keys]
        return [
            ImageRequest(
                spec=replace(spec, budget=Budget(tokens=tokens)),
                words=words,
                key=key,
                counted_as=dense,
            )
            for key, (tokens, dense) in zip(self.keys, self.counted, strict=True)
        ]


class PruningProcessor(BaseMultiModalProcessor):  # type: ignore[misc]
    """In front of a processor class of vLLM."""

    @cached_property
    def _settings(self) -> PluginSettings:
        return PluginSettings.of(self.info.get_hf_config())

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Dense, whatever the default spec: memory is planned for the longest prompt."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {
            **inputs.hf_processor_mm_kwargs,
            PRUNE: DENSE.to_dict(),
        }
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Raises SpecError or MissingSignal for a spec that cannot run here."""
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        asked = kwargs.pop(PRUNE, None)
        instruction = kwargs.pop(INSTRUCTION, None)
        counted = _read_counted(kwargs.pop(COUNTED, None), inputs.mm_data_items)
        spec = self._settings.default if asked is None else PruneSpec.from_dict(asked)
        resolved = RESOLVED_DENSE
        if not spec.is_dense:
            resolved = self._settings.resolve(
                spec, capabilities(self.info.get_hf_config()), counted=counted is not None
            )
            self._check_items(inputs.mm_data_items)
        words = self._words(resolved, instruction, inputs.prompt)
        stock = replace(inputs, hf_processor_mm_kwargs=kwargs)
        hashes = super()._get_mm_hashes(_with_identity(stock, resolved, words, counted))
        ours = _Asked(
            resolved=resolved,
            words=words,
            hashes=hashes,
            keys=tuple(hashes.get(_IMAGE, ())),
            counted=counted,
        )
        stock.hf_processor_mm_kwargs = {**kwargs, _OURS: ours}
        return super().apply(stock, timing_ctx)

    def _check_items(self, items: Mapping[str, Any]) -> None:
        others = sorted(name for name, given in items.items() if len(given) and name != _IMAGE)
        if others:
            raise InputError(f"the prompt holds {', '.join(others)}: only images are pruned")
        for given in items.values():
            if given.get_passthrough_data():
                raise InputError(
                    "the prompt holds image embeddings: send images to have them pruned"
                )

    def _words(
        self, resolved: ResolvedSpec, instruction: Any, prompt: Sequence[int]
    ) -> tuple[int, ...]:
        """Token ids of the instruction's words; none for a method that does not read them."""
        if resolved.selector is None or resolved.selector.relevance_source == "none":
            return ()
        tokenizer = self.info.get_tokenizer()
        if instruction is None:
            instruction = tokenizer.decode(list(prompt), skip_special_tokens=True)
        if not isinstance(instruction, str):
            raise SpecError(f"{INSTRUCTION} {instruction!r} is not a text")
        # Each word is compared with each token: no prompt of the model has more.
        most = int(self.info.ctx.model_config.max_model_len)
        words: tuple[int, ...] = ()
        if len(instruction) <= most * CHARACTERS_PER_TOKEN:
            text = instruction_words(instruction)
            words = tuple(tokenizer.encode(text, add_special_tokens=False))
        if len(instruction) > most * CHARACTERS_PER_TOKEN or len(words) > most:
            raise SpecError(f"{INSTRUCTION}: longer than this model's context of {most} tokens")
        return words

    def _get_mm_hashes(self, inputs: Any) -> Any:
        ours = inputs.hf_processor_mm_kwargs.get(_OURS)
        return super()._get_mm_hashes(inputs) if ours is None else ours.hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        ours, cached = kwargs[_OURS], mm_is_cached.get(_IMAGE, ())
        missing = [not found for found in cached]
        counted = ours.counted
        left = replace(
            ours,
            keys=tuple(compress(ours.keys, missing)),
            counted=None if counted is None else tuple(compress(counted, missing)),
        )
        return {**kwargs, _OURS: left}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        ours, kwargs = _take(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, kwargs)
        if ours.keys:
            processed[FIELD] = [request.to_tensor() for request in ours.requests()]
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        _, kwargs = _take(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, kwargs))
        # Also for dense images, or the tower would be called for each kind on its own.
        fields[FIELD] = MultiModalFieldConfig.batched(_IMAGE, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> list[Any]:
        ours, kwargs = _take(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)
        return [
            self._shortened(update, ours.resolved, out_mm_kwargs)
            if update.modality == _IMAGE
            else update
            for update in updates
        ]

    def _shortened(self, update: Any, resolved: ResolvedSpec, out_mm_kwargs: Any) -> Any:
        """The replacement of an image's placeholder by as many as stay; it writes the runs into the
        image's request."""
        config = self.info.get_hf_config()
        image_token = int(config.image_token_id)
        layers = capabilities(config).decoder_layers if resolved.selector else 0

        def kept(budget: Budget, lengths: list[int]) -> list[int]:
            if resolved.selector is None:
                return lengths
            total = sum(lengths)
            if self._settings.keeps and resolved.spec.positions == "keep":
                check_tokens(max(lengths))
            due = resolved.selector.schedule(total, budget.count(total), layers).before
            if due == 0:
                raise SpecError(
                    "a budget that leaves no token of an image: vLLM needs at least one, send the "
                    "prompt without the image"
                )
            return shares(due, lengths)

        def replacement(item: int) -> Any:
            content = update.resolve(item).content
            field = out_mm_kwargs[_IMAGE][item][FIELD]
            request = ImageRequest.from_tensor(field.data)
            split = partial(kept, request.spec.budget)
            short, runs = shorten(content.full, image_token, split)
            field.data = replace(request, runs=runs).to_tensor()
            return PromptUpdateDetails(full=short, is_embed=content.is_embed)

        return PromptReplacement(
            modality=update.modality, target=update.target, replacement=replacement
        )


def _read_counted(counted: Any, items: Mapping[str, Any]) -> tuple[tuple[int, str], ...] | None:
    """Raises SpecError for what is no count of each image."""
    if counted is None:
        return None
    images = len(items.get(_IMAGE, ()))
    pairs = list(counted) if isinstance(counted, list | tuple) else []
    valid = len(pairs) == images and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and type(pair[0]) is int
        and isinstance(pair[1], str)
        for pair in pairs
    )
    if not valid:
        raise SpecError(f"{COUNTED}: give [tokens, hash] for each of {images} images")
    return tuple((tokens, dense) for tokens, dense in pairs)


def _take(kwargs: Mapping[str, Any]) -> tuple[_Asked, dict[str, Any]]:
    """Our part of a prompt's arguments, and the others."""
    others = dict(kwargs)
    return others.pop(_OURS), others


def _with_identity(
    inputs: Any,
    resolved: ResolvedSpec,
    words: tuple[int, ...],
    counted: tuple[tuple[int, str], ...] | None,
) -> Any:
    """The inputs as they are hashed: those of a dense request are the stock ones."""
    if resolved.selector is None:
        return inputs
    identity = {PRUNE: resolved.spec.to_json(), INSTRUCTION: " ".join(map(str, words))}
    if counted is not None:
        identity[COUNTED] = " ".join(str(tokens) for tokens, _ in counted)
    return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **identity})
