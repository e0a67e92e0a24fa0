"""Proof of what was pruned, by image: the model writes a report as it prunes, whoever drives vLLM
asks for it by the image's hash.

A request that is served from vLLM's caches never calls the tower again; its image's report is
still there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sppruner.cost import ImageShape
from sppruner.spec import PruneSpec

# Far more than the images whose tokens a KV cache can hold; a report takes some hundred bytes.
MOST_REPORTS: Final = 2**18
"""Reports that a model holds."""


MOST_AHEAD: Final = 16
"""Images whose features a model holds between counting and embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReport:
    """What entered the decoder of one image, counted on the embeddings that left the model."""

    tokens: int
    """Visual tokens of the unpruned image."""

    kept_tokens: bytes
    """One bit for each of them, as in `PruneReport.kept_tokens`."""

    selection_flops: int
    """Modelled FLOPs of selecting."""

    shape: ImageShape
    """The tower's input."""

    failed: str = ""
    """Why nothing could be selected; the first tokens entered in place of a selection."""

    encoded: int = 1
    """How often the tower has run on the image: a row for which it did not was served from a
    cache."""

    def to_wire(self) -> list[Any]:
        """Plain values, which vLLM sends between processes."""
        shape = self.shape
        return [
            self.tokens,
            self.kept_tokens,
            self.selection_flops,
            [shape.tiles, shape.rows, shape.columns, shape.tokens],
            self.failed,
            self.encoded,
        ]

    @classmethod
    def from_wire(cls, values: Sequence[Any]) -> ImageReport:
        """The inverse of `to_wire`."""
        tokens, kept_tokens, flops, (tiles, rows, columns, count), failed, encoded = values
        return cls(
            tokens=tokens,
            kept_tokens=bytes(kept_tokens),
            selection_flops=flops,
            shape=ImageShape(tiles=tiles, rows=rows, columns=columns, tokens=count),
            failed=failed,
            encoded=encoded,
        )


class ReportBook:
    """Reports by the image's hash; the one that was not used for longest is forgotten first."""

    def __init__(self, most: int = MOST_REPORTS) -> None:
        self._reports: OrderedDict[str, ImageReport] = OrderedDict()
        self._most = most

    def write(self, key: str, report: ImageReport) -> None:
        before = self._reports.get(key)
        if before is not None:
            report = replace(report, encoded=before.encoded + 1)
        self._reports[key] = report
        self._reports.move_to_end(key)
        if len(self._reports) > self._most:
            self._reports.popitem(last=False)

    def read(self, key: str) -> ImageReport | None:
        """None for an image that was never seen, or long ago."""
        report = self._reports.get(key)
        if report is not None:
            self._reports.move_to_end(key)
        return report


class PruneReports:
    """`worker_extension_cls` of a vLLM that proves what it pruned: it adds methods to the worker,
    such as the one that `LLM.collective_rpc("prune_reports", args=(hashes,))` calls."""

    model_runner: Any

    def isolate_failures(self) -> None:
        """From now on an image of which nothing can be selected fails alone, by its report."""
        self.model_runner.get_model().isolates = True

    def prune_reports(self, keys: Sequence[str]) -> list[list[Any] | None]:
        """Of each hash, `ImageReport.to_wire`; None for one without a report."""
        book: ReportBook = self.model_runner.get_model().reports
        found = [book.read(key) for key in keys]
        return [None if report is None else report.to_wire() for report in found]

    def count_tokens(
        self, images: Sequence[Any], spec: dict[str, Any], keys: Sequence[str]
    ) -> list[int]:
        """How many tokens of each image of one prompt a spec keeps. images: as vLLM's processor
        made them, unpruned. keys: their hashes."""
        from vllm.multimodal.utils import group_and_batch_mm_kwargs

        runner = self.model_runner
        inputs = []
        for image in images:
            ((_, _, one),) = group_and_batch_mm_kwargs([("image", image)], device=runner.device)
            inputs.append(one)
        counts: list[int] = runner.get_model().count_tokens(inputs, PruneSpec.from_dict(spec), keys)
        return counts
