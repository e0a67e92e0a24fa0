"""Result records as Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path

import pytest
from PIL import Image

from sppruner.errors import EvaluationError
from sppruner.evaluation.plot import check_plot, plot
from sppruner.evaluation.records import method_label, result_record
from sppruner.evaluation.tables import comma_separated, markdown
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.evaluation.test_score import dataset, score


def records() -> list[dict[str, object]]:
    questions = dataset(6)
    dense = score(questions, {1}, spec=DENSE)
    specs = [
        PruneSpec(method=method, budget=Budget(ratio=ratio), options=options)
        for method, options in (("grid", {}), ("random", {"seed": 1}))
        for ratio in (0.5, 0.25)
    ]
    return [
        result_record("m", dense, dense),
        *(result_record("m", score(questions, {0, 3}, spec=s), dense) for s in specs),
    ]


def test_the_label_includes_the_options() -> None:
    assert method_label("sppruner", {"kappa": 0, "root": False}) == "sppruner:kappa=0:root=false"


def test_markdown_has_a_line_per_record_and_one_per_unsupported_spec() -> None:
    entries = records()
    failed = {"model": "m", "method": "fastv", "retained": 0.5, "reason": "no stages"}
    lines = markdown(entries, [failed]).splitlines()
    assert len(lines) == 2 + len(entries) + 2
    assert len({line.count("|") for line in lines[:-2]}) == 1
    assert "| random:seed=1 |" in lines[-3]
    assert lines[-1] == "- m, fastv at 50.0 %: cannot: no stages"


def test_csv_is_flat_and_complete() -> None:
    entries = records()
    read = list(csv.DictReader(io.StringIO(comma_separated(entries))))
    assert len(read) == len(entries)
    assert read[-1]["options"] == "seed=1"
    assert float(read[1]["by_type.shape"]) == pytest.approx(4 / 6)
    assert float(read[1]["accuracy"]) == entries[1]["accuracy"]


def test_the_plot_is_a_picture_with_a_line_per_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(records(), tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > 500


def test_the_error_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install 'sppruner\[evaluate\]'"):
        check_plot()
