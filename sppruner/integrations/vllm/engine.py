"""`VllmEngine`: vLLM behind the library's `Engine` interface, in the caller's process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
from cachetools import LRUCache

from sppruner.adapters import adapter_class, capabilities
from sppruner.engine.base import check_characters, check_length
from sppruner.engine.interface import (
    Request,
    Result,
    SamplingParams,
    Update,
    error_result,
    unheard,
)
from sppruner.engine.run_all import answer_all, warm_up
from sppruner.errors import (
    EngineError,
    InputError,
    PruningHadNoEffect,
    SpecError,
    SpprunerError,
)
from sppruner.integrations.vllm.image_reports import MOST_REPORTS, ImageReport
from sppruner.integrations.vllm.settings import PluginSettings
from sppruner.integrations.vllm.vllm_options import check_options
from sppruner.integrations.vllm.wire import FIELD, INSTRUCTION, PRUNE, ImageRequest
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import dtype_on, image_backend, load_processor, resolve_model
from sppruner.prompts import chat_text
from sppruner.spec import PruneSpec

# Pixels are normalised before they reach the model, as the library's own engine has them: methods
# that draw by an image's pixels then draw the same.
_DEFAULTS: Final[dict[str, Any]] = {
    "limit_mm_per_prompt": {"image": 8, "video": 0},
    "mm_device_do_normalize": False,
}
_REPORTS: Final = "sppruner.integrations.vllm.image_reports.PruneReports"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rendered:
    """A request as vLLM takes it."""

    prompt: Any
    """vLLM's engine input."""
    keys: tuple[str, ...]
    """The hashes of its images."""
    dense_tokens: int
    """Prompt tokens without pruning."""
    visual_end: int
    """Index behind its last visual token."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Running:
    """A request that vLLM has."""

    request: Request
    rendered: _Rendered
    internal_id: str
    """vLLM's own name for it, which its scheduler uses."""
    seconds: float = 0.0
    text: str = ""
    """Of the answer, as far as it was streamed."""


class VllmEngine:
    """An `Engine` around one vLLM, which this process steps.

    model, revision: as `open_engine`. slots: most requests that are answered at the same time.
    options: of vLLM, such as tensor_parallel_size, quantization, max_model_len,
    gpu_memory_utilization. Raises UnsupportedModel for a model that vLLM or the plugin cannot run,
    SpecError for an option whose effect this engine cannot answer for.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 64,
        **options: Any,
    ) -> None:
        # In one process: a step's seconds and the rows in it are then known exactly.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.platforms import current_platform

        if slots < 1:
            raise SpecError(f"slots {slots}: give at least 1")
        check_options(options)
        if device.split(":")[0] not in ("auto", current_platform.device_type):
            raise SpecError(
                f"device {device!r}: vLLM is here built for {current_platform.device_type}"
            )
        identity = resolve_model(model, revision)
        self.model_id, self.model_revision = identity.name, identity.revision
        self._processor = load_processor(identity)
        self.image_backend = image_backend(self._processor)
        llm = LLM(
            model=identity.path,
            dtype=dtype_on(current_platform.device_type, dtype),
            max_num_seqs=slots,
            scheduling_policy="priority",
            async_scheduling=False,
            generation_config="vllm",
            worker_extension_cls=_REPORTS,
            disable_log_stats=True,
            # Its entries are lost where a request is cancelled between rendering and adding it.
            mm_processor_cache_gb=0,
            **_DEFAULTS | options,
        )
        self._llm = llm
        self._vllm = llm.llm_engine
        config = self._vllm.model_config
        self.settings = PluginSettings.of(config.hf_config)
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.slots = slots
        cache = self._vllm.vllm_config.cache_config
        self.kv_token_capacity: int | None = cache.num_gpu_blocks * cache.block_size
        self.busy_seconds = 0.0
        self.heartbeat: Callable[[], None] = unheard
        self._capabilities = capabilities(config.hf_config)
        self._cost = adapter_class(config.hf_config).cost_of(
            config.hf_config, bytes_per_value=config.dtype.itemsize
        )
        self._placeholders = placeholder_ids(config.hf_config)
        self._context = int(config.max_model_len)
        self._jpeg_scale = jpeg_scale_of(self._processor)
        # One: vLLM's processors are not made for several threads.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._closed = False
        self._tickets = count()
        self._rendering: dict[int, tuple[Request, Future[_Rendered]]] = {}
        self._running: dict[int, _Running] = {}
        # It forgets an image before the model does: a row then pays for what a cache held, and no
        # row is spared what the tower computed.
        self._charged: LRUCache[str, int] = LRUCache(MOST_REPORTS // 2)
        self._updates: list[Update] = []

    @property
    def in_flight(self) -> int:
        """See `Engine`."""
        return len(self._rendering) + len(self._running)

    def jpeg_scale(self, width: int, height: int) -> int:
        """See `Engine`."""
        return self._jpeg_scale(width, height)

    def check(self, spec: PruneSpec) -> None:
        """Raises SpecError or MissingSignal for a spec that this model cannot run in vLLM."""
        self.settings.resolve(spec, self._capabilities)

    def warm_up(self) -> None:
        """See `Engine`."""
        warm_up(self)

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; for an engine that nobody else steps."""
        results, others = answer_all(self, requests)
        self._updates[:0] = others
        return results

    def clear_caches(self) -> None:
        """See `Engine`; keys and values, and vision features. Raises EngineError while requests
        run."""
        if not self._vllm.reset_prefix_cache():
            raise EngineError("caches are cleared between requests, not while they run")
        self._vllm.reset_mm_cache()
        self._vllm.reset_encoder_cache()

    def submit(self, request: Request) -> int:
        """See `Engine`."""
        if self._closed:
            raise EngineError("the engine is closed: open another")
        ticket = next(self._tickets)
        self._rendering[ticket] = request, self._pool.submit(self._render, request)
        return ticket

    def cancel(self, ticket: int) -> bool:
        """See `Engine`."""
        if (rendering := self._rendering.pop(ticket, None)) is not None:
            rendering[1].cancel()
            return True
        if self._running.pop(ticket, None) is None:
            return False
        self._vllm.abort_request([str(ticket)])
        return True

    def step(self) -> bool:
        """See `Engine`."""
        self._add_rendered()
        if not self._running:
            if self._rendering:
                wait([f for _, f in self._rendering.values()], return_when=FIRST_COMPLETED)
            return self.in_flight > 0
        tickets = {running.internal_id: ticket for ticket, running in self._running.items()}
        started = time.perf_counter()
        outputs = self._vllm.step()
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        inside = {int(output.request_id) for output in outputs}
        inside |= {tickets[name] for name in self._scheduled() if name in tickets}
        for ticket in inside & self._running.keys():
            self._running[ticket].seconds += seconds / len(inside)
        for output in outputs:
            if (running := self._running.get(int(output.request_id))) is not None:
                self._publish(int(output.request_id), running, output)
        return self.in_flight > 0

    def poll(self) -> list[Update]:
        """See `Engine`."""
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:
        """See `Engine`."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _scheduled(self) -> list[str]:
        """vLLM's names of the requests that hold a place in its batch."""
        scheduler = self._vllm.engine_core.engine_core.scheduler
        return [request.request_id for request in scheduler.running]

    def prompt(self, request: Request) -> dict[str, Any]:
        """The request in the form that `LLM.generate` takes. Raises InputError for text that the
        model would read as another image, and ImageTooNarrow."""
        text = chat_text(self._processor, request.prompt, request.images, request.system)
        tokenizer = self._processor.tokenizer
        prompt: dict[str, Any] = {
            "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]
        }
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            # Said also where it is dense: vLLM's own default may be another.
            prompt["mm_processor_kwargs"] = {
                PRUNE: request.spec.to_dict(),
                INSTRUCTION: request.prompt,
            }
        return prompt

    def _render(self, request: Request) -> _Rendered:
        """Raises what makes a request an error row."""
        check_characters(request, self._context)
        self.settings.resolve(request.spec, self._capabilities)
        (rendered,) = self._vllm.renderer.render_cmpl([self.prompt(request)])
        images = rendered.get("mm_kwargs", {}).get("image", ())
        places = rendered.get("mm_placeholders", {}).get("image", ())
        requests = [ImageRequest.from_tensor(image[FIELD].data) for image in images]
        dropped = sum(image.tokens - image.kept for image in requests)
        dense_tokens = len(rendered["prompt_token_ids"]) + dropped
        check_length(dense_tokens, request.generation, self._context)
        return _Rendered(
            prompt=rendered,
            keys=tuple(rendered.get("mm_hashes", {}).get("image", ())),
            dense_tokens=dense_tokens,
            visual_end=max((place.offset + place.length for place in places), default=0),
        )

    def _add_rendered(self) -> None:
        """Gives vLLM what has been rendered."""
        for ticket, (request, future) in list(self._rendering.items()):
            if not future.done():
                continue
            del self._rendering[ticket]
            try:
                rendered = future.result()
                internal = self._vllm.add_request(
                    str(ticket),
                    rendered.prompt,
                    self._sampling(request.generation, stream=request.stream),
                    priority=request.priority,
                )
                self._running[ticket] = _Running(
                    request=request, rendered=rendered, internal_id=internal
                )
            except CancelledError:
                closed = EngineError("the engine was closed before it read this request")
                self._finish(ticket, error_result(request, closed))
            except Exception as error:  # the row boundary
                self._finish(ticket, error_result(request, _as_input_error(error)))

    def _sampling(self, params: SamplingParams, *, stream: bool) -> Any:
        from vllm import SamplingParams as VllmSampling
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        return VllmSampling(
            temperature=params.temperature,
            top_p=params.top_p if params.temperature else 1.0,
            seed=params.seed if params.temperature else None,
            max_tokens=params.max_new_tokens,
            stop=list(params.stop),
            # A model must not say what would be read as an image.
            logit_bias=dict.fromkeys(self._placeholders, -100.0),
            output_kind=kind,
        )

    def _publish(self, ticket: int, running: _Running, output: Any) -> None:
        (answer,) = output.outputs
        new = ""
        if running.request.stream:
            new, running.text = answer.text[len(running.text) :], answer.text
        if not output.finished:
            if new:
                self._updates.append(Update(ticket=ticket, text=new))
            return
        del self._running[ticket]
        try:
            result = self._result(running, output, answer)
        except Exception as error:
            result = error_result(running.request, error)
        self._finish(ticket, result, new)

    def _result(self, running: _Running, output: Any, answer: Any) -> Result:
        """Raises PruningHadNoEffect where the model reported nothing of an image, or something
        else than entered the prompt."""
        request, rendered = running.request, running.rendered
        reports = self._reports(rendered.keys)
        masks = [_unpack(report) for report in reports]
        kept = sum(int(mask.sum()) for mask in masks)
        visual = sum(report.tokens for report in reports)
        prompt_tokens = len(output.prompt_token_ids)
        if rendered.dense_tokens - prompt_tokens != visual - kept:
            raise PruningHadNoEffect(
                f"{request.spec.method} dropped {visual - kept} visual tokens, and the prompt is "
                f"{rendered.dense_tokens - prompt_tokens} shorter"
            )
        cached = int(output.num_cached_tokens or 0)
        whole_prefix = bool(reports) and cached >= rendered.visual_end
        tokens = len(answer.token_ids)
        cost = self._cost.row(
            images=[report.shape for report in reports],
            layer_tokens=[prompt_tokens] * self._capabilities.decoder_layers,
            prompt_tokens_dense=rendered.dense_tokens,
            new_tokens=tokens,
            pruner_flops=sum(report.selection_flops for report in reports),
            images_cached=self._charge(rendered.keys, reports) and not whole_prefix,
            suffix_tokens=prompt_tokens - cached if whole_prefix else None,
        )
        return Result(
            id=request.id,
            text=answer.text.strip(),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            visual_tokens=visual,
            visual_tokens_kept=kept,
            kept_tokens=_pack(masks),
            seconds=running.seconds,
            cost=cost,
        )

    def _reports(self, keys: Sequence[str]) -> list[ImageReport]:
        if not keys:
            return []
        # Every rank keeps the same tokens; the first speaks for all.
        found = self._llm.collective_rpc("prune_reports", args=(list(keys),))[0]
        if None in found:
            raise PruningHadNoEffect(
                f"the model reported nothing of image {found.index(None)}: what it kept is unknown"
            )
        return [ImageReport.from_wire(values) for values in found]

    def _charge(self, keys: Sequence[str], reports: Sequence[ImageReport]) -> bool:
        """Whether a cache held the features of all these images. Each run of the tower is paid by
        one row, the first to finish of those that wait for it."""
        cached = bool(keys)
        for key, report in zip(keys, reports, strict=True):
            paid = self._charged.get(key, 0)
            if report.encoded > paid:
                paid, cached = paid + 1, False
            self._charged[key] = paid
        return cached

    def _finish(self, ticket: int, result: Result, text: str = "") -> None:
        self._updates.append(Update(ticket=ticket, text=text, result=result))


def placeholder_ids(hf_config: Any) -> list[int]:
    """Token ids that stand for images and videos in a prompt."""
    names = ("image_token_id", "video_token_id")
    return sorted({int(i) for name in names if (i := getattr(hf_config, name, None)) is not None})


def _as_input_error(error: Exception) -> Exception:
    """What vLLM's input processing raises, as the row error it is."""
    cause = error.__cause__
    if isinstance(cause, SpprunerError):
        return cause
    if isinstance(error, ValueError) and not isinstance(error, SpprunerError):
        return InputError(str(error))
    return error


def _unpack(report: ImageReport) -> np.ndarray:
    bits = np.frombuffer(report.kept_tokens, dtype=np.uint8)
    return np.unpackbits(bits, count=report.tokens, bitorder="little").astype(bool)


def _pack(masks: Sequence[np.ndarray]) -> bytes:
    if not masks:
        return b""
    return np.packbits(np.concatenate(masks), bitorder="little").tobytes()
