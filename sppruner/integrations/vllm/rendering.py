"""Requests in vLLM's form: chat template, pixels and checks, in a thread of their own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from sppruner.capabilities import Capabilities
from sppruner.engine.base import check_characters, fit_length
from sppruner.engine.format_guide import FormatGuides
from sppruner.engine.interface import Request, SamplingParams
from sppruner.errors import InputError, SpprunerError
from sppruner.integrations.vllm.settings import PluginSettings, is_counted
from sppruner.integrations.vllm.wire import COUNTED, FIELD, INSTRUCTION, PRUNE, ImageRequest
from sppruner.prompts import chat_text
from sppruner.spec import DENSE

Counted: TypeAlias = list[tuple[int, str]]
"""Of each image of a prompt, what it keeps and its hash as a dense image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedRequest:
    """A request as vLLM takes it."""

    prompt: Any
    """vLLM's engine input."""
    generation: SamplingParams
    """How its answer is sampled."""
    keys: tuple[str, ...]
    """The hashes of its images."""
    dense_tokens: int
    """Prompt tokens without pruning."""
    visual_end: int
    """Index behind its last visual token."""
    to_count: list[Any]
    """Its images as vLLM's processor made them, where what they keep is to be counted first."""
    counted: bool
    """Whether they have been counted."""


class RequestRenderer:
    """Renders requests one after the other: vLLM's processors are not made for several threads.

    renderer: vLLM's. context: most tokens of prompt and answer together, unpruned.
    """

    def __init__(
        self,
        renderer: Any,
        processor: Any,
        guides: FormatGuides,
        *,
        settings: PluginSettings,
        can: Capabilities,
        context: int,
    ) -> None:
        self._renderer, self._processor = renderer, processor
        self._settings, self._can, self._context = settings, can, context
        self._guides = guides
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="render")

    def start(self, request: Request, counted: Counted | None = None) -> Future[RenderedRequest]:
        """The future raises what makes a request an error row. counted: what each of its images
        keeps, for a budget that depends on what they show."""
        return self._pool.submit(self._render, request, counted)

    def close(self) -> None:
        """Ends the thread; requests that it has not started are cancelled."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def prompt(self, request: Request, counted: Counted | None = None) -> dict[str, Any]:
        """The request in the form that `LLM.generate` takes. Raises InputError for text that the
        model would read as another image, and ImageTooNarrow."""
        text = chat_text(self._processor, request.conversation, request.images)
        tokenizer = self._processor.tokenizer
        prompt: dict[str, Any] = {
            "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]
        }
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            # Said also where it is dense: vLLM's own default may be another.
            asked: dict[str, Any] = {PRUNE: request.spec.to_dict(), INSTRUCTION: request.prompt}
            if counted is not None:
                asked[COUNTED] = counted
            prompt["mm_processor_kwargs"] = asked
        return prompt

    def _render(self, request: Request, counted: Counted | None) -> RenderedRequest:
        check_characters(request, self._context)
        if request.generation.format is not None:
            self._guides.start(request.generation.format)  # vLLM finds out when it is too late
        self._settings.resolve(request.spec, self._can, counted=True)
        counting = counted is None and bool(request.images) and is_counted(request.spec)
        prompt = self.prompt(replace(request, spec=DENSE) if counting else request, counted)
        try:
            (rendered,) = self._renderer.render_cmpl([prompt])
        except Exception as error:
            raise as_input_error(error) from None
        images = list(rendered.get("mm_kwargs", {}).get("image", ()))
        places = rendered.get("mm_placeholders", {}).get("image", ())
        wanted = [ImageRequest.from_tensor(image[FIELD].data) for image in images]
        dropped = sum(image.tokens - image.kept for image in wanted)
        dense_tokens = len(rendered["prompt_token_ids"]) + dropped
        generation = fit_length(dense_tokens, request, self._context)
        return RenderedRequest(
            prompt=rendered,
            generation=generation,
            keys=tuple(rendered.get("mm_hashes", {}).get("image", ())),
            dense_tokens=dense_tokens,
            visual_end=max((place.offset + place.length for place in places), default=0),
            to_count=images if counting else [],
            counted=counted is not None,
        )


def as_input_error(error: Exception) -> Exception:
    """What vLLM's input processing raises, as the row error it is."""
    from vllm.exceptions import VLLMClientError

    cause = error.__cause__
    if isinstance(cause, SpprunerError):
        return cause
    if isinstance(error, ValueError | VLLMClientError) and not isinstance(error, SpprunerError):
        return InputError(str(error))
    return error
