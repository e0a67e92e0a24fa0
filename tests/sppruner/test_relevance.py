"""Text relevance follows the words of the instruction, and is None without words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from sppruner import Pruner, PruneSpec
from sppruner.adapters import adapter_for, capabilities
from sppruner.errors import InputError, MissingSignal
from sppruner.pruner import check_spec
from sppruner.relevance import ClipText, EmbeddingCosine, TextRelevance
from sppruner.selectors import selector_for
from sppruner.spec import DENSE
from sppruner.types import VisualTokens
from tests.sppruner.families import llava

WORDS = "red blue cat dog what is the of".split()
TABLE = torch.randn(len(WORDS), 32, generator=torch.Generator().manual_seed(0))


def tokenize(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def image(features_ND: Tensor, hidden_NV: Tensor | None = None) -> VisualTokens:
    n = len(features_ND)
    return VisualTokens(
        features_ND=features_ND,
        hidden_NV=hidden_NV,
        coords_N2=torch.stack([torch.zeros(n, dtype=torch.long), torch.arange(n)], dim=1),
        signals={},
    )


@pytest.fixture
def embed() -> EmbeddingCosine:
    return EmbeddingCosine(lambda ids: TABLE[ids], tokenize)


@pytest.fixture
def planted() -> VisualTokens:
    """Ten random tokens; number 7 is the embedding of "cat", larger."""
    features = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    features[7] = 5 * TABLE[WORDS.index("cat")]
    return image(features)


@pytest.mark.parametrize("pool", ["mean", "max", "top3"])
def test_the_token_that_equals_a_named_word_scores_highest(
    embed: EmbeddingCosine, planted: VisualTokens, pool: Any
) -> None:
    score = embed.score(planted, "What is the cat?", pool)
    assert score is not None
    assert int(score.argmax()) == 7
    assert score.shape == (10,)


def test_scores_equal_the_cosines_of_the_words_that_count(
    embed: EmbeddingCosine, planted: VisualTokens
) -> None:
    words = TABLE[tokenize("red blue cat dog")]
    cosines = torch.stack(
        [cosine_similarity(planted.features_ND, word[None], dim=1) for word in words], dim=1
    )
    expected = {
        "mean": cosines.mean(dim=1),
        "top3": cosines.sort(dim=1).values[:, 1:].mean(dim=1),
        "max": (cosines - cosines.mean(dim=0)).amax(dim=1),
    }
    pool: Any
    for pool, values in expected.items():
        score = embed.score(planted, "Red, blue: what is the cat of the DOG", pool)
        torch.testing.assert_close(score, values)


@pytest.mark.parametrize("instruction", ["", "  ", "?!", "What is the of"])
def test_an_instruction_without_a_subject_has_no_relevance(
    embed: EmbeddingCosine, planted: VisualTokens, instruction: str
) -> None:
    assert embed.score(planted, instruction, "mean") is None


CONTEXT = 6


@pytest.fixture(scope="module")
def clip() -> Any:
    set_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, projection_dim=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=9,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=8,
    )  # fmt: skip
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    entries = ["<pad>", "<s>", *WORDS[:7], "</s>", WORDS[7], "<unk>"]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def seen() -> VisualTokens:
    generator = torch.Generator().manual_seed(2)
    return image(torch.randn(4, 32, generator=generator), torch.randn(4, 12, generator=generator))


@torch.no_grad()
def clip_reference(clip: Any, hidden_NV: Tensor, chunks: list[list[int]]) -> Tensor:
    """Cosine of each patch and each chunk, one at a time, through CLIPModel's own text features."""
    columns = []
    for chunk in chunks:
        ids = torch.tensor([[1, *chunk, 9]])
        text = clip.get_text_features(input_ids=ids)
        text = text if isinstance(text, Tensor) else text.pooler_output
        patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden_NV))
        columns.append(cosine_similarity(patches, text, dim=1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_clip_relevance_equals_a_plain_reference_with_its_sign(
    clip: Any, tokenizer: Any, seen: VisualTokens, sign: Any
) -> None:
    assert seen.hidden_NV is not None
    expected = sign * clip_reference(clip, seen.hidden_NV, [[2, 4]])[:, 0]
    score = ClipText(clip, tokenizer, sign=sign).score(seen, "red cat", "mean")
    torch.testing.assert_close(score, expected)


def test_a_long_instruction_is_read_in_chunks_of_the_context(
    clip: Any, tokenizer: Any, seen: VisualTokens
) -> None:
    assert seen.hidden_NV is not None
    chunks = [[2, 3, 4, 5], [6, 7]]
    cosines = clip_reference(clip, seen.hidden_NV, chunks)
    relevance = ClipText(clip, tokenizer, sign=1)
    text = "red blue cat dog what is"
    torch.testing.assert_close(relevance.score(seen, text, "mean"), cosines.mean(dim=1))
    torch.testing.assert_close(relevance.score(seen, text, "max"), cosines.amax(dim=1))


def test_clip_takes_half_precision_states_of_the_vlm(
    clip: Any, tokenizer: Any, seen: VisualTokens
) -> None:
    assert seen.hidden_NV is not None
    half = image(seen.features_ND, seen.hidden_NV.bfloat16())
    score = ClipText(clip, tokenizer).score(half, "red cat", "mean")
    full = ClipText(clip, tokenizer).score(seen, "red cat", "mean")
    torch.testing.assert_close(score, full, atol=0.02, rtol=0)


def test_clip_relevance_is_none_for_empty_text_and_needs_hidden_states(
    clip: Any, tokenizer: Any, seen: VisualTokens
) -> None:
    assert ClipText(clip, tokenizer).score(seen, " ", "mean") is None
    assert ClipText(clip, lambda *_, **__: {"input_ids": []}).score(seen, "!", "mean") is None
    with pytest.raises(MissingSignal, match="hidden states"):
        ClipText(clip, tokenizer).score(image(seen.features_ND), "red", "mean")


NONE, EMBED, CLIP = (
    PruneSpec(method="sppruner", options={"relevance": source})
    for source in ("none", "embed", "clip")
)


class Scores:
    """A relevance source that scores all tokens equally."""

    def __init__(self, number: float) -> None:
        self._number = number

    def score(self, image: VisualTokens, instruction: str, pool: str) -> Tensor:
        return torch.full((image.count,), self._number * len(instruction))


def test_without_a_model_a_tokenizer_is_assumed_but_no_text_tower() -> None:
    can = capabilities(llava.build().config)
    check_spec(NONE, can)
    check_spec(EMBED, can)
    with pytest.raises(MissingSignal, match="'clip' needs the matching CLIP text tower"):
        check_spec(CLIP, can)


def test_a_pruner_accepts_only_its_own_sources() -> None:
    given: Any = Scores(1.0)
    pruner = Pruner(llava.build(), clip_text=given)
    pruner.check(NONE)
    pruner.check(CLIP)
    with pytest.raises(MissingSignal, match=r"'embed' needs Pruner\(tokenizer=…\)"):
        pruner.check(EMBED)


@torch.no_grad()
def test_each_prompt_is_scored_by_the_source_of_its_method() -> None:
    words: Any = Scores(0.5)
    clip_text: Any = Scores(0.75)
    relevance = TextRelevance(words, clip_text)
    images = adapter_for(llava.build()).encode(llava.batch([1, 1, 1, 1]), frozenset()).images
    selectors = [selector_for(spec) for spec in (CLIP, NONE, EMBED, DENSE)]
    scored = relevance.add_relevance(images, selectors, ["a", "bb", "ccc", "dddd"])
    found = [image.planes[0].relevance_N for image in scored]
    assert [None if score_N is None else sorted(set(score_N.tolist())) for score_N in found] == [
        [0.75],
        None,
        [1.5],
        None,
    ]
    with pytest.raises(InputError, match="3 instructions for 4 prompts"):
        relevance.add_relevance(images, selectors, ["a", "bb", "ccc"])
