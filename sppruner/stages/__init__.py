"""Pruning inside the decoder: which layer drops how many tokens, and the driver that does it."""

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
