"""The model card: what the checkpoint is, how it was made, and its measured scores.

All numbers are measured here from the saved folder, on seeds that training never sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from sppruner.spec import Budget, PruneSpec
from sppruner.tiny.model import VISUAL_TOKENS
from sppruner.tiny.questions import CONTEXT_KINDS, KINDS, majority_baseline, questions
from sppruner.tiny.recipe.cues import CUES, KEPT, cue_scores
from sppruner.tiny.recipe.evaluate import (
    JPEG_QUALITY,
    Score,
    generated,
    saliency_auc,
    teacher_forced,
)
from sppruner.tiny.recipe.families import LLAVA
from sppruner.tiny.scenes import HELD_OUT_SEED, sample_scene

__all__ = ["write_card"]

_FEW: Final = VISUAL_TOKENS // 9  # 16 of 144, the 11.1 % of the pruning papers

_CARD: Final = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# A tiny LLaVA for coloured shapes

A vision-language model of {parameters:.2f} M parameters in the LLaVA architecture (CLIP ViT
128 x 6, two-layer projector, Llama 128 x 4), trained from nothing on two CPU cores. It exists so
that the whole labelling service, visual-token pruning included, can be run and tested end to end
in seconds and without a download. **It knows three to nine coloured shapes and up to two numbered
signs among meaningless marks on a textured background, and nothing else; on photographs its output
is meaningless.**

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
content = [{{"type": "image"}}, {{"type": "text", "text": "how many circles are there?"}}]
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True
)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(dtype=model.dtype)
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

One image is 96 x 96 pixels and {tokens} visual tokens (patch 8), a quarter of LLaVA-1.5's 576.
`describe the image.` asks for a caption: objects from left to right, background, sign.

Scenes hold 3 to 9 objects, up to two signs named by the colour of their frame, 0 to 16 distractors
(strokes, dots and arcs in the objects' colours that no question is about) and one or two textured
grounds under a gradient. Two kinds of question are about context: `nearest` names another object
than the one that answers, `behind` asks for the ground around an object.

## Scores

{scenes} held-out scenes (seeds from {first:,}, none trained on), {asked:,} questions, exact match
in percent. Each image goes through JPEG bytes (192 px, quality {quality}), `AutoProcessor`, and
greedy `generate` of these bfloat16 weights. "Majority" always gives the kind's most frequent
answer; "random 16" keeps a uniformly random ninth of the visual tokens at their original positions
(teacher-forced, mean of two draws); captions are asked of scenes with at most three objects.

{table}

Attention of the class token ranks objects and signs above all other patches, distractors included,
with an area under the ROC curve of {areas} in layers 1 to {layers}
(heads averaged; 0.5 is chance). Pruners read the last layer, which yields the visual features.

## What a kept set needs

Mean over the kinds, without captions, on {cue_scenes} scenes. Teacher-forced, each question with
its own kept tokens at their original positions. *Oracle* knows the truth: patches of the things the
answer rests on first, then what surrounds them; *context* knows it too but takes the surroundings
without any thing. *Relevance* is the best centred cosine to a word of the question, *saliency* the
class token's attention; both come from the model.

{cues}

The same scenes with the library's methods at their default options, through `generate`:

{methods}

## Training

`python jobs/train_tiny.py --output DIR` makes these weights: 48,000 procedural scenes (seeds from
0) drawn at 192 px, JPEG-compressed at random quality 85-97 and resized by the processor's bicubic
filter. The language model first learns to answer from *oracle* tokens made from the truth
({language} steps of 16 scenes) while the vision tower learns to emit such tokens ({vision} x 16,
then {sharpen} x 32 with more weight on digits, shapes and object centres); then both train together
on pixels ({joint} x 24), the losses on the tokens themselves fading to zero over the first two
thirds. AdamW, bfloat16 autocast, one seed. About an hour and a quarter on two CPU cores.{note}

## What to know before comparing pruning methods on it

- Visual tokens start in the space of the word embeddings: each is trained to show its own colour
  and place, and those around a thing's centre also its shape, size or digit. In the last third of
  the joint stage only answers (and the class token's contrast) are trained, so the tokens may have
  drifted from that. Text relevance is still easier than in a real vision-language model, and
  rankings of pruning methods on this checkpoint say nothing about their ranking on others.
- It was trained with uniformly random visual-token dropout (8 to 143 of 144 kept, in half of the
  steps), so it has seen missing tokens, chosen by no method in particular. The first quarter of the
  language-only stage saw the centres of all things and some other tokens.
- The attention of the language model starts from weights written by hand: heads that find the
  visual tokens showing a word of the question, and heads that look at the previous word.
- The class token was trained contrastively against captions, with the gradient entering only
  through the last layer, so that its last-layer attention is a usable saliency signal.
- Centres of objects and signs keep 1.5 px (of 96) from the lines of the patch grid, and questions
  whose answer would be a close call are not asked. One training seed, one checkpoint.
"""


def write_card(folder: Path, scenes: int, steps: Mapping[str, int], note: str = "") -> None:
    """Evaluate the model in `folder` and write its `README.md`.

    `steps` are those of the four stages; `note` is for what only this run can say about itself.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    full = generated(model, processor, scenes)
    draws = [teacher_forced(LLAVA, model, scenes, kept=_FEW, draw=draw) for draw in range(2)]
    majority = majority_baseline(
        question
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + scenes)
        for question in questions(sample_scene(seed))
    )
    cue_scenes = min(scenes, 200)
    areas = saliency_auc(LLAVA, model, cue_scenes)
    text = _CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        tokens=VISUAL_TOKENS,
        scenes=scenes,
        first=HELD_OUT_SEED,
        asked=sum(score.asked for score in full.values()),
        quality=JPEG_QUALITY,
        table=_table(full, draws, majority),
        areas=" ".join(f"{area:.2f}" for area in areas),
        layers=len(areas),
        cue_scenes=cue_scenes,
        cues=_cue_table(cue_scores(LLAVA, model, cue_scenes)),
        methods=_method_table(model, processor, cue_scenes),
        note=f"\n\n{note}" if note else "",
        **{stage: f"{count:,}" for stage, count in steps.items()},
    )
    (folder / "README.md").write_text(text.rstrip() + "\n")


def _mean(scores: Mapping[str, Score], kinds: Iterable[str] = KINDS) -> float:
    """Mean accuracy over kinds, in percent."""
    accuracies = [scores[kind].accuracy for kind in kinds if kind in scores]
    return 100 * sum(accuracies) / len(accuracies)


def _cue_table(scores: Mapping[tuple[str, int], Mapping[str, Score]]) -> str:
    others = [kind for kind in KINDS if kind not in CONTEXT_KINDS]
    dense = scores["all", VISUAL_TOKENS]
    lines = [
        "| kept by | "
        + " | ".join(f"{kept} tokens" for kept in KEPT)
        + " | 16: things | context |",
        "|---" * (len(KEPT) + 3) + "|",
    ]
    for cue in CUES:
        shown = [f"{_mean(scores[cue, kept]):.1f}" for kept in KEPT]
        shown += [f"{_mean(scores[cue, _FEW], kinds):.1f}" for kinds in (others, CONTEXT_KINDS)]
        lines.append(f"| {cue} | " + " | ".join(shown) + " |")
    split = " | ".join(f"{_mean(dense, kinds):.1f}" for kinds in (others, CONTEXT_KINDS))
    lines.append(f"| all 144 | {' | '.join([f'{_mean(dense):.1f}'] * len(KEPT))} | {split} |")
    return "\n".join(lines)


def _method_table(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: int
) -> str:
    lines = ["| method | " + " | ".join(f"{kept} tokens" for kept in KEPT) + " |"]
    lines.append("|---" * (len(KEPT) + 1) + "|")
    for method in ("sppruner", "topk", "grid", "random"):
        means = []
        for kept in KEPT:
            spec = PruneSpec(method=method, budget=Budget(tokens=kept))
            means.append(_mean(generated(model, processor, scenes, spec=spec)))
        lines.append(f"| {method} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(lines)


def _table(
    full: dict[str, Score], draws: list[dict[str, Score]], majority: dict[str, float]
) -> str:
    lines = ["| kind | n | all 144 tokens | random 16 | majority |", "|---|---|---|---|---|"]
    for kind, score in full.items():
        few = sum(draw[kind].accuracy for draw in draws) / len(draws)
        shown = f"{100 * majority[kind]:.1f}" if kind in majority else "-"
        lines.append(
            f"| {kind} | {score.asked} | {100 * score.accuracy:.1f} | {100 * few:.1f} | {shown} |"
        )
    kinds = [kind for kind in full if kind in majority]
    mean = 100 * sum(full[kind].accuracy for kind in kinds) / len(kinds)
    few = 100 * sum(d[kind].accuracy for d in draws for kind in kinds) / len(kinds) / len(draws)
    base = 100 * sum(majority[kind] for kind in kinds) / len(kinds)
    lines.append(f"| mean without captions | | {mean:.1f} | {few:.1f} | {base:.1f} |")
    return "\n".join(lines)
