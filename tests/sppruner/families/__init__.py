"""Every family under test, by name."""

from tests.sppruner.families import internvl, llava, llava_next
from tests.sppruner.families.base import Family

_MODULES = (
    llava,
    llava_next,
    internvl,
)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}

__all__ = ["FAMILIES", "Family"]
