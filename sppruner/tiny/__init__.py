"""The embedded demonstration model: a LLaVA small enough to ship in the repository.

Procedural scenes, exact questions about them, the model builder, and the recipe that trained the
weights in `MODEL_DIR`. Importing this package is cheap; torch is only imported by its modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["MODEL_DIR"]

MODEL_DIR: Final = Path(__file__).parent / "weights"
"""Folder of the shipped checkpoint, loadable with `from_pretrained`."""
