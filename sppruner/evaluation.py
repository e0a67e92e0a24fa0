"""Accuracy on held-out drawn scenes: what is asked, how it is scored, how sure we can be.

Questions of one scene share its image, so intervals resample scenes, not questions; a method is
held against dense on the same resamples (paired bootstrap).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from sppruner.engine.types import Engine, Generation, Request, Result
from sppruner.spec import PruneSpec
from sppruner.tiny.questions import (
    CAPTION_OBJECTS,
    CAPTION_PROMPT,
    Question,
    caption,
    majority_baseline,
    questions,
)
from sppruner.tiny.scenes import HELD_OUT_SEED, render, sample_scene

CAPTION = "caption"
_RESAMPLES = 2000
_JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question about one held-out scene; the image is what a user's JPEG would decode to."""

    scene: int
    kind: str
    prompt: str
    answer: str
    image: Image.Image


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def held_out(count: int, *, first_scene: int = 0) -> list[Item]:
    """At least `count` questions on held-out scenes, whole scenes only, plus a caption for every
    scene with few enough objects to have been taught one."""
    items: list[Item] = []
    asked = 0
    seed = HELD_OUT_SEED + first_scene
    while asked < count:
        scene = sample_scene(seed)
        image = _jpeg(render(scene))
        about: list[Question] = questions(scene)
        asked += len(about)
        if len(scene.objects) <= CAPTION_OBJECTS:
            about = [*about, Question(CAPTION, CAPTION_PROMPT, caption(scene))]
        items += [
            Item(scene=seed, kind=q.kind, prompt=q.text, answer=q.answer, image=image)
            for q in about
        ]
        seed += 1
    return items


def normalise(text: str | None) -> str:
    """How answers are compared: lower case, single spaces, no full stop."""
    return " ".join((text or "").lower().strip().rstrip(".").split())


def majority(items: Sequence[Item]) -> dict[str, float]:
    """Per kind, what always giving the most frequent answer would score."""
    return majority_baseline(Question(item.kind, item.prompt, item.answer) for item in items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One method at one budget. correct: one bool per item and repeat, in the items' order.

    Captions are a kind of their own and stay out of `accuracy`.
    """

    spec: PruneSpec
    retained: float
    items: Sequence[Item]
    correct: np.ndarray
    kept_share: float
    repeats: int = 1
    _by_scene: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scenes = sorted({item.scene for item in self.items})
        place = {scene: i for i, scene in enumerate(scenes)}
        right, asked = np.zeros(len(scenes)), np.zeros(len(scenes))
        per_item = self.correct.reshape(self.repeats, len(self.items)).mean(axis=0)
        for item, value in zip(self.items, per_item, strict=True):
            if item.kind != CAPTION:
                right[place[item.scene]] += value
                asked[place[item.scene]] += 1
        object.__setattr__(self, "_by_scene", (right, asked))

    @property
    def n(self) -> int:
        """Questions answered, repeats included."""
        return int(self._by_scene[1].sum()) * self.repeats

    @property
    def accuracy(self) -> float:
        right, asked = self._by_scene
        return float(right.sum() / asked.sum())

    def by_type(self) -> dict[str, float]:
        kinds = sorted({item.kind for item in self.items})
        per_item = self.correct.reshape(self.repeats, len(self.items)).mean(axis=0)
        chosen = {k: [v for i, v in zip(self.items, per_item, strict=True) if i.kind == k]
                  for k in kinds}  # fmt: skip
        return {kind: float(np.mean(values)) for kind, values in chosen.items()}

    def resampled(self, seed: int = 0) -> np.ndarray:
        """Accuracies on bootstrap resamples of scenes; the same seed draws the same scenes, so two
        scores on the same items are paired."""
        right, asked = self._by_scene
        draws = np.random.default_rng(seed).integers(0, len(right), (_RESAMPLES, len(right)))
        return right[draws].sum(axis=1) / asked[draws].sum(axis=1)

    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.resampled(), [0.025, 0.975])
        return float(low), float(high)

    def relative_to(self, dense: Score) -> tuple[float, float, float] | None:
        """Accuracy as a share of dense accuracy, with its paired 95 % interval. None where dense
        answers next to nothing: a share of zero says nothing."""
        base = dense.resampled()
        if not base.all():
            return None
        low, high = np.quantile(self.resampled() / base, [0.025, 0.975])
        return self.accuracy / dense.accuracy, float(low), float(high)


def evaluate(
    engine: Engine,
    items: Sequence[Item],
    spec: PruneSpec,
    *,
    seeds: Sequence[int] = (),
    batch_rows: int = 32,
) -> Score:
    """Asks every item under `spec`; with `seeds`, once per seed of the method's `seed` option.

    Raises RuntimeError if a row could not be answered: an evaluation has no error rows.
    """
    variants = [spec]
    if seeds:
        variants = [
            PruneSpec(
                method=spec.method,
                budget=spec.budget,
                positions=spec.positions,
                options={**spec.options, "seed": seed},
            )
            for seed in seeds
        ]
    correct: list[bool] = []
    kept = total = 0
    for variant in variants:
        for result, item in zip(_ask(engine, items, variant, batch_rows), items, strict=True):
            if result.error_code is not None:
                raise RuntimeError(f"{item.prompt!r}: {result.error_code}: {result.error_message}")
            correct.append(normalise(result.text) == normalise(item.answer))
            kept += result.visual_tokens_kept
            total += result.visual_tokens
    ratio = spec.budget.ratio if spec.budget.ratio is not None else kept / total
    return Score(
        spec=spec,
        retained=ratio,
        items=items,
        correct=np.array(correct, dtype=float),
        kept_share=kept / total,
        repeats=len(variants),
    )


def _ask(engine: Engine, items: Sequence[Item], spec: PruneSpec, rows: int) -> list[Result]:
    generation = Generation(max_new_tokens=48)
    results: dict[int, Result] = {}
    # Captions are long and answers short: batched apart, no answer waits for a caption.
    order = sorted(range(len(items)), key=lambda i: items[i].kind == CAPTION)
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        requests = [
            Request(
                id=str(i),
                prompt=items[i].prompt,
                images=(items[i].image,),
                spec=spec,
                generation=generation,
            )
            for i in chunk
        ]
        results.update(zip(chunk, engine.run(requests), strict=True))
    return [results[i] for i in range(len(items))]


def row(model: str, score: Score, dense: Score) -> dict[str, Any]:
    """One row of the table and of `evaluate.py --json`."""
    low, high = score.interval()
    relative, relative_low, relative_high = score.relative_to(dense) or (None, None, None)
    return {
        "model": model,
        "method": score.spec.method,
        "retained": score.retained,
        "kept_share": score.kept_share,
        "n": score.n,
        "accuracy": score.accuracy,
        "low": low,
        "high": high,
        "relative_to_dense": relative,
        "relative_low": relative_low,
        "relative_high": relative_high,
        "by_type": score.by_type(),
    }
