"""What the pruner needs to know of a model family. An adapter never sees a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sppruner.cost import LlavaCost
from sppruner.errors import InputError
from sppruner.types import VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """Images after the vision encoder: one VisualTokens per image in prompt order, and the
    family's own output object, which `Adapter.pack` rebuilds with fewer features."""

    images: tuple[VisualTokens, ...]
    output: Any


class Adapter(ABC):
    """One model instance of one family.

    signals: the attention signals this family can give. image_token_id: the id that stands for
    one visual token in the prompt.
    """

    family: ClassVar[str]
    signals: ClassVar[frozenset[str]]

    def __init__(self, model: Any) -> None:
        self.model = model
        self.image_token_id = int(model.config.image_token_id)

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        """Runs the vision encoder once and reads the wanted signals on the way."""

    @abstractmethod
    def pack(self, encoded: Encoded, features: Sequence[Tensor]) -> Any:
        """A fresh output object of the family's own type that holds `features`, one [K, D] tensor
        per image. Fresh on every call: beam search rewrites these objects in place."""

    @abstractmethod
    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Positions of the unpruned prompt, [R, B, S]."""

    @abstractmethod
    def cost(self) -> LlavaCost:
        """The cost model of this model's config."""

    def input_embedding(self, token_ids: Tensor) -> Tensor:
        """Rows of the language model's input embedding, for text relevance."""
        return self.model.get_input_embeddings()(token_ids)

    def placeholders(self, input_ids_BS: Tensor) -> Tensor:
        """[B, S] bool: where the prompt holds a visual token."""
        return input_ids_BS == self.image_token_id

    def assign_rows(self, counts: Sequence[int], input_ids_BS: Tensor) -> list[tuple[int, int]]:
        """(row, index in row) of each image, given each image's token count.

        Raises InputError where a prompt's placeholders and its images' tokens disagree.
        """
        wanted = self.placeholders(input_ids_BS).sum(dim=1).tolist()
        places: list[tuple[int, int]] = []
        image = 0
        for row, total in enumerate(wanted):
            held = index = 0
            while held < total and image < len(counts):
                places.append((row, index))
                held, image, index = held + counts[image], image + 1, index + 1
            if held != total:
                raise InputError(
                    f"prompt {row} has places for {total} visual tokens, its images give {held}: "
                    "is there one image placeholder per image?"
                )
        if image != len(counts):
            raise InputError(
                f"{len(counts)} images were given, the prompts have places for {image}"
            )
        return places
