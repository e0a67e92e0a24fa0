"""Prepares requests for the model: chat template, pixels and checks, in threads of their own, so
that the model never waits for an image to be resized.

Shapes: S tokens of the prompt.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sppruner.adapters import Adapter
from sppruner.cost import ImageShape
from sppruner.engine.base import check_characters, fit_length
from sppruner.engine.caches.encoder import hash_images
from sppruner.engine.format_guide import FormatGuide, format_guides
from sppruner.engine.interface import Request
from sppruner.engine.priority_pool import PriorityPool
from sppruner.errors import InputError
from sppruner.prompts import build_chat_inputs
from sppruner.pruner import Pruner
from sppruner.resolved_spec import ResolvedSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedRequest:
    """A request that can be prefilled."""

    ticket: int
    """The engine's name for the request."""

    request: Request
    """The request itself."""

    resolved: ResolvedSpec
    """The request's spec with its method."""

    inputs: dict[str, Tensor]
    """The processor's tensors of this prompt, a batch of one."""

    images_hash: bytes
    """The key of its images in the encoder cache (`hash_images`); empty without images."""

    tokens: int
    """Most prompt tokens that enter the decoder."""

    patches: int
    """Patches that enter the vision tower."""

    prefix_key: Hashable | None
    """The key in the prefix cache of the prompt up to its last image, as the decoder reads it; None
    where that cannot be shared."""

    suffix_tokens: int
    """Tokens of text after that prefix."""

    guide: FormatGuide | None = None
    """Follows its answer, where that is structured."""

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def max_length(self) -> int:
        """Most tokens of its slot, answer included."""
        return self.tokens + self.request.generation.max_new_tokens

    @property
    def kind(self) -> Hashable:
        """A batch mixes neither prompts with and without pixels, nor policies for positions."""
        spec = self.resolved.spec
        return bool(self.request.images), None if spec.is_dense else spec.positions


class RequestPreparer:
    """Prepares requests in `threads` threads.

    context: most tokens of prompt and answer together, unpruned. fits: whether so many tokens fit
    into a slot while no other request runs.
    """

    def __init__(
        self,
        processor: Any,
        pruner: Pruner,
        *,
        context: int,
        fits: Callable[[int], bool],
        threads: int = 2,
    ) -> None:
        self._processor = processor
        self._pruner = pruner
        self._context = context
        self._fits = fits
        self._guides = format_guides(processor.tokenizer, pruner.model.config)
        self._thread_local = threading.local()
        self.closed = False
        """Whether no more requests are taken."""
        self._pool = PriorityPool[PreparedRequest](threads, name="prepare")

    def prepare(self, request: Request, ticket: int) -> Future[PreparedRequest]:
        """The future raises InputError, SpecError or MissingSignal for a request that cannot be
        answered."""
        return self._pool.submit(partial(self._prepare, request, ticket), priority=request.priority)

    def close(self) -> None:
        """Ends the threads; requests that no thread has started are cancelled."""
        self.closed = True
        self._pool.close()

    def _prepare(self, request: Request, ticket: int) -> PreparedRequest:
        check_characters(request, self._context)
        # A tokenizer holds its padding state, so each thread has a processor of its own.
        if not hasattr(self._thread_local, "processor"):
            self._thread_local.processor = copy.deepcopy(self._processor)
        resolved = self._pruner.resolve(request.spec)
        processor = self._thread_local.processor
        inputs = dict(build_chat_inputs(processor, [request.conversation], [request.images]))
        prompt_tokens = int(inputs["attention_mask"].sum())
        generation = fit_length(prompt_tokens, request, self._context)
        request = replace(request, generation=generation)
        form = request.generation.format
        adapter = self._pruner.adapter
        shapes = [shape for _, shape in adapter.shapes(inputs)]
        visual_tokens = sum(shape.tokens for shape in shapes)
        decoder_tokens = _max_decoder_tokens(resolved, visual_tokens, len(shapes))
        images_hash = hash_images(inputs, shapes)
        suffix_tokens = _suffix_tokens(adapter, inputs["input_ids"])
        prefix_ids_S = inputs["input_ids"][0, : prompt_tokens - suffix_tokens]
        prepared = PreparedRequest(
            ticket=ticket,
            request=request,
            resolved=resolved,
            inputs=inputs,
            images_hash=images_hash,
            tokens=prompt_tokens - visual_tokens + decoder_tokens,
            patches=_count_patches(shapes),
            prefix_key=_prefix_key(resolved, request.prompt, images_hash, prefix_ids_S),
            suffix_tokens=suffix_tokens,
            guide=None if form is None else self._guides.start(form),
        )
        if not self._fits(prepared.max_length):
            raise InputError(
                f"{prepared.tokens} prompt tokens and max_new_tokens "
                f"{request.generation.max_new_tokens} are more than one slot of the engine can "
                "hold: keep fewer visual tokens, or raise its capacity or kv_bytes"
            )
        return prepared


def _max_decoder_tokens(resolved: ResolvedSpec, visual_tokens: int, images: int) -> int:
    """Most visual tokens of a prompt that enter the decoder."""
    if resolved.selector is None:
        return visual_tokens
    _, most = resolved.spec.budget.bounds(visual_tokens, images)
    return resolved.selector.decoder_entry_bounds(visual_tokens, most)[1]


def _count_patches(shapes: Sequence[ImageShape]) -> int:
    return sum(shape.tiles * shape.rows * shape.columns for shape in shapes)


def _suffix_tokens(adapter: Adapter, ids_1S: Tensor) -> int:
    """Number of tokens after the last visual one."""
    visual_S = adapter.placeholders(ids_1S)[0].nonzero()
    return ids_1S.shape[1] - 1 - int(visual_S[-1]) if len(visual_S) else ids_1S.shape[1]


def _prefix_key(
    resolved: ResolvedSpec, prompt: str, images_hash: bytes, prefix_ids_S: Tensor
) -> Hashable | None:
    """Everything that decides what the decoder reads of a prompt's prefix; None without images, and
    for methods that prune inside the decoder, since the end of the prompt chooses for them."""
    selector = resolved.selector
    if not images_hash or (selector is not None and selector.staged):
        return None
    by_text = selector is not None and selector.relevance_source != "none"
    ids = prefix_ids_S.numpy().tobytes()
    return images_hash, ids, resolved.spec, prompt if by_text else None
