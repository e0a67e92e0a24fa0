"""Writes the model card: what the checkpoint is, how it was trained, and its measured scores.

All figures are measured from the saved folder, on seeds that training does not use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from jobs.training.card_text import CARD, FAMILY_TEXT
from jobs.training.cue_scores import CUES, KEPT, score_cues
from jobs.training.families import Family
from jobs.training.grading import (
    KindScore,
    measure_saliency_auc,
    score_generated,
    score_teacher_forced,
)
from jobs.training.history import STAGES, History
from sppruner.evaluation.drawn_scenes import scene_questions
from sppruner.models.loading import LoadedModel, load_model
from sppruner.spec import Budget, PruneSpec
from sppruner.tiny.model import VISUAL_TOKENS
from sppruner.tiny.questions import CONTEXT_KINDS, KINDS, majority_baseline, questions
from sppruner.tiny.scenes import HELD_OUT_SEED, sample_scene

__all__ = ["write_card"]

_FEW: Final = VISUAL_TOKENS // 9  # 16 of 144, the 11.1 % of the pruning papers


def write_card(family: Family, folder: Path, scenes: int) -> None:
    """Evaluate the model in `folder` and write its `README.md`."""
    history = History.read(folder)
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16")
    model = loaded.model
    cue_scenes = min(scenes, 200)
    (full,) = score_generated(loaded, scene_questions(range(scenes)))
    draws = [score_teacher_forced(family, model, scenes, kept=_FEW, draw=draw) for draw in range(2)]
    majority = majority_baseline(
        question
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + scenes)
        for question in questions(sample_scene(seed))
    )
    areas = measure_saliency_auc(family, model, cue_scenes)
    text = CARD.format(
        **FAMILY_TEXT[family.name],
        family=family.name,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        scenes=scenes,
        first=HELD_OUT_SEED,
        asked=sum(score.total for score in full.values()),
        table=_format_kinds(full, draws, majority),
        areas=" ".join(f"{area:.2f}" for area in areas),
        layers=f"layers 1 to {len(areas)}, " if len(areas) > 1 else "",
        cue_scenes=cue_scenes,
        cues=_format_cues(score_cues(family, model, cue_scenes)),
        methods=_format_methods(loaded, cue_scenes),
        **{stage: f"{getattr(history, stage):,}" for stage in STAGES},
        history=history,
    )
    (folder / "README.md").write_text(text.rstrip() + "\n")


def _mean_accuracy(scores: Mapping[str, KindScore], kinds: Iterable[str] = KINDS) -> float:
    """Mean accuracy over kinds, in percent."""
    accuracies = [scores[kind].accuracy for kind in kinds if kind in scores]
    return 100 * sum(accuracies) / len(accuracies)


def _format_cues(scores: Mapping[tuple[str, int], Mapping[str, KindScore]]) -> str:
    others = [kind for kind in KINDS if kind not in CONTEXT_KINDS]
    dense = scores["all", VISUAL_TOKENS]
    lines = [
        "| kept by | "
        + " | ".join(f"{kept} tokens" for kept in KEPT)
        + " | 16: things | context |",
        "|---" * (len(KEPT) + 3) + "|",
    ]
    for cue in CUES:
        cells = [f"{_mean_accuracy(scores[cue, kept]):.1f}" for kept in KEPT]
        cells += [
            f"{_mean_accuracy(scores[cue, _FEW], kinds):.1f}" for kinds in (others, CONTEXT_KINDS)
        ]
        lines.append(f"| {cue} | " + " | ".join(cells) + " |")
    split = " | ".join(f"{_mean_accuracy(dense, kinds):.1f}" for kinds in (others, CONTEXT_KINDS))
    lines.append(
        f"| all 144 | {' | '.join([f'{_mean_accuracy(dense):.1f}'] * len(KEPT))} | {split} |"
    )
    return "\n".join(lines)


def _format_methods(loaded: LoadedModel, scenes: int) -> str:
    lines = ["| method | " + " | ".join(f"{kept} tokens" for kept in KEPT) + " |"]
    lines.append("|---" * (len(KEPT) + 1) + "|")
    methods = ("sppruner", "topk", "grid", "random")
    specs = [PruneSpec(method=m, budget=Budget(tokens=kept)) for m in methods for kept in KEPT]
    _, *scores = score_generated(loaded, scene_questions(range(scenes)), specs)
    means = {
        (spec.method, spec.budget.tokens): f"{_mean_accuracy(score):.1f}"
        for spec, score in zip(specs, scores, strict=True)
    }
    for method in methods:
        lines.append(f"| {method} | {' | '.join(means[method, kept] for kept in KEPT)} |")
    return "\n".join(lines)


def _format_kinds(
    full: dict[str, KindScore], draws: list[dict[str, KindScore]], majority: dict[str, float]
) -> str:
    lines = ["| kind | n | all 144 tokens | random 16 | majority |", "|---|---|---|---|---|"]
    for kind, score in full.items():
        random_few = sum(draw[kind].accuracy for draw in draws) / len(draws)
        cells = f"{100 * majority[kind]:.1f}" if kind in majority else "-"
        lines.append(
            f"| {kind} | {score.total} | {100 * score.accuracy:.1f} | {100 * random_few:.1f} "
            f"| {cells} |"
        )
    kinds = [kind for kind in full if kind in majority]
    mean = 100 * sum(full[kind].accuracy for kind in kinds) / len(kinds)
    random_few = (
        100 * sum(d[kind].accuracy for d in draws for kind in kinds) / len(kinds) / len(draws)
    )
    baseline = 100 * sum(majority[kind] for kind in kinds) / len(kinds)
    lines.append(f"| mean without captions | | {mean:.1f} | {random_few:.1f} | {baseline:.1f} |")
    return "\n".join(lines)
