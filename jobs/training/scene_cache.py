"""The training set on disk: rendered scenes, patch labels and tokenized questions.

Images are processed like users' images: rendered at 192 px, JPEG-compressed at random quality,
decoded and resized to 96 px with the processor's bicubic filter. Arrays are memory-mapped, so two
training processes share one copy.
"""

from __future__ import annotations

import io
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from sppruner.tiny.layout import COLORS, GRID, Points, Scene, mark_outline, outline
from sppruner.tiny.model import IMAGE_SIDE, PATCH_SIDE, VISUAL_TOKENS, WORDS, build_tokenizer
from sppruner.tiny.questions import (
    CAPTION_OBJECTS,
    CAPTION_PROMPT,
    COLUMNS,
    KINDS,
    ROWS,
    caption,
    questions,
)
from sppruner.tiny.scenes import MOST_OBJECTS, MOST_SIGNS, encode_scene, sample_scene

__all__ = [
    "BARE",
    "CAPTION_KIND",
    "ENTITIES",
    "GROUNDS",
    "PATCH_CENTERS",
    "SIGNS",
    "SceneCache",
    "assign_patches",
    "build_cache",
    "build_scene_table",
    "map_entity_bits",
    "render_input",
]

Array = npt.NDArray[Any]

SIGNS: Final = MOST_OBJECTS
GROUNDS: Final = SIGNS + MOST_SIGNS
ENTITIES: Final = GROUNDS + 2
"""Rows of the per-scene tables: objects first, signs from `SIGNS` on, grounds from `GROUNDS` on."""
BARE: Final = 255
"""Colour index of a patch without a distractor."""

CAPTION_KIND: Final = len(KINDS)
_MIN_COVER: Final = 12  # of a patch's 64 pixels, for the patch to belong to an object
_MIN_STAIN: Final = 8  # the same for a distractor
_CORE: Final = 0.71 / GRID  # distance of patch centres that show what the entity is
_SHARD: Final = 500
_LABELS: Final = ("owners", "stains", "cores", "anchors", "words", "centers")
_FIELDS: Final = ("images", *_LABELS, "tokens", "spans", "evidence", "starts")


_PLACES: Final = (np.arange(GRID) + 0.5) / GRID
PATCH_CENTERS: Final[Array] = np.stack(
    [np.tile(_PLACES, GRID), np.repeat(_PLACES, GRID)], 1
).astype(np.float32)
"""(144, 2) x and y of each patch's centre, as fractions of the side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneCache:
    """Arrays of N scenes with seeds 0..N-1 and Q tokenized questions in total; the field names are
    the file names."""

    images: Array
    """(N, 96, 96, 3) uint8."""
    owners: Array
    """(N, 144) uint8: the entity that a patch shows."""
    stains: Array
    """(N, 144) uint8: colour of the distractor on a patch, or `BARE`."""
    cores: Array
    """(N, 144) bool: patches around the centre of an object or sign."""
    anchors: Array
    """(N, 144) bool: the one patch that contains an object's centre."""
    words: Array
    """(N, ENTITIES, len(WORDS)) bool: words that are true of an entity."""
    centers: Array
    """(N, ENTITIES, 2) float32: x and y of an entity's centre."""
    tokens: Array
    """Flat uint8: question, <assistant>, answer, </s>."""
    spans: Array
    """(Q, 4) int64: first token, length, answer length with </s>, kind."""
    evidence: Array
    """(Q,) int64: bit e is set if the question is about entity e."""
    starts: Array
    """(N + 1,) int64: first question of each scene."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, folder: Path) -> SceneCache:
        """Maps the arrays of a folder that `build_cache` has completed."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FIELDS})


def render_input(scene: Scene, quality: int) -> Image.Image:
    """The scene as the processor's resize yields it: 96 px, from a 192 px JPEG."""
    image = Image.open(io.BytesIO(encode_scene(scene, 192, quality=quality)))
    return image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)


def assign_patches(scene: Scene) -> Array:
    """(144,) uint8: the object or sign that covers a patch, otherwise its ground."""
    cover = np.zeros((ENTITIES, VISUAL_TOKENS), dtype=np.int64)
    for index, item in enumerate(scene.objects):
        cover[index] = _count_covered(outline(item))
    for index, sign in enumerate(scene.signs):
        low_x, high_x = sign.x - sign.side / 2, sign.x + sign.side / 2
        low_y, high_y = sign.y - sign.side / 2, sign.y + sign.side / 2
        corners = [(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)]
        cover[SIGNS + index] = _count_covered(corners)
    for patch, (x, y) in enumerate(PATCH_CENTERS):
        cover[GROUNDS + scene.ground_at(x, y), patch] = _MIN_COVER - 1
    return cover.argmax(0).astype(np.uint8)


def _find_stains(scene: Scene) -> Array:
    stains = np.full(VISUAL_TOKENS, BARE, dtype=np.uint8)
    for mark in scene.marks:
        stains[_count_covered(mark_outline(mark)) >= _MIN_STAIN] = COLORS.index(mark.color)
    return stains


def _count_covered(corners: Points) -> Array:
    """Number of pixels of each patch inside a polygon."""
    mask = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
    ImageDraw.Draw(mask).polygon([(x * IMAGE_SIDE, y * IMAGE_SIDE) for x, y in corners], fill=1)
    cells = np.asarray(mask, dtype=np.int64).reshape(GRID, PATCH_SIDE, GRID, PATCH_SIDE)
    return cells.sum(axis=(1, 3)).reshape(-1)


def _label_patches(scene: Scene) -> tuple[Array, ...]:
    """The arrays of `_LABELS`, in that order."""
    owners = assign_patches(scene)
    cores = np.zeros(VISUAL_TOKENS, dtype=bool)
    anchors = np.zeros(VISUAL_TOKENS, dtype=bool)
    words = np.zeros((ENTITIES, len(WORDS)), dtype=bool)
    centers = np.zeros((ENTITIES, 2), dtype=np.float32)

    def describe(entity: int, x: float, y: float, *true: str) -> int:
        for word in (*true, ROWS[int(y * 3)], COLUMNS[int(x * 3)]):
            words[entity, WORDS.index(word)] = True
        centers[entity] = x, y
        anchor = int(y * GRID) * GRID + int(x * GRID)
        owners[anchor] = entity
        near = np.hypot(PATCH_CENTERS[:, 0] - x, PATCH_CENTERS[:, 1] - y) < _CORE
        cores[near & (owners == entity)] = True
        cores[anchor] = True
        return anchor

    for index, item in enumerate(scene.objects):
        anchors[describe(index, item.x, item.y, item.color, item.shape, item.size)] = True
    for index, sign in enumerate(scene.signs, start=SIGNS):
        describe(index, sign.x, sign.y, "sign", sign.digit, sign.color)
    for index, ground in enumerate(scene.grounds, start=GROUNDS):
        for word in (ground.color, ground.texture):
            words[index, WORDS.index(word)] = True
    return owners, _find_stains(scene), cores, anchors, words, centers


def map_entity_bits(scene: Scene) -> dict[str, int]:
    """One bit per object and sign, by the name that questions use; grounds have none."""
    bits = {item.name: 1 << index for index, item in enumerate(scene.objects)}
    return bits | {
        f"{sign.color} sign": 1 << SIGNS + index for index, sign in enumerate(scene.signs)
    }


def _build_shard(first: int, count: int, quality: int | None = None) -> dict[str, Array]:
    """Arrays of `count` scenes; without `quality` the JPEG quality is random per seed."""
    tokenizer = build_tokenizer()
    rows: dict[str, list[Array]] = {name: [] for name in ("images", *_LABELS)}
    prompts: list[str] = []
    answers: list[str] = []
    kinds: list[int] = []
    evidence: list[int] = []
    questions_per_scene: list[int] = []
    for seed in range(first, first + count):
        scene = sample_scene(seed)
        random_quality = random.Random(f"jpeg:{seed}").randint(85, 97)
        rows["images"].append(np.asarray(render_input(scene, quality or random_quality)))
        for name, value in zip(_LABELS, _label_patches(scene), strict=True):
            rows[name].append(value)
        named = map_entity_bits(scene)
        texts = [
            (q.text, q.answer, KINDS.index(q.kind), sum(named.get(name, 0) for name in q.about))
            for q in questions(scene)
        ]
        if len(scene.objects) <= CAPTION_OBJECTS:
            texts.append((CAPTION_PROMPT, caption(scene), CAPTION_KIND, sum(named.values())))
        prompts += [text + "<assistant>" for text, _, _, _ in texts]
        answers += [answer + "</s>" for _, answer, _, _ in texts]
        kinds += [kind for _, _, kind, _ in texts]
        evidence += [bits for _, _, _, bits in texts]
        questions_per_scene.append(len(texts))
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    lengths = [len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    flat = [i for p, a in zip(prompt_ids, answer_ids, strict=True) for i in (*p, *a)]
    firsts = np.cumsum([0, *lengths[:-1]])
    spans = np.stack([firsts, lengths, [len(a) for a in answer_ids], kinds], axis=1)
    return {
        **{name: np.stack(value) for name, value in rows.items()},
        "tokens": np.array(flat, dtype=np.uint8),
        "spans": spans.astype(np.int64),
        "evidence": np.array(evidence, dtype=np.int64),
        "starts": np.array(questions_per_scene, dtype=np.int64),
    }


def build_scene_table(first: int, count: int, quality: int) -> SceneCache:
    """The arrays of `count` scenes from `first` on, in memory, at one JPEG quality."""
    arrays = _build_shard(first, count, quality)
    starts = np.concatenate([[0], np.cumsum(arrays.pop("starts"))])
    return SceneCache(**arrays, starts=starts)


def build_cache(folder: Path, scenes: int) -> SceneCache:
    """Renders `scenes` scenes on all cores, or reuses a complete cache of exactly that size."""
    done = folder / "DONE"
    if done.exists() and done.read_text() == str(scenes):
        return SceneCache.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    firsts = range(0, scenes, _SHARD)
    counts = [min(_SHARD, scenes - first) for first in firsts]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shards = list(pool.map(_build_shard, firsts, counts))
    offset = 0
    for shard in shards:
        shard["spans"][:, 0] += offset
        offset += len(shard["tokens"])
    for name in _FIELDS:
        values = np.concatenate([shard[name] for shard in shards])
        if name == "starts":
            values = np.concatenate([[0], np.cumsum(values)])
        np.save(folder / f"{name}.npy", values)
    done.write_text(str(scenes))
    return SceneCache.load(folder)
