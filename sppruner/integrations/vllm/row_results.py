"""From what vLLM returns to the engine's results: proof of what was pruned, and modelled cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from sppruner.cost import ModelCost
from sppruner.engine.format_guide import FormatGuide, FormatGuides
from sppruner.engine.interface import Request, Result
from sppruner.engine.token_logprobs import TokenLogprob
from sppruner.errors import EngineError, PruningHadNoEffect
from sppruner.integrations.vllm.image_reports import MOST_REPORTS, ImageReport
from sppruner.integrations.vllm.rendering import RenderedRequest


class ResultMaker:
    """Makes results of one vLLM.

    read_reports: of images by their hashes, `PruneReports.prune_reports`. layers: of the decoder.
    end_ids: of tokens that end an answer.
    """

    def __init__(
        self,
        read_reports: Callable[[list[str]], list[Any]],
        cost: ModelCost,
        guides: FormatGuides,
        *,
        layers: int,
        tokenizer: Any,
        end_ids: Collection[int],
    ) -> None:
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._read_reports, self._cost, self._layers = read_reports, cost, layers
        self._guides = guides
        # It forgets an image before the model does: a row then pays for what a cache held, and no
        # row is spared what the tower computed.
        self._charged: LRUCache[str, int] = LRUCache(MOST_REPORTS // 2)

    def make(
        self, request: Request, rendered: RenderedRequest, output: Any, seconds: float
    ) -> Result:
        """Raises PruningHadNoEffect where the model reported nothing of an image, or something
        else than entered the prompt; EngineError where nothing could be selected or vLLM gave up;
        SpecError for a structured answer that is none."""
        (answer,) = output.outputs
        if answer.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended the answer: {answer.finish_reason}")
        if (form := request.generation.format) is not None:
            _check_format(self._guides.start(form), answer.token_ids)
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
        spared = self._charge(rendered.keys, reports) and not rendered.counted
        if rendered.counted:
            whole_prefix = False  # the tower ran to count, whatever caches held behind it
        cost = self._cost.row(
            images=[report.shape for report in reports],
            layer_tokens=[prompt_tokens] * self._layers,
            prompt_tokens_dense=rendered.dense_tokens,
            new_tokens=tokens,
            pruner_flops=sum(report.selection_flops for report in reports),
            images_cached=spared and not whole_prefix,
            suffix_tokens=prompt_tokens - cached if whole_prefix else None,
        )
        return Result(
            id=request.id,
            text=answer.text.strip(),
            finish_reason=answer.finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            visual_tokens=visual,
            visual_tokens_kept=kept,
            kept_tokens=_pack(masks),
            logprobs=self._logprobs(answer, request.logprobs),
            image_shapes=tuple(report.shape for report in reports),
            seconds=seconds,
            cost=cost,
        )

    def _logprobs(self, answer: Any, alternatives: int | None) -> tuple[TokenLogprob, ...]:
        if alternatives is None or answer.logprobs is None:
            return ()

        def told(token: int, found: Any, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
            return TokenLogprob(self._tokenizer.decode([token]), float(found.logprob), top)

        tokens = []
        for token, options in zip(answer.token_ids, answer.logprobs, strict=True):
            if token not in self._end_ids:
                best = sorted(options.items(), key=lambda option: option[1].rank)[:alternatives]
                top = tuple(told(*option) for option in best)
                tokens.append(told(token, options[token], top))
        return tuple(tokens)

    def _reports(self, keys: Sequence[str]) -> list[ImageReport]:
        if not keys:
            return []
        found = self._read_reports(list(keys))
        if None in found:
            raise PruningHadNoEffect(
                f"the model reported nothing of image {found.index(None)}: what it kept is unknown"
            )
        reports = [ImageReport.from_wire(values) for values in found]
        for number, report in enumerate(reports):
            if report.failed:
                raise EngineError(f"image {number}: {report.failed}")
        return reports

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


def _check_format(guide: FormatGuide, tokens: Sequence[int]) -> None:
    """Raises SpecError for an answer, cut or complete, that its format does not allow: where its
    grammar gives up, vLLM ends it as if it were complete."""
    for token in tokens:
        guide.add(token)
        if guide.failure is not None:
            raise guide.failure


def _unpack(report: ImageReport) -> np.ndarray:
    bits = np.frombuffer(report.kept_tokens, dtype=np.uint8)
    return np.unpackbits(bits, count=report.tokens, bitorder="little").astype(bool)


def _pack(masks: Sequence[np.ndarray]) -> bytes:
    if not masks:
        return b""
    return np.packbits(np.concatenate(masks), bitorder="little").tobytes()
