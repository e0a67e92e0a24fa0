"""SmolVLM: Idefics3's layout with its own model class."""

from __future__ import annotations

from tests.sppruner.families.idefics3 import SMOLVLM as FAMILY

__all__ = ["FAMILY"]
