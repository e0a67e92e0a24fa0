"""What is asked of one image, on its way from vLLM's processor to its model.

It travels as a tensor among the image's processed inputs, so it is where the image is: in other
processes, in caches, in any batch that the scheduler makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sppruner.spec import DENSE, PruneSpec

PRUNE: Final = "prune"
"""The key of a spec, as a dict, in a request's `mm_processor_kwargs`."""

INSTRUCTION: Final = "prune_instruction"
"""The key of the user's text, for methods that select by it."""

COUNTED: Final = "prune_counted"
"""The key of [tokens to keep, hash of the dense image] for each image of a prompt whose budget
depends on what the images show, see `counting`."""

FIELD: Final = "prune_request"
"""The name of the tensor among the inputs of an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One unbroken run of an image's placeholders; most families have one an image."""

    start: int
    """Where it starts in the image's own placeholder sequence, as shortened."""

    kept: int
    """Placeholders that stay."""

    tokens: int
    """Placeholders of the unpruned run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What is asked of one image."""

    spec: PruneSpec = DENSE
    """The request's spec."""

    words: tuple[int, ...] = ()
    """Token ids of the instruction's words; empty for methods that do not read it."""

    key: str = ""
    """The image's hash in vLLM's caches, which depends on the spec: the name of its report."""

    counted_as: str = ""
    """The dense image's hash, under which the model may hold what its tower made of it; empty for
    an image that was not counted before."""

    runs: tuple[Run, ...] = ()
    """The runs of its placeholders, in order."""

    @property
    def kept(self) -> int:
        """Placeholders in the shortened prompt, and so tokens that must leave the tower."""
        return sum(run.kept for run in self.runs)

    @property
    def tokens(self) -> int:
        """Visual tokens of the unpruned image."""
        return sum(run.tokens for run in self.runs)

    @property
    def keeps_positions(self) -> bool:
        """Whether kept tokens stay at their positions in the unpruned prompt, with gaps."""
        return not self.spec.is_dense and self.spec.positions == "keep"

    def to_tensor(self) -> Tensor:
        """uint8, 1-D."""
        record = {
            "spec": None if self.spec.is_dense else self.spec.to_dict(),
            "words": list(self.words),
            "key": self.key,
            "counted_as": self.counted_as,
            "runs": [[run.start, run.kept, run.tokens] for run in self.runs],
        }
        text = json.dumps(record, separators=(",", ":"))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> ImageRequest:
        """The inverse of `to_tensor`."""
        record = json.loads(tensor.cpu().numpy().tobytes())
        spec = record["spec"]
        return cls(
            spec=DENSE if spec is None else PruneSpec.from_dict(spec),
            words=tuple(record["words"]),
            key=record["key"],
            counted_as=record["counted_as"],
            runs=tuple(
                Run(start=start, kept=kept, tokens=tokens) for start, kept, tokens in record["runs"]
            ),
        )


def shorten(
    sequence: Sequence[int], image_token: int, split: Callable[[list[int]], list[int]]
) -> tuple[list[int], tuple[Run, ...]]:
    """An image's placeholder sequence with fewer placeholders, and its runs.

    sequence: token ids; those other than `image_token` (starts, ends, text between tiles) stay.
    split: the lengths of the unpruned runs → how much of each stays.
    """
    spans: list[list[int]] = []  # [first, length]
    for at, token in enumerate(sequence):
        if token == image_token:
            if spans and sum(spans[-1]) == at:
                spans[-1][1] += 1
            else:
                spans.append([at, 1])
    kept = split([length for _, length in spans])
    short: list[int] = []
    runs, copied = [], 0
    for (first, length), stays in zip(spans, kept, strict=True):
        short += sequence[copied:first]
        runs.append(Run(start=len(short), kept=stays, tokens=length))
        short += [image_token] * stays
        copied = first + length
    short += sequence[copied:]
    return short, tuple(runs)
