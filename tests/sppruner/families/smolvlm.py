"""SmolVLM: Idefics3's layout in a model class of its own."""

from __future__ import annotations

from tests.sppruner.families.idefics3 import SMOLVLM as FAMILY

__all__ = ["FAMILY"]
