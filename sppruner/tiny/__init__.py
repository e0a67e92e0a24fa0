"""The embedded models: small enough to ship in the repository, trained on drawn scenes.

The package contains procedural scenes, exact questions about them, the model builders and the
weights; `jobs.training` trains them. Importing the package is cheap: only its modules import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["EMBEDDED", "TINY_MODELS"]

_WEIGHTS: Final = Path(__file__).parent / "weights"

TINY_MODELS: Final = {
    folder.name: folder for folder in sorted(_WEIGHTS.iterdir()) if folder.is_dir()
}
"""Folders of the shipped checkpoints by name; `from_pretrained` loads them."""

EMBEDDED: Final = "tiny-llava"
"""The one that commands use without --model."""
