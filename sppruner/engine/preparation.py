"""From a request to what the model reads: chat template, pixels and checks, in threads of its own,
so that the model never waits for a picture to be resized."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sppruner.adapters import Adapter
from sppruner.cost import ImageShape
from sppruner.engine.base import check_length
from sppruner.engine.caches.encoder import content_of
from sppruner.engine.interface import Request
from sppruner.errors import InputError
from sppruner.prompts import build_inputs
from sppruner.pruner import Pruner
from sppruner.selectors import selector_for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A request that can be read. ticket: the engine's name for it. inputs: the processor's tensors
    of this prompt alone. content: a name for its images, see `content_of`.

    tokens: prompt tokens that enter the decoder under its spec, at most; of a control request those
    of its dense twin. patches: that enter the tower.

    prefix: a name for the prompt up to its last image, as the decoder reads it, the same for the
    same beginning only; None where it cannot be shared. behind: tokens of text behind it.
    """

    ticket: int
    request: Request
    inputs: dict[str, Tensor]
    content: bytes
    tokens: int
    patches: int
    prefix: Hashable | None
    behind: int

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def alone(self) -> bool:
        return self.request.control

    @property
    def need(self) -> int:
        """Tokens of its slot in the end, at most."""
        return self.tokens + self.request.generation.max_new_tokens

    @property
    def kind(self) -> Hashable:
        """Batches cannot mix prompts with and without pixels, nor policies for positions."""
        spec = self.request.spec
        return self.alone, bool(self.request.images), None if spec.is_dense else spec.positions


class Asker:
    """Turns requests into `Asked` in `threads` threads.

    context: the most tokens of prompt and answer together, unpruned. fits: whether so many tokens
    find room in a slot, with nobody beside.
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
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ask")

    def ask(self, request: Request, ticket: int) -> Future[Asked]:
        """Its result raises InputError or SpecError for a request that cannot be answered."""
        return self._pool.submit(self._ask, request, ticket)

    def close(self) -> None:
        """Ends the threads; what was not begun is cancelled."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, request: Request, ticket: int) -> Asked:
        # A tokenizer keeps how it pads within itself: each thread has one of its own.
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self._processor)
        self._pruner.check(request.spec)
        inputs = dict(
            build_inputs(self._own.processor, [request.prompt], [request.images], [request.system])
        )
        prompt = int(inputs["attention_mask"].sum())
        check_length(prompt, request.generation, self._context)
        shapes = [shape for _, shape in self._pruner.adapter.shapes(inputs)]
        visual, kept, patches = _sizes(self._pruner.adapter, shapes, request)
        content = content_of(inputs, shapes)
        behind = _text_behind(self._pruner.adapter, inputs["input_ids"])
        asked = Asked(
            ticket=ticket,
            request=request,
            inputs=inputs,
            content=content,
            tokens=prompt - visual + kept,
            patches=patches,
            prefix=_prefix(request, content, inputs["input_ids"][0, : prompt - behind]),
            behind=behind,
        )
        if not self._fits(asked.need):
            raise InputError(
                f"{asked.tokens} prompt tokens and max_new_tokens "
                f"{request.generation.max_new_tokens} are more than one slot of the engine can "
                "hold: keep fewer visual tokens, or raise its capacity or kv_bytes"
            )
        return asked


def _sizes(
    adapter: Adapter, shapes: Sequence[ImageShape], request: Request
) -> tuple[int, int, int]:
    """Visual tokens, those of them that enter the decoder at most, and patches."""
    sizes = [shape.tokens for shape in shapes]
    total = kept = sum(sizes)
    selector = selector_for(request.spec)
    if selector is not None and not request.control:
        _, most = request.spec.budget.bounds(total, len(sizes))
        _, kept = selector.decoder_entry_bounds(total, most)
    return total, kept, sum(shape.tiles * shape.rows * shape.columns for shape in shapes)


def _text_behind(adapter: Adapter, ids_1S: Tensor) -> int:
    """Tokens behind the last visual one."""
    visual_S = adapter.placeholders(ids_1S)[0].nonzero()
    return ids_1S.shape[1] - 1 - int(visual_S[-1]) if len(visual_S) else ids_1S.shape[1]


def _prefix(request: Request, content: bytes, ids_S: Tensor) -> Hashable | None:
    """See `Asked`: everything that decides what the decoder reads of a prompt's beginning. What is
    pruned inside the decoder is chosen by the prompt's end."""
    selector = selector_for(request.spec)
    if not content or (selector is not None and selector.staged):
        return None
    by_text = selector is not None and selector.relevance_source != "none"
    return content, ids_S.numpy().tobytes(), request.spec, request.prompt if by_text else None
