"""The search for constants: it finds the best options and records everything it tried."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import tune
from sppruner.errors import SpecError
from sppruner.spec import Budget, PruneSpec

START = PruneSpec(method="sppruner", budget=Budget(ratio=0.5), options={"lam": 0.5, "mu": 0.3})
GRID = {"lam": [0.25, 0.5, 0.75], "mu": [0.0, 0.3, 0.5]}


class Bowl:
    """A measure with its maximum at lam 0.75, mu 0; records the specs it gets."""

    def __init__(self) -> None:
        self.measured: list[PruneSpec] = []

    def __call__(self, specs: Sequence[PruneSpec]) -> list[float]:
        self.measured += specs
        return [1 - abs(float(s.options["lam"]) - 0.75) - float(s.options["mu"]) for s in specs]


def test_each_option_is_set_to_its_best_value() -> None:
    steps = list(tune.search(START, GRID, Bowl(), rounds=3))
    best = [step for step in steps if step["best"]]
    assert best[-1]["options"] == {"lam": 0.75, "mu": 0.0}
    assert best[-1]["worth"] == max(step["worth"] for step in steps)


def test_no_spec_is_measured_twice_and_a_round_without_change_ends_the_search() -> None:
    bowl = Bowl()
    steps = list(tune.search(START, GRID, bowl, rounds=99))
    assert len(bowl.measured) == len(set(bowl.measured)) == len(steps)
    # The start, two other values of each option, and the other values of lam in the second round.
    assert len(steps) == 1 + 2 + 2 + 2


def test_a_tie_changes_nothing() -> None:
    steps = list(tune.search(START, GRID, lambda specs: [1.0] * len(specs), rounds=2))
    assert [step["options"] for step in steps if step["best"]] == [dict(START.options)]


def test_a_grid_is_parsed_from_the_command_line() -> None:
    assert tune.parse_grid("lam=0.5,1 root=false,true") == {"lam": [0.5, 1], "root": [False, True]}
    with pytest.raises(SpecError, match="name=value,value"):
        tune.parse_grid("lam")


def test_the_default_grid_has_valid_options() -> None:
    assert len(tune.parse_grid(tune.GRID)) >= 10
    assert tune.main(["--grid", "nonsense=1"]) == 2
    assert tune.main(["--json", "no/folder/t.json"]) == 2


def test_everything_tried_is_written_with_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--questions", "8", "--retain", "0.1", "--grid", "lam=0.2,0.8", "--rounds", "1"]
    assert tune.main([*options, "--json", str(tmp_path / "t.json")]) == 0
    document = json.loads((tmp_path / "t.json").read_text())
    assert [step["options"] for step in document["tried"]] == [{}, {"lam": 0.2}, {"lam": 0.8}]
    assert document["best"]["worth"] == max(step["worth"] for step in document["tried"])
    assert document["dataset"] == "drawn scenes (tuning)"
    assert "sppruner:lam=0.2" in capsys.readouterr().out
