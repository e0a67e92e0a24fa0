"""How the embedded model is trained: two decoupled stages side by side, then joint ones.

`space` fixes a common token space; `language` teaches the language model on tokens built from the
truth; `vision` teaches the vision tower to emit such tokens (`stages` runs both, and a second,
sharper vision stage); `joint` trains everything on pixels; `evaluate`, `cues` and `card` report.
`families` holds all that differs between the LLaVA and the Qwen2.5-VL architecture.
"""

from __future__ import annotations

__all__: list[str] = []
