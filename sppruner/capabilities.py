"""What a model can do, as adapters state it and methods check it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sppruner.decoder import first_prunable_layer
from sppruner.signals import ATTENTION, CLS_ATTENTION, CONTENT_SEED, KEYS, RECEIVED_ATTENTION
from sppruner.spec import Positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a model of a family can do, known from its config alone."""

    family: str
    """The config's `model_type`."""

    signals: frozenset[str]
    """Names of the signals its encoder gives, see `sppruner.signals`."""

    attention: Literal["cls", "received"] | None
    """What its saliency signal is: the row of a CLS token, or the attention each token receives."""

    positions: tuple[Positions, ...]
    """The position policies it can run; a model with M-RoPE only keeps."""

    hidden: bool
    """Whether its projector maps encoder states to features token by token."""

    merged: bool
    """Whether a visual token joins several of the tower's patches, as Qwen's mergers do."""

    decoder_layers: int
    """Number of decoder layers."""

    first_prunable_layer: int | None
    """The first decoder layer in front of which tokens may be pruned; None where none may."""

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
            merged=merged,
            decoder_layers=config.text_config.num_hidden_layers,
            first_prunable_layer=first_prunable_layer(config.text_config),
        )

    def __str__(self) -> str:
        stages = (
            "no stages"
            if self.first_prunable_layer is None
            else f"stages from {self.first_prunable_layer}"
        )
        return (
            f"{self.family} (signals {', '.join(sorted(self.signals)) or 'none'}; positions "
            f"{' or '.join(self.positions)}; {self.decoder_layers} decoder layers, {stages})"
        )
