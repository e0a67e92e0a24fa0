"""The base class of adapters: what the pruner needs to know about a model family.

An adapter never sees a method.

Shapes: B batch rows, S prompt tokens, L packed prompt tokens, N visual tokens of an image, K kept
tokens, D width of the language model, V width of the vision encoder, P patches of an
item, R rows of positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from sppruner.capabilities import Capabilities
from sppruner.compact import Compacted, full_positions
from sppruner.cost import DecoderCost, EncoderCost, ImageShape, ModelCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.types import VisualTokens

Tensors: TypeAlias = Sequence[Tensor] | Tensor
"""Several tensors, which may be the rows of one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TowerOutput:
    """What a vision tower gave for some images, whoever ran it.

    An item is what the tower sees as one picture: an image or, in families that cut images, a tile.
    """

    runs: Tensors
    """The [N, D] features of each image's run of placeholders, in prompt order."""

    states: Tensors
    """Of each item, the [P, V] states of its patches that enter the projector, without a CLS token,
    in the tower's order."""

    signals: Sequence[Mapping[str, Tensor]]
    """Of each item, the signals of its patches that were probed, by name; empty for none."""

    pixels: Tensors
    """The pixels of each item."""

    deepstack: Sequence[Sequence[Tensor]] = ()
    """For each DeepStack layer, the [N, D] states of each image's run; empty without DeepStack."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """One image after the encoder."""

    row: int
    """Index of the prompt in the batch."""

    image: int
    """Index of the image in the prompt."""

    run_ND: Tensor
    """The features of the image's run of placeholders, in prompt order."""

    planes: tuple[VisualTokens, ...]
    """The selectable tokens, grid by grid. Tokens of no plane (row ends) are kept only if the
    budget has room after all planes."""

    places: tuple[Tensor, ...]
    """For each plane, the indices of its tokens in the run."""

    shape: ImageShape
    """The encoder's input, for the cost model."""

    deepstack: tuple[Tensor, ...] = ()
    """For each DeepStack layer, the [N, D] states of the run that the decoder adds to its tokens;
    empty without DeepStack."""

    @property
    def count(self) -> int:
        """Visual tokens of the run."""
        return int(self.run_ND.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """The encoded images of a batch."""

    images: tuple[EncodedImage, ...]
    """The images in prompt order."""

    output: Any
    """The family's output object, of which `Adapter.pack` reads only the type."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """The kept tokens of one image."""

    index_K: Tensor
    """Sorted indices into the image's run."""

    features_KD: Tensor
    """The features that the language model reads there."""


class Adapter(ABC):
    """One model instance of one family."""

    families: ClassVar[tuple[str, ...]]
    """The `model_type`s of the configs that the adapter serves."""

    def __init__(self, model: Any) -> None:
        """model: of transformers. For `images` alone, any object with its `config` will do."""
        self.model = model
        self.capabilities = self.capabilities_of(model.config)
        self.image_token_id = int(model.config.image_token_id)
        """The token id of one visual token in the prompt."""
        video = getattr(model.config, "video_token_id", None)
        self.placeholder_ids = [self.image_token_id, *([] if video is None else [int(video)])]
        """The token ids of images and videos, which must never be generated: they would be read as
        visual tokens."""

    @classmethod
    @abstractmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        """The capabilities of a model with this config. Raises UnsupportedModel for a variant that
        the adapter cannot serve."""

    @classmethod
    @abstractmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        """The cost model of a config's tower and projector."""

    @classmethod
    def cost_of(cls, config: Any, *, bytes_per_value: int = 2) -> ModelCost:
        """The cost model of a config. bytes_per_value: of the KV cache."""
        return ModelCost(
            encoder=cls.encoder_cost(config),
            decoder=DecoderCost.from_config(config.text_config, bytes_per_value=bytes_per_value),
        )

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        """Runs the vision encoder once over a processor's batch and reads `signals` from it. Raises
        InputError for prompts that do not match their images."""

    @abstractmethod
    def images(
        self,
        tower: TowerOutput,
        owners: Sequence[tuple[int, int]],
        layouts: Sequence[Any],
        signals: frozenset[str],
    ) -> tuple[EncodedImage, ...]:
        """The images, with the planes that `signals` are read into.

        owners: (row, index in row) of each image. layouts: of each image, as the family describes
        one.
        """

    def pack(self, encoded: Encoded, kept: Sequence[Kept]) -> Any:
        """A new output object of the family's type with the kept tokens of each image; new on each
        call, because beam search rewrites these objects in place."""
        return type(encoded.output)(pooler_output=[image.features_KD for image in kept])

    @abstractmethod
    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        """(row, shape) of each image of a processor's batch, without running the encoder."""

    def packed_features(self, packed: Any) -> list[Tensor]:
        """[K, D] features of each image, as the model reads them from a packed output."""
        return list(packed.pooler_output)

    def prompt(self, packed: Any, compacted: Compacted) -> dict[str, Any]:
        """Arguments of `generate` that pass the features of a packed and compacted batch."""
        return {"mm_encoder_outputs": {"image": packed}}

    def embedded_prompt(self, packed: Any, compacted: Compacted) -> dict[str, Any]:
        """The arguments of `prompt` for a model whose own encoder outputs are of a form that pruned
        images do not have: the prompt as embeddings."""
        ids_BL = compacted.input_ids_BL
        embeds_BLD = self.input_embedding(ids_BL)
        features_KD = torch.cat(self.packed_features(packed)).to(embeds_BLD)
        visual_BL1 = self.placeholders(ids_BL).unsqueeze(-1)
        return {"inputs_embeds": embeds_BLD.masked_scatter(visual_BL1, features_KD)}

    def project(self, states_KV: Tensor) -> Tensor:
        """[K, D] features of encoder states. Raises UnsupportedModel without
        `capabilities.hidden`."""
        raise UnsupportedModel(f"{self.capabilities.family} does not project token by token")

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Positions of the unpruned prompt, [R, B, S]: one row, or four with M-RoPE."""
        return full_positions(inputs["attention_mask"])

    def language_model(self) -> Any:
        """The decoder (embeddings, `.layers`, norm) without the language-model head."""
        return self.model.model.language_model

    def cost(self) -> ModelCost:
        """The model's cost model, with a KV cache of its dtype."""
        size = torch.finfo(self.model.dtype).bits // 8
        return self.cost_of(self.model.config, bytes_per_value=size)

    def input_embedding(self, token_ids: Tensor) -> Tensor:
        """Rows of the language model's input embedding, for text relevance."""
        return self.model.get_input_embeddings()(token_ids)

    def placeholders(self, input_ids_BS: Tensor) -> Tensor:
        """[B, S] bool, True for placeholders of visual tokens."""
        return input_ids_BS == self.image_token_id

    def assign_rows(self, counts: Sequence[int], input_ids_BS: Tensor) -> list[tuple[int, int]]:
        """(row, index in row) of each image, from each image's token count.

        Raises InputError if a prompt's placeholders do not match its images' tokens.
        """
        expected = self.placeholders(input_ids_BS).sum(dim=1).tolist()
        owners: list[tuple[int, int]] = []
        image = 0
        for row, total in enumerate(expected):
            tokens = index = 0
            while tokens < total and image < len(counts):
                owners.append((row, index))
                tokens, image, index = tokens + counts[image], image + 1, index + 1
            if tokens != total:
                raise InputError(
                    f"prompt {row} has places for {total} visual tokens, its images give {tokens}: "
                    "is there one image placeholder per image?"
                )
        if image != len(counts):
            raise InputError(
                f"{len(counts)} images were given, the prompts have places for {image}"
            )
        return owners


def raster(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows · columns, 2] (row, column) coordinates of a full grid in raster order."""
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).view(-1, 2)
