"""The training set on disk: rendered scenes, patch labels and tokenized questions.

Images take the path users' images take: drawn at 192 px, JPEG-compressed (random quality), decoded
and resized by the processor's own bicubic filter to 96 px. Every array is memory-mapped, so two
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
from sppruner.tiny.scenes import Scene, outline, render, sample_scene

__all__ = [
    "BACKGROUND",
    "CAPTION_KIND",
    "ENTITIES",
    "SIGN",
    "SceneCache",
    "build_cache",
    "decoded",
    "patch_owners",
    "scene_table",
]

Array = npt.NDArray[Any]

OBJECTS: Final = 4
SIGN: Final = 4
BACKGROUND: Final = 5
ENTITIES: Final = 6
"""Rows of the per-scene tables: up to four objects, the sign, the background."""

CAPTION_KIND: Final = len(KINDS)
_SIDE: Final = IMAGE_SIDE // PATCH_SIDE
_MIN_COVER: Final = 10  # of a patch's 64 pixels, to count as part of an object
_SHARD: Final = 500
_FIELDS: Final = ("images", "owners", "anchors", "words", "centers", "tokens", "spans", "starts")


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneCache:
    """Arrays of N scenes with seeds 0..N-1 and Q tokenized questions in all."""

    images: Array  # (N, 96, 96, 3) uint8
    owners: Array  # (N, 144) uint8: which entity a patch shows
    anchors: Array  # (N, 144) bool: patches that hold an object's centre
    words: Array  # (N, ENTITIES, len(WORDS)) bool: words true of an entity
    centers: Array  # (N, ENTITIES, 2) float32: x, y of an entity's centre
    tokens: Array  # flat uint8: question, <assistant>, answer, </s>
    spans: Array  # (Q, 4) int64: first token, length, answer length with </s>, kind
    starts: Array  # (N + 1,) int64: first question of each scene

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, folder: Path) -> SceneCache:
        """Map the arrays of a folder that `build_cache` has finished."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FIELDS})


def decoded(scene: Scene, quality: int) -> Image.Image:
    """The scene as the processor sees it after its resize: 96 px, through a 192 px JPEG."""
    buffer = io.BytesIO()
    render(scene, 192).save(buffer, "JPEG", quality=quality)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    return image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)


def patch_owners(scene: Scene) -> Array:
    """(144,) uint8: the entity that covers most of each patch, `BACKGROUND` where none does."""
    cover = np.zeros((ENTITIES, VISUAL_TOKENS), dtype=np.int64)
    for index, item in enumerate(scene.objects):
        corners = [(x * IMAGE_SIDE, y * IMAGE_SIDE) for x, y in outline(item)]
        cover[index] = _covered(corners)
    if scene.sign is not None:
        half = scene.sign.side / 2
        low_x, high_x = (scene.sign.x - half) * IMAGE_SIDE, (scene.sign.x + half) * IMAGE_SIDE
        low_y, high_y = (scene.sign.y - half) * IMAGE_SIDE, (scene.sign.y + half) * IMAGE_SIDE
        cover[SIGN] = _covered([(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)])
    cover[BACKGROUND] = _MIN_COVER - 1
    return cover.argmax(0).astype(np.uint8)


def _covered(corners: list[tuple[float, float]]) -> Array:
    """Pixels of each patch inside a polygon."""
    mask = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    cells = np.asarray(mask, dtype=np.int64).reshape(_SIDE, PATCH_SIDE, _SIDE, PATCH_SIDE)
    return cells.sum(axis=(1, 3)).reshape(-1)


def _labels(scene: Scene) -> dict[str, Array]:
    owners = patch_owners(scene)
    anchors = np.zeros(VISUAL_TOKENS, dtype=bool)
    words = np.zeros((ENTITIES, len(WORDS)), dtype=bool)
    centers = np.zeros((ENTITIES, 2), dtype=np.float32)

    def describe(entity: int, x: float, y: float, *true: str) -> None:
        for word in (*true, ROWS[int(y * 3)], COLUMNS[int(x * 3)]):
            words[entity, WORDS.index(word)] = True
        centers[entity] = x, y

    for index, item in enumerate(scene.objects):
        describe(index, item.x, item.y, item.color, item.shape, item.size)
        center = int(item.y * _SIDE) * _SIDE + int(item.x * _SIDE)
        owners[center], anchors[center] = index, True
    if scene.sign is not None:
        describe(SIGN, scene.sign.x, scene.sign.y, "sign", scene.sign.digit)
    for word in (scene.background, scene.texture):
        words[BACKGROUND, WORDS.index(word)] = True
    return {"owners": owners, "anchors": anchors, "words": words, "centers": centers}


def _shard(first: int, count: int, quality: int | None = None) -> dict[str, Array]:
    """Arrays of some scenes; JPEG quality random per seed unless given."""
    tokenizer = build_tokenizer()
    rows: dict[str, list[Array]] = {name: [] for name in _FIELDS[:5]}
    prompts: list[str] = []
    answers: list[str] = []
    kinds: list[int] = []
    asked_per_scene: list[int] = []
    for seed in range(first, first + count):
        scene = sample_scene(seed)
        drawn = random.Random(f"jpeg:{seed}").randint(85, 97)
        rows["images"].append(np.asarray(decoded(scene, quality or drawn)))
        for name, value in _labels(scene).items():
            rows[name].append(value)
        asked = [(q.text, q.answer, KINDS.index(q.kind)) for q in questions(scene)]
        if len(scene.objects) <= CAPTION_OBJECTS:
            asked.append((CAPTION_PROMPT, caption(scene), CAPTION_KIND))
        prompts += [text + "<assistant>" for text, _, _ in asked]
        answers += [answer + "</s>" for _, answer, _ in asked]
        kinds += [kind for _, _, kind in asked]
        asked_per_scene.append(len(asked))
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
        "starts": np.array(asked_per_scene, dtype=np.int64),
    }


def scene_table(first: int, count: int, quality: int) -> SceneCache:
    """The same arrays in memory for scenes `first`.. at one JPEG quality, for evaluation."""
    arrays = _shard(first, count, quality)
    starts = np.concatenate([[0], np.cumsum(arrays.pop("starts"))])
    return SceneCache(**arrays, starts=starts)


def build_cache(folder: Path, scenes: int) -> SceneCache:
    """Render `scenes` scenes on every core, or reuse a finished cache of exactly that size."""
    done = folder / "DONE"
    if done.exists() and done.read_text() == str(scenes):
        return SceneCache.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    firsts = range(0, scenes, _SHARD)
    counts = [min(_SHARD, scenes - first) for first in firsts]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shards = list(pool.map(_shard, firsts, counts))
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
