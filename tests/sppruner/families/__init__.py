"""The families under test by name, and one shared pruner of each."""

import functools

from sppruner import Pruner
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


def pruner_of(family: str, attention: str = "sdpa") -> Pruner:
    """A pruner of the family's tiny model, built once and shared: tests must not modify it."""
    return _built(family, attention)


@functools.cache
def _built(family: str, attention: str) -> Pruner:
    return Pruner(FAMILIES[family].build(attention))


__all__ = ["FAMILIES", "Family", "pruner_of"]
