"""How the embedded model is trained: two decoupled stages side by side, then a joint one.

`space` fixes a common token space; `language` teaches the language model on tokens built from the
truth; `vision` teaches the vision tower to emit such tokens; `joint` trains both on pixels.
"""

from __future__ import annotations

__all__: list[str] = []
