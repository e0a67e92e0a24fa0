"""`VllmEngine`: vLLM behind the library's `Engine` interface, in the caller's process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Final

from sppruner.adapters import adapter_class, capabilities
from sppruner.engine.answer_rules import AnswerRules
from sppruner.engine.format_guide import format_guides
from sppruner.engine.interface import (
    EngineLoad,
    Request,
    Result,
    Update,
    error_result,
    unheard,
)
from sppruner.engine.run_all import answer_all, warm_up
from sppruner.errors import (
    EngineError,
    SpecError,
)
from sppruner.integrations.vllm.image_reports import MOST_AHEAD
from sppruner.integrations.vllm.rendering import RenderedRequest, RequestRenderer, as_input_error
from sppruner.integrations.vllm.row_results import ResultMaker
from sppruner.integrations.vllm.settings import PluginSettings
from sppruner.integrations.vllm.vllm_options import check_options, lora_options
from sppruner.integrations.vllm.vllm_sampling import vllm_sampling
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import (
    dtype_on,
    image_backend,
    load_generation_config,
    load_processor,
    resolve_model,
)
from sppruner.spec import PruneSpec

_WAIT_SECONDS: Final = 0.001
# Pixels are normalised before they reach the model, as the library's own engine has them: methods
# that draw by an image's pixels then draw the same.
_DEFAULTS: Final[dict[str, Any]] = {
    "limit_mm_per_prompt": {"image": 8, "video": 0},
    "mm_device_do_normalize": False,
    # As the library's own engine follows formats: by the same library, white space left out.
    "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
}
_REPORTS: Final = "sppruner.integrations.vllm.image_reports.PruneReports"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rendering:
    """A request that is brought into vLLM's form."""

    request: Request
    future: Future[RenderedRequest]
    seconds: float = 0.0
    """In which its images were counted."""
    ahead: int = 0
    """Images that the model holds for it, counted."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Running:
    """A request that vLLM has."""

    request: Request
    rendered: RenderedRequest
    internal_id: str
    """vLLM's own name for it, which its scheduler uses."""
    seconds: float = 0.0
    ahead: int = 0
    """Images that the model holds for it, counted and not embedded yet."""
    text: str = ""
    """Of the answer, as far as it was streamed."""


class VllmEngine:
    """An `Engine` around one vLLM, which this process steps.

    model, revision: as `open_engine`. slots: most requests that are answered at the same time.
    lora: folder of an adapter of the decoder, for every request. options: of vLLM, such as
    tensor_parallel_size, quantization, max_model_len, gpu_memory_utilization. Raises
    UnsupportedModel for a model that vLLM or the plugin cannot run, SpecError for an option whose
    effect this engine cannot answer for.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 64,
        lora: str | None = None,
        **options: Any,
    ) -> None:
        # In one process: a step's seconds and the rows in it are then known exactly.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        if slots < 1:
            raise SpecError(f"slots {slots}: give at least 1")
        check_options(options)
        if lora is not None:
            options = lora_options(lora) | options
        if device.split(":")[0] not in ("auto", current_platform.device_type):
            raise SpecError(
                f"device {device!r}: vLLM is here built for {current_platform.device_type}"
            )
        identity = resolve_model(model, revision)
        self.model_id, self.model_revision = identity.name, identity.revision
        self._processor = load_processor(identity)
        self._rules = AnswerRules.of(load_generation_config(identity))
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
        self._lora = None if lora is None else LoRARequest("lora", 1, lora)
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
        cost = adapter_class(config.hf_config).cost_of(
            config.hf_config, bytes_per_value=config.dtype.itemsize
        )
        llm.collective_rpc("isolate_failures")
        guides = format_guides(self._processor.tokenizer, config.hf_config)
        self._results = ResultMaker(
            partial(_ask_worker, llm, "prune_reports"),
            cost,
            guides,
            layers=self._capabilities.decoder_layers,
            tokenizer=self._processor.tokenizer,
            end_ids=self._rules.end_ids,
        )
        self._renderer = RequestRenderer(
            self._vllm.renderer,
            self._processor,
            guides,
            settings=self.settings,
            can=self._capabilities,
            context=int(config.max_model_len),
        )
        self._placeholders = placeholder_ids(config.hf_config)
        self._jpeg_scale = jpeg_scale_of(self._processor)
        self._closed = False
        self._tickets = count()
        self._rendering: dict[int, _Rendering] = {}
        self._running: dict[int, _Running] = {}
        self._updates: list[Update] = []

    @property
    def in_flight(self) -> int:
        """See `Engine`."""
        return len(self._rendering) + len(self._running)

    @property
    def load(self) -> EngineLoad:
        """See `Engine`."""
        scheduler = self._vllm.engine_core.engine_core.scheduler
        running = min(len(scheduler.running), self.in_flight)
        return EngineLoad(
            running=running,
            waiting=self.in_flight - running,
            kv_usage=float(scheduler.kv_cache_manager.usage),
        )

    def jpeg_scale(self, width: int, height: int) -> int:
        """See `Engine`."""
        return self._jpeg_scale(width, height)

    def check(self, spec: PruneSpec) -> None:
        """Raises SpecError or MissingSignal for a spec that this model cannot run in vLLM."""
        self.settings.resolve(spec, self._capabilities, counted=True)

    def warm_up(self) -> None:
        """See `Engine`."""
        warm_up(self)

    def run(self, requests: list[Request]) -> list[Result]:
        """Answers every request, in order; for an engine that nobody else steps."""
        results, others = answer_all(self, requests)
        self._updates[:0] = others
        return results

    def clear_caches(self) -> None:
        """See `Engine`; keys and values, and vision features. Requests that run begin again, and
        go on where they were."""
        if not self._vllm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM still holds blocks of its KV cache")
        self._vllm.reset_mm_cache()
        self._vllm.reset_encoder_cache()

    def submit(self, request: Request) -> int:
        """See `Engine`."""
        if self._closed:
            raise EngineError("the engine is closed: open another")
        ticket = next(self._tickets)
        self._rendering[ticket] = _Rendering(request=request, future=self._renderer.start(request))
        return ticket

    def cancel(self, ticket: int) -> bool:
        """See `Engine`."""
        if (rendering := self._rendering.pop(ticket, None)) is not None:
            rendering.future.cancel()
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
                futures = [rendering.future for rendering in self._rendering.values()]
                wait(futures, return_when=FIRST_COMPLETED)
            return self.in_flight > 0
        tickets = {running.internal_id: ticket for ticket, running in self._running.items()}
        started = time.perf_counter()
        outputs = self._vllm.step()
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        inside = {int(output.request_id) for output in outputs}
        inside |= {tickets[name] for name in self._scheduled() if name in tickets}
        inside &= self._running.keys()
        for ticket in inside:
            self._running[ticket].ahead = 0
        if not inside:  # all wait, such as for a grammar to be compiled
            inside = set(self._running)
            time.sleep(_WAIT_SECONDS)
        for ticket in inside:
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
        self._renderer.close()

    def _scheduled(self) -> list[str]:
        """vLLM's names of the requests that hold a place in its batch."""
        scheduler = self._vllm.engine_core.engine_core.scheduler
        return [request.request_id for request in scheduler.running]

    def prompt(self, request: Request) -> dict[str, Any]:
        """See `RequestRenderer.prompt`."""
        return self._renderer.prompt(request)

    def _add_rendered(self) -> None:
        """Gives vLLM what has been rendered."""
        for ticket, rendering in list(self._rendering.items()):
            if not rendering.future.done():
                continue
            del self._rendering[ticket]
            request = rendering.request
            try:
                rendered = rendering.future.result()
                if rendered.to_count:
                    waits = self._is_full(len(rendered.to_count))
                    self._rendering[ticket] = rendering if waits else self._count(request, rendered)
                else:
                    self._running[ticket] = self._add(ticket, rendering, rendered)
            except CancelledError:
                closed = EngineError("the engine was closed before it read this request")
                self._finish(ticket, error_result(request, closed))
            except Exception as error:  # the row boundary
                self._finish(ticket, error_result(request, error))

    def _add(self, ticket: int, rendering: _Rendering, rendered: RenderedRequest) -> _Running:
        """Raises InputError for what vLLM refuses."""
        request = rendering.request
        try:
            sampling = vllm_sampling(
                rendered.generation,
                self._rules,
                banned=self._placeholders,
                stream=request.stream,
                logprobs=request.logprobs,
            )
            internal = self._vllm.add_request(
                str(ticket),
                rendered.prompt,
                sampling,
                lora_request=self._lora,
                priority=request.priority,
            )
        except Exception as error:
            raise as_input_error(error) from None
        return _Running(
            request=request,
            rendered=rendered,
            internal_id=internal,
            seconds=rendering.seconds,
            ahead=rendering.ahead,
        )

    def _is_full(self, images: int) -> bool:
        """Whether the model holds so much of images that were counted that these must wait."""
        held = sum(one.ahead for one in self._rendering.values())
        held += sum(one.ahead for one in self._running.values())
        return held > 0 and held + images > MOST_AHEAD

    def _count(self, request: Request, rendered: RenderedRequest) -> _Rendering:
        """A budget that depends on what the images show: the tower runs first, and the model holds
        what it made until the prompt comes."""
        self.heartbeat()
        started = time.perf_counter()
        arguments = (rendered.to_count, request.spec.to_dict(), list(rendered.keys))
        counts = _ask_worker(self._llm, "count_tokens", *arguments)
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        counted = list(zip(counts, rendered.keys, strict=True))
        future = self._renderer.start(request, counted)
        return _Rendering(
            request=request, future=future, seconds=seconds, ahead=len(rendered.to_count)
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
            result = self._results.make(running.request, running.rendered, output, running.seconds)
        except Exception as error:
            result = error_result(running.request, error)
        self._finish(ticket, result, new)

    def _finish(self, ticket: int, result: Result, text: str = "") -> None:
        self._updates.append(Update(ticket=ticket, text=text, result=result))


def _ask_worker(llm: Any, method: str, *arguments: Any) -> list[Any]:
    """Every rank answers the same; the first speaks for all."""
    answer: list[Any] = llm.collective_rpc(method, args=arguments)[0]
    return answer


def placeholder_ids(hf_config: Any) -> list[int]:
    """Token ids that stand for images and videos in a prompt."""
    names = ("image_token_id", "video_token_id")
    return sorted({int(i) for name in names if (i := getattr(hf_config, name, None)) is not None})
