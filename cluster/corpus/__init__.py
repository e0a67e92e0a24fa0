"""Corpora on an object store, cut into units of work that can be read and committed on their own.

Nothing here imports Ray but `cluster.corpus.source`, so that a plan can be made without it.
"""

from __future__ import annotations

from cluster.corpus.layout import Layout
from cluster.corpus.plan import Plan, done_units, plan_run, unit_key
from cluster.corpus.unit import Unit

__all__ = ["Layout", "Plan", "Unit", "done_units", "plan_run", "unit_key"]
