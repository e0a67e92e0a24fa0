"""Text relevance of visual tokens: the similarity of each token to the words of the instruction.

Relevance is optional everywhere: a generic prompt ("Describe the image.") names nothing, and
methods then fall back to saliency or features.

Shapes: N visual tokens of one plane, T words or text chunks, D width of the common space, V width
of the vision encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from sppruner.adapters import EncodedImage
from sppruner.errors import InputError, MissingSignal
from sppruner.types import RelevancePool, RelevanceSource, VisualTokens


class UsesRelevance(Protocol):
    """The part of a selector that text relevance depends on."""

    @property
    def relevance_source(self) -> RelevanceSource:
        """Where text relevance comes from; "none" for a method that does not use it."""

    @property
    def relevance_pooling(self) -> RelevancePool:
        """How the relevances to the words of an instruction are pooled."""


# The error message for each source that is not available.
_NEEDS: Final[dict[RelevanceSource, str]] = {
    "embed": "relevance 'embed' needs Pruner(tokenizer=…), or choose relevance 'none'",
    "clip": "relevance 'clip' needs the matching CLIP text tower: Pruner(clip_text=ClipText(clip, "
    "tokenizer)), or choose relevance 'embed' or 'none'",
}

# Words that name no subject. The list is short on purpose: relevance averages over all other words.
_STOP_WORDS = frozenset(
    "a an and are as at be by can do does for from has have how in is it its many of on or please"
    " the their there they this that to was were what where which who with you your".split()
)


def instruction_words(text: str) -> str:
    """The words of an instruction that may name a subject, in lower case; empty for none."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return " ".join(word for word in words if word not in _STOP_WORDS)


class EmbeddingCosine:
    """Cosine between projected visual tokens and the language model's input embeddings of the
    instruction's words, with positive sign (OpenVINO GenAI's CDPruner takes the mean of the same
    cosines if there is no CLIP text tower).

    embed: token ids [T] → embeddings [T, D]. tokenize: text → token ids, without special tokens;
    None where only `score_words` is called.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        tokenize: Callable[[str], list[int]] | None = None,
    ) -> None:
        self._embed = embed
        # A corpus repeats one prompt, or a few, millions of times.
        self._ids = functools.lru_cache(maxsize=4096)(
            lambda instruction: tuple(tokenize(instruction_words(instruction))) if tokenize else ()
        )

    def score(self, image: VisualTokens, instruction: str, pool: RelevancePool) -> Tensor | None:
        """[N] relevance; None if the instruction has only stop words."""
        return self.score_words(image, self._ids(instruction), pool)

    def score_words(
        self, image: VisualTokens, ids: Sequence[int], pool: RelevancePool
    ) -> Tensor | None:
        """[N] relevance to the tokens of `instruction_words`; None for none."""
        if not ids:
            return None
        device = image.features_ND.device
        words_TD = self._embed(torch.tensor(ids, device=device)).float()
        words_TD = torch.nn.functional.normalize(words_TD, dim=-1)
        visual_ND = torch.nn.functional.normalize(image.features_ND.float(), dim=-1)
        cosine_NT = visual_ND @ words_TD.T
        if pool == "max":
            # Centred per word: a word slightly similar to all tokens must not be every maximum.
            return (cosine_NT - cosine_NT.mean(dim=0)).amax(dim=1)
        if pool == "top3":
            return cosine_NT.topk(min(3, cosine_NT.shape[1]), dim=1).values.mean(dim=1)
        return cosine_NT.mean(dim=1)


class ClipText:
    """Cosine in CLIP's joint space: patches through post-layernorm and visual projection, the
    instruction through the matching text tower in chunks of its context length.

    clip: a `CLIPModel` whose vision tower is the one that the VLM was built on; LLaVA checkpoints
    lack the text tower. sign: −1 is that of CDPruner's released code for LLaVA (patch tokens of
    CLIP are *less* similar to the text that names them), +1 that of FSR's paper.
    """

    def __init__(self, clip: Any, tokenizer: Any, *, sign: Literal[-1, 1] = -1) -> None:
        self._clip = clip.eval()
        self._tokenizer = tokenizer
        self._sign = sign

    @torch.no_grad()
    def score(self, image: VisualTokens, instruction: str, pool: RelevancePool) -> Tensor | None:
        """[N] relevance, pooled by `pool` over the chunks of a long instruction; None for an empty
        one."""
        if not instruction.strip():
            return None
        if image.hidden_NV is None:
            raise MissingSignal("CLIP relevance needs the encoder's hidden states")
        length = self._clip.config.text_config.max_position_embeddings
        ids: Sequence[int] = self._tokenizer(instruction, add_special_tokens=False)["input_ids"]
        if not ids:
            return None
        body = length - 2
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        weight = self._clip.visual_projection.weight
        device = weight.device
        texts = []
        for start in range(0, len(ids), body):
            chunk = torch.tensor([[begin, *ids[start : start + body], end]], device=device)
            pooled = self._clip.text_model(input_ids=chunk).pooler_output
            texts.append(self._clip.text_projection(pooled)[0])
        text_TD = torch.nn.functional.normalize(torch.stack(texts).float(), dim=-1)
        hidden_NV = image.hidden_NV.to(device, weight.dtype)
        normed_NV = self._clip.vision_model.post_layernorm(hidden_NV)
        patch_ND = self._clip.visual_projection(normed_NV).float()
        cosine_NT = torch.nn.functional.normalize(patch_ND, dim=-1) @ text_TD.T
        pooled_N = cosine_NT.amax(dim=1) if pool == "max" else cosine_NT.mean(dim=1)
        return self._sign * pooled_N.to(image.hidden_NV.device)


def require_source(source: RelevanceSource, available: Container[RelevanceSource]) -> None:
    """Raises MissingSignal unless `source` is "none" or available."""
    if source != "none" and source not in available:
        raise MissingSignal(_NEEDS[source])


class TextRelevance:
    """Adds text relevance to images, from the source that each prompt's method uses."""

    def __init__(self, words: EmbeddingCosine | None, clip: ClipText | None) -> None:
        self._scorers: dict[RelevanceSource, EmbeddingCosine | ClipText] = {}
        if words is not None:
            self._scorers["embed"] = words
        if clip is not None:
            self._scorers["clip"] = clip

    @property
    def sources(self) -> frozenset[RelevanceSource]:
        """The available sources."""
        return frozenset(self._scorers)

    def add_relevance(
        self,
        images: Sequence[EncodedImage],
        selectors: Sequence[UsesRelevance | None],
        instructions: Sequence[str],
    ) -> tuple[EncodedImage, ...]:
        """The images, with `relevance_N` in their planes if their prompt's method uses it.

        Every method's source must be available, see `require_source`. Raises InputError unless
        there is one instruction per prompt.
        """
        if len(instructions) != len(selectors):
            raise InputError(f"{len(instructions)} instructions for {len(selectors)} prompts")
        return tuple(
            self._score(image, selectors[image.row], instructions[image.row]) for image in images
        )

    def _score(
        self, image: EncodedImage, selector: UsesRelevance | None, instruction: str
    ) -> EncodedImage:
        if selector is None or selector.relevance_source == "none":
            return image
        scorer, pool = self._scorers[selector.relevance_source], selector.relevance_pooling
        planes = tuple(
            replace(plane, relevance_N=scorer.score(plane, instruction, pool))
            for plane in image.planes
        )
        return replace(image, planes=planes)
