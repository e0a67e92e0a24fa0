"""Every family under test, by name."""

from tests.sppruner.families import llava
from tests.sppruner.families.base import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llava,)}

__all__ = ["FAMILIES", "Family"]
