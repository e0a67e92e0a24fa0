"""A spec that the model cannot run is an error, not a missing score."""

from __future__ import annotations

import pytest

from jobs.training.grading import score_generated
from sppruner.errors import EvaluationError
from sppruner.evaluation.drawn_scenes import scene_questions
from sppruner.models.loading import EMBEDDED, load_model
from sppruner.spec import Budget, PruneSpec


def test_a_spec_that_cannot_run_is_named_with_its_reason() -> None:
    loaded = load_model(EMBEDDED, device="cpu", dtype="bfloat16")
    budget = Budget(tokens=16)
    specs = [PruneSpec(method=method, budget=budget) for method in ("topk", "no-such", "grid")]
    with pytest.raises(EvaluationError, match=r"no-such with Budget.*tokens=16") as raised:
        score_generated(loaded, scene_questions(range(1)), specs)
    assert "there are" in str(raised.value)
    assert "topk with" not in str(raised.value)
