"""An incomplete output of an earlier schema version is read and reported, and never mixed with rows
of this one.

Unit tests read what the same version wrote, so they cannot detect a changed key, column or run id.
These outputs were written by version b477fbd (`previous_version/`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import RunConfig, RunOutput, run, summarise
from cluster.demo.local_s3 import LocalS3
from cluster.errors import SettingsChanged
from cluster.store import open_store
from jobs import report
from sppruner import Budget, PruneSpec
from sppruner.engine import SamplingParams

FILES = Path(__file__).with_name("previous_version")
BUCKET = "previous"
RUNS: dict[str, dict[str, Any]] = {
    "vqa": {"kind": "vqa", "prompt": "{question}"},
    "auto": {"kind": "caption", "prompt": "Describe the image.", "auto": True},
}


def config(name: str) -> RunConfig:
    return RunConfig(
        input=f"s3://{BUCKET}/{name}/corpus",
        output=f"s3://{BUCKET}/{name}/labels",
        model="tiny-llava",
        spec=PruneSpec(method="sppruner", budget=Budget(ratio=0.5)),
        generation=SamplingParams(max_new_tokens=8),
        unit_rows=8,
        slots=4,
        **RUNS[name],
    )


@pytest.mark.parametrize(("name", "rows", "units"), [("vqa", 24, 3), ("auto", 16, 2)])
def test_an_output_of_an_earlier_version_is_reported_and_not_resumed(
    s3_server: LocalS3,
    name: str,
    rows: int,
    units: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    finished = json.loads((FILES / name / "summary.json").read_text())
    s3_server.create_bucket(BUCKET)
    for path in (FILES / name).rglob("*"):
        # The addresses of corpus and output in the run of that version.
        if path.is_file() and path != FILES / name / "summary.json":
            key = path.relative_to(FILES).as_posix()
            open_store(f"s3://{BUCKET}").put(key, path.read_bytes())
    output = RunOutput.open(config(name).output)

    partial = summarise(output)
    assert (partial.run_id, partial.state) == (finished["run_id"], "incomplete")
    assert (partial.units_done, partial.total.rows) == (units - 1, rows - 8)
    assert (partial.break_even is not None) == (name == "auto")
    if name == "vqa":
        ratio = finished["measured"]["dense_over_pruned"]["ratio"]
        assert partial.measured is not None
        assert (partial.measured.rows, partial.total.control_rows) == (8, 8)
        assert partial.measured.ratio == pytest.approx(ratio)
    assert report.main([output.uri]) == 0
    printed = capfd.readouterr().out
    assert finished["run_id"] in printed
    assert "an earlier version measured this run" in printed
    before = {info.key: info.etag for info in open_store(output.uri).list()}

    with pytest.raises(SettingsChanged, match="schema version 2, whose rows have other"):
        run(config(name))
    assert {info.key: info.etag for info in open_store(output.uri).list()} == before
