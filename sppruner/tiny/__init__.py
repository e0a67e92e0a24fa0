"""The embedded models: small enough to ship in the repository, trained on drawn scenes.

Procedural scenes, exact questions about them, the model builders, and the recipe that trained the
weights. Importing this package is cheap; torch is only imported by its modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["TINY_MODELS"]

_WEIGHTS: Final = Path(__file__).parent / "weights"

TINY_MODELS: Final = {
    folder.name: folder for folder in sorted(_WEIGHTS.iterdir()) if folder.is_dir()
}
"""Folders of the shipped checkpoints by name, loadable with `from_pretrained`."""
