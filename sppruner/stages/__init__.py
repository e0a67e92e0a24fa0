"""Pruning inside the decoder: which layer drops how many tokens, and the driver that does it."""

from sppruner.stages.cache import staged_static_cache
from sppruner.stages.driver import StageDriver, stages_from
from sppruner.stages.plan import Schedule, Scoring, StagePlan
from sppruner.stages.probe import LastQueryProbe

__all__ = [
    "LastQueryProbe",
    "Schedule",
    "Scoring",
    "StageDriver",
    "StagePlan",
    "staged_static_cache",
    "stages_from",
]
