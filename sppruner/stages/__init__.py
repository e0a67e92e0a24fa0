"""Pruning inside the decoder: token counts by layer, and the driver that drops the tokens."""

from sppruner.stages.cache import staged_static_cache
from sppruner.stages.driver import StageDriver
from sppruner.stages.plan import StagePlan, TokenSchedule
from sppruner.stages.probe import LastQueryProbe

__all__ = [
    "LastQueryProbe",
    "StageDriver",
    "StagePlan",
    "TokenSchedule",
    "staged_static_cache",
]
