"""The text of the model cards; `card` fills in the figures."""

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
It has {parameters:.2f} M parameters, was trained from scratch on two CPU cores, and makes it
possible to run and test the whole labelling service, visual-token pruning included, end to end in
seconds and without a download. **It is trained on three to nine coloured shapes and up to two
numbered signs among distractors on a textured background, and on nothing else; on photographs its
output is meaningless.**

{usage}

{image}
The prompt `describe the image.` requests a caption: objects from left to right, background, sign.

Scenes contain 3 to 9 objects, up to two signs identified by the colour of their frame, 0 to 16
distractors (strokes, dots and arcs in the objects' colours that no question is about) and one or
two textured grounds under a gradient. Two kinds of question are about context: the answer to
`nearest` is another object than the one in the question, the answer to `behind` is the ground
around that object.

## Scores

{scenes} held-out scenes (seeds from {first:,}, none trained on), {asked:,} questions, exact match
in percent. {route}
"Majority" always gives the kind's most frequent answer; "random 16" keeps a uniformly random ninth
of the visual tokens at their original positions (teacher-forced, mean of two draws); captions are
scored on scenes with at most three objects.

{table}

{saliency}
ranks objects and signs above all other patches, distractors included, with an area under the ROC
curve of {areas} ({layers}heads averaged; 0.5 is
chance). Pruners read the last layer, which produces the visual features.

## Which tokens an answer needs

Mean over the kinds, without captions, on {cue_scenes} scenes, teacher-forced, each question with
its own kept tokens at their original positions. *Oracle* uses the ground truth: first the patches
of the objects and signs that the answer depends on, then their surroundings; *context* uses it
too, but keeps the surroundings without any object or sign. *Relevance* is the best centred cosine
to a word of the question, *saliency* the attention named above; both come from the model.

{cues}

The same scenes with the library's methods at their default options, through `generate`:

{methods}

## Training

The stages of `python jobs/train_tiny.py --family {family} --output DIR` produced these weights,
with the step counts given here: 48,000 procedural scenes (seeds from 0) rendered at 192 px,
JPEG-compressed at random quality 85-97 and resized by the processor's bicubic filter. The
language model first learns to answer from *oracle* tokens built from the ground truth ({language}
steps of 16 scenes) while the vision tower learns to emit such tokens ({vision} x 16, then
{sharpen} x 32 with more weight on digits, shapes and object centres); then both train jointly on
pixels ({joint} x 24), the losses on the tokens themselves decaying to zero over the first two
thirds. Muon for matrices and AdamW for the rest, bfloat16 autocast, one seed.{history}

## Limits when comparing pruning methods on it

- Visual tokens start in the space of the word embeddings: each is trained to encode its own
  colour and position, and those around the centre of an object or sign also its shape, size or
  digit. In the last third of the joint stage only answers (and the contrast with captions) are
  trained, so the tokens may have drifted from that. Text relevance is still easier than in a real
  vision-language model, and rankings of pruning methods on this checkpoint do not predict their
  ranking on others.
- It was trained with uniformly random visual-token dropout (8 to 143 of 144 kept, in half of the
  steps), which is independent of any method. In the joint stage a question counted only if a
  patch of the centre of each object or sign it depends on was kept: a model that is trained to
  name what no token shows guesses even when a pruner keeps everything. The first quarter of the
  language-only stage kept the centres of all objects and signs and some other tokens, and its
  first 15 % used only scenes of few objects.
- The attention of the language model starts from hand-written weights: heads that find the visual
  tokens that match a word of the question, heads that attend to the previous word, and one that
  attends to the surroundings of a position.
- {contrast}
- Centres of objects and signs are at least 1.5 px (of 96) from the lines of the patch grid, and
  ambiguous questions are left out. One training seed, one checkpoint.
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
Each image is encoded as JPEG (192 px, quality 92), read by the model's processor
and answered by greedy `generate` with these bfloat16 weights."""

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
The class token was trained contrastively against captions, with the gradient through the last
  layer only, so that its last-layer attention is a usable saliency signal.""",
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
  against captions, with the gradient through that attention only, so that its pattern is a usable
  saliency signal.""",
    },
}
