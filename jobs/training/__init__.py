"""Training recipe of the embedded models: two decoupled stages side by side, then joint stages.

`space` defines a common token space; `language` trains the language model on tokens built from the
ground truth; `vision` trains the vision tower to emit such tokens (`stages` runs both, and a second
vision stage with sharper targets); `joint` trains everything on pixels; `grading`, `cue_scores` and
`card` evaluate. `families` holds the differences between the LLaVA and the Qwen2.5-VL architecture.
"""

from __future__ import annotations

__all__: list[str] = []
