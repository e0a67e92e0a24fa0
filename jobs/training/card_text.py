"""The words of the model cards; `card` puts in the numbers."""

from __future__ import annotations

from typing import Final

__all__ = ["CARD", "FAMILY_TEXT"]

CARD: Final = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# {title}

{architecture}
It has {parameters:.2f} M parameters, was trained from nothing on two CPU cores, and exists so
that the whole labelling service, visual-token pruning included, can be run and tested end to end
in seconds and without a download. **It knows three to nine coloured shapes and up to two numbered
signs among meaningless marks on a textured background, and nothing else; on photographs its
output is meaningless.**

{usage}

{image}
`describe the image.` asks for a caption: objects from left to right, background, sign.

Scenes hold 3 to 9 objects, up to two signs named by the colour of their frame, 0 to 16 distractors
(strokes, dots and arcs in the objects' colours that no question is about) and one or two textured
grounds under a gradient. Two kinds of question are about context: `nearest` names another object
than the one that answers, `behind` asks for the ground around an object.

## Scores

{scenes} held-out scenes (seeds from {first:,}, none trained on), {asked:,} questions, exact match
in percent. {route}
"Majority" always gives the kind's most frequent answer; "random 16" keeps a uniformly random
ninth of the visual tokens at their original positions (teacher-forced, mean of two draws);
captions are asked of scenes with at most three objects.

{table}

{saliency}
ranks objects and signs above all other patches, distractors included, with an area under the ROC
curve of {areas} ({layers}heads averaged; 0.5 is
chance). Pruners read the last layer, which yields the visual features.

## What a kept set needs

Mean over the kinds, without captions, on {cue_scenes} scenes. Teacher-forced, each question with
its own kept tokens at their original positions. *Oracle* knows the truth: patches of the things the
answer rests on first, then what surrounds them; *context* knows it too but takes the surroundings
without any thing. *Relevance* is the best centred cosine to a word of the question, *saliency* the
attention named above; both come from the model.

{cues}

The same scenes with the library's methods at their default options, through `generate`:

{methods}

## Training

The stages of `python jobs/train_tiny.py --family {family} --output DIR` made these weights, in the
numbers of steps given here: 48,000 procedural scenes (seeds from 0) drawn at 192 px,
JPEG-compressed at random quality 85-97 and resized by the processor's bicubic filter. The language
model first learns to answer from *oracle* tokens made from the truth ({language} steps of 16
scenes) while the vision tower learns to emit such tokens ({vision} x 16, then {sharpen} x 32 with
more weight on digits, shapes and object centres); then both train together on pixels
({joint} x 24), the losses on the tokens themselves fading to zero over the first two thirds. Muon
for matrices and AdamW for the rest, bfloat16 autocast, one seed.{history}

## What to know before comparing pruning methods on it

- Visual tokens start in the space of the word embeddings: each is trained to show its own colour
  and place, and those around a thing's centre also its shape, size or digit. In the last third of
  the joint stage only answers (and the contrast with captions) are trained, so the tokens may have
  drifted from that. Text relevance is still easier than in a real vision-language model, and
  rankings of pruning methods on this checkpoint say nothing about their ranking on others.
- It was trained with uniformly random visual-token dropout (8 to 143 of 144 kept, in half of the
  steps), so it has seen missing tokens, chosen by no method in particular. In the joint stage a
  question counted only where each thing it is about still showed a patch of its centre: trained to
  name what no token shows, a model guesses beyond what it sees even when a pruner kept everything.
  The first quarter of the language-only stage saw the centres of all things and some other tokens,
  its first 15 % only scenes of few objects.
- The attention of the language model starts from weights written by hand: heads that find the
  visual tokens showing a word of the question, heads that look at the previous word, and one that
  looks around a place.
- {contrast}
- Centres of objects and signs keep 1.5 px (of 96) from the lines of the patch grid, and questions
  whose answer would be a close call are not asked. One training seed, one checkpoint.
"""

_LLAVA_USAGE: Final = """\
```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "how many circles are there?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(dtype=model.dtype)
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```"""

_QWEN_USAGE: Final = """\
```python
from sppruner import Pruner, build_inputs
from sppruner.models.loading import load_model
from sppruner.spec import DENSE

loaded = load_model("tiny-qwen")
prompt = "how many circles are there?"
inputs = build_inputs(loaded.processor, [prompt], [image])
pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
answer = pruner.generate(inputs, DENSE, [prompt], max_new_tokens=48)
print(loaded.processor.batch_decode(answer.tokens_BT, skip_special_tokens=True)[0])
```"""

_ROUTE: Final = """\
Each image goes through JPEG bytes (192 px, quality 92), the model's processor, and
greedy `generate` of these bfloat16 weights."""

FAMILY_TEXT: Final[dict[str, dict[str, str]]] = {
    "llava": {
        "title": "A tiny LLaVA for coloured shapes",
        "architecture": """\
A vision-language model in the LLaVA architecture (CLIP ViT 128 x 6, two-layer projector, Llama
128 x 4).""",
        "usage": _LLAVA_USAGE,
        "image": """\
One image is 96 x 96 pixels and 144 visual tokens (patch 8), a quarter of LLaVA-1.5's 576.""",
        "route": _ROUTE,
        "saliency": "Attention of the class token",
        "contrast": """\
The class token was trained contrastively against captions, with the gradient entering only
  through the last layer, so that its last-layer attention is a usable saliency signal.""",
    },
    "qwen": {
        "title": "A tiny Qwen2.5-VL for coloured shapes",
        "architecture": """\
A vision-language model in the Qwen2.5-VL architecture (vision tower 128 x 4 with window attention
and 2 x 2 merging, language model 128 x 4 with M-RoPE).""",
        "usage": _QWEN_USAGE,
        "image": """\
A square image is 96 x 96 pixels and 144 visual tokens (patches of 4 px, merged); other aspect
ratios become about as many tokens, but training saw square images only.""",
        "route": _ROUTE,
        "saliency": "Attention received in the last block",
        "contrast": """\
There is no class token. The mean output of the last block's attention was trained contrastively
  against captions, with the gradient entering only there, so that what this attention looks at is
  a usable saliency signal.""",
    },
}
