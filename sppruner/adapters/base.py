"""What the pruner needs to know of a model family. An adapter never sees a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sppruner.compact import Compacted, full_positions
from sppruner.cost import DecoderCost, EncoderCost, ImageShape, ModelCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.signals import ATTENTION, CLS_ATTENTION, CONTENT_SEED, KEYS, RECEIVED_ATTENTION
from sppruner.spec import Positions
from sppruner.stages import stages_from
from sppruner.types import VisualTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a model of a family can do, known from its config alone.

    signals: the signals it can give. attention: what its saliency signal is, the row of a CLS
    token or the attention each token receives. positions: the policies it can run; M-RoPE only
    keeps. hidden: whether its projector maps encoder states to features token by token. merged:
    whether a visual token joins several of the tower's patches, as Qwen's mergers do.
    decoder_layers: how many there are. stages_from: the first decoder layer in front of which
    tokens may be pruned, or None where none may.
    """

    family: str
    signals: frozenset[str]
    attention: Literal["cls", "received"] | None
    positions: tuple[Positions, ...]
    hidden: bool
    decoder_layers: int
    stages_from: int | None
    merged: bool = False

    @classmethod
    def of(
        cls,
        config: Any,
        attention: Literal["cls", "received"],
        *,
        hidden: bool = True,
        merged: bool = False,
        positions: tuple[Positions, ...] = ("keep", "renumber"),
    ) -> Capabilities:
        """Those of a family with one saliency signal, whose tower also gives keys and pixels."""
        saliency = CLS_ATTENTION if attention == "cls" else RECEIVED_ATTENTION
        return cls(
            family=config.model_type,
            signals=frozenset({ATTENTION, saliency, KEYS, CONTENT_SEED}),
            attention=attention,
            positions=positions,
            hidden=hidden,
            decoder_layers=config.text_config.num_hidden_layers,
            stages_from=stages_from(config.text_config),
            merged=merged,
        )

    def __str__(self) -> str:
        stages = "no stages" if self.stages_from is None else f"stages from {self.stages_from}"
        return (
            f"{self.family} (signals {', '.join(sorted(self.signals)) or 'none'}; positions "
            f"{' or '.join(self.positions)}; {self.decoder_layers} decoder layers, {stages})"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """One image after the encoder.

    run_ND: every feature of its placeholder run, in prompt order. planes: its selectable tokens,
    grid by grid; places: for each plane, where its tokens stand in the run. What no plane holds
    (row ends) is kept only by a budget that has room for all of the planes. deepstack: for each
    DeepStack layer, the [N, D] states of the run that the decoder adds to its tokens.
    """

    row: int
    image: int
    run_ND: Tensor
    planes: tuple[VisualTokens, ...]
    places: tuple[Tensor, ...]
    shape: ImageShape
    deepstack: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        return int(self.run_ND.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """Images in prompt order, and the family's own output object, of which `Adapter.pack` reads
    nothing but the type."""

    images: tuple[EncodedImage, ...]
    output: Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """What stays of one image: sorted indices into its run, and the features to feed there."""

    index_K: Tensor
    features_KD: Tensor


class Adapter(ABC):
    """One model instance of one family.

    families: the `model_type`s of configs it serves. image_token_id: the id that stands for one
    visual token in the prompt. placeholder_ids: that and a video's, which a model must never say:
    they would be read as visual tokens.
    """

    families: ClassVar[tuple[str, ...]]

    def __init__(self, model: Any) -> None:
        self.model = model
        self.capabilities = self.capabilities_of(model.config)
        self.image_token_id = int(model.config.image_token_id)
        video = getattr(model.config, "video_token_id", None)
        self.placeholder_ids = [self.image_token_id, *([] if video is None else [int(video)])]

    @classmethod
    @abstractmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        """What a model of this config can do. Raises UnsupportedModel for a variant that cannot be
        served."""

    @classmethod
    @abstractmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        """The cost of a config's tower and projector."""

    @classmethod
    def cost_of(cls, config: Any, *, bytes_per_value: int = 2) -> ModelCost:
        """The cost model of a config."""
        return ModelCost(
            encoder=cls.encoder_cost(config),
            decoder=DecoderCost.from_config(config.text_config, bytes_per_value=bytes_per_value),
        )

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        """Runs the vision encoder once over a processor's batch and reads the wanted signals on
        the way. Raises InputError for prompts that do not fit their images."""

    def pack(self, encoded: Encoded, kept: Sequence[Kept]) -> Any:
        """A fresh output object of the family's own type that holds what is kept of each image.
        Fresh on every call: beam search rewrites these objects in place."""
        return type(encoded.output)(pooler_output=[image.features_KD for image in kept])

    @abstractmethod
    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        """(row, shape) of each image of a processor's batch, without running the encoder."""

    def fed(self, packed: Any) -> list[Tensor]:
        """[K, D] features of each image as the model will read them from a packed output."""
        return list(packed.pooler_output)

    def prompt(self, packed: Any, compacted: Compacted) -> dict[str, Any]:
        """`generate`'s arguments for a packed and compacted batch."""
        return {"mm_encoder_outputs": {"image": packed}}

    def project(self, states_KV: Tensor) -> Tensor:
        """[K, D] features of encoder states. Raises UnsupportedModel without
        `capabilities.hidden`."""
        raise UnsupportedModel(f"{self.capabilities.family} does not project token by token")

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Positions of the unpruned prompt, [R, B, S]: one row, or four with M-RoPE."""
        return full_positions(inputs["attention_mask"])

    def language_model(self) -> Any:
        """The decoder: embeddings, `.layers`, norm; without the head."""
        return self.model.model.language_model

    def cost(self) -> ModelCost:
        size = torch.finfo(self.model.dtype).bits // 8
        return self.cost_of(self.model.config, bytes_per_value=size)

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


def raster(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows · columns, 2] coordinates of a full grid in raster order."""
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).view(-1, 2)
