"""Every family under test, by name."""

from tests.sppruner.families import (
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from tests.sppruner.families.base import Family

_MODULES = (
    llava,
    llava_next,
    llava_onevision,
    internvl,
    idefics3,
    smolvlm,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}

__all__ = ["FAMILIES", "Family"]
