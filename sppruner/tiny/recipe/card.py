"""The model card: what the checkpoint is, how it was made, and its measured scores.

All numbers are measured here from the saved folder, on seeds that training never sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transformers import AutoProcessor, LlavaForConditionalGeneration

from sppruner.tiny.model import VISUAL_TOKENS
from sppruner.tiny.questions import majority_baseline, questions
from sppruner.tiny.recipe.evaluate import (
    JPEG_QUALITY,
    Score,
    generated,
    saliency_auc,
    teacher_forced,
)
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
in seconds and without a download. **It knows one to four coloured shapes and a numbered sign on a
textured background, and nothing else; on photographs its output is meaningless.**

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

## Scores

{scenes} held-out scenes (seeds from {first:,}, none trained on), {asked:,} questions, exact match
in percent. Each image goes through JPEG bytes (192 px, quality {quality}), `AutoProcessor`, and
greedy `generate` of these bfloat16 weights. "Majority" always gives the kind's most frequent
answer; "16 tokens" keeps a uniformly random ninth of the visual tokens at their original positions
(teacher-forced, mean of two draws); captions are asked of scenes with at most three objects.

{table}

Attention of the class token ranks objects and signs above background with an area under the ROC
curve of {areas} in layers 1 to {layers}
(heads averaged; 0.5 is chance). Pruners read the last layer, which yields the visual features.

## Training

`python jobs/train_tiny.py --output DIR` makes these weights: 48,000 procedural scenes (seeds from
0) drawn at 192 px, JPEG-compressed at random quality 85-97 and resized by the processor's bicubic
filter. The language model first learns to answer from *oracle* tokens made from the truth (3,000
steps of 16 scenes) while the vision tower learns to emit such tokens (5,000 x 16, then 1,500 x 32
with more weight on digits, shapes and object centres); then both train together on pixels
({joint} x 24). AdamW, bfloat16 autocast, one seed. About an hour on two CPU cores.{note}

## What to know before comparing pruning methods on it

- Visual tokens are trained to sit in the space of the word embeddings, and every patch of an
  object carries the whole object's colour, shape, size and position. Text relevance is therefore
  much easier, and the visual tokens more redundant, than in a real vision-language model. Rankings
  of pruning methods on this checkpoint say nothing about their ranking on others.
- It was trained with uniformly random visual-token dropout (8 to 143 of 144 kept, in half of the
  steps), so it has seen missing tokens, chosen by no method in particular. The first 30 % of the
  language-only stage, for speed, saw all objects and a few background tokens.
- The class token was trained contrastively against captions, with the gradient entering only
  through the last layer, so that its last-layer attention is a usable saliency signal.
- Object centres keep 1.5 px (of 96) from the lines of the patch grid, and questions whose answer
  would be a close call are not asked. One training seed, one checkpoint.
"""


def write_card(folder: Path, scenes: int, joint_steps: int, note: str = "") -> None:
    """Evaluate the model in `folder` and write its `README.md`.

    `note` is for what only this run can say about itself.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    full = generated(model, processor, scenes)
    draws = [teacher_forced(model, scenes, kept=_FEW, draw=draw) for draw in range(2)]
    majority = majority_baseline(
        question
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + scenes)
        for question in questions(sample_scene(seed))
    )
    areas = saliency_auc(model, min(scenes, 200))
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
        joint=f"{joint_steps:,}",
        note=f"\n\n{note}" if note else "",
    )
    (folder / "README.md").write_text(text.rstrip() + "\n")


def _table(
    full: dict[str, Score], draws: list[dict[str, Score]], majority: dict[str, float]
) -> str:
    lines = ["| kind | n | all 144 tokens | 16 tokens | majority |", "|---|---|---|---|---|"]
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
