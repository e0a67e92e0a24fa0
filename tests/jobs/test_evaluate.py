"""The evaluation command: the files it writes, and the arguments it refuses with exit code 2."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from jobs import evaluate

ROW_KEYS = [
    "model",
    "method",
    "options",
    "retained",
    "kept_share",
    "kept_layers",
    "n",
    "accuracy",
    "low",
    "high",
    "relative_to_dense",
    "relative_low",
    "relative_high",
    "by_type",
]


def pope(folder: Path) -> list[str]:
    """Writes two questions about one picture; returns the options that evaluate them."""
    Image.new("RGB", (96, 96), "gray").save(folder / "x.jpg")
    entry = {"question_id": 1, "image": "x.jpg", "text": "is there a red circle?", "label": "no"}
    lines = [json.dumps(entry), json.dumps({**entry, "question_id": 2})]
    (folder / "pope.jsonl").write_text("\n".join(lines))
    return ["--data", str(folder / "pope.jsonl"), "--images", str(folder), "--instruction", ""]


def test_every_output_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = [f"--{kind}={tmp_path / name}" for kind, name in
             (("json", "e.json"), ("markdown", "e.md"), ("csv", "e.csv"), ("plot", "e.png"),
              ("overlay", "shown"))]  # fmt: skip
    questions = ["--questions", "10", "--retain", "0.25,0.1", "--split", "tuning"]
    methods = ["--methods", "grid,sppruner:kappa=0,sppruner:relevance=clip"]
    assert evaluate.main([*questions, *methods, *files]) == 0
    document = json.loads((tmp_path / "e.json").read_text())
    assert [(row["method"], row["retained"]) for row in document["rows"]] == [
        ("none", 1.0),
        ("grid", 0.25),
        ("grid", 0.1),
        ("sppruner", 0.25),
        ("sppruner", 0.1),
    ]
    assert all(list(row)[: len(ROW_KEYS)] == ROW_KEYS for row in document["rows"])
    assert len(document["ahead_of"]) == 4
    assert {failed["method"] for failed in document["cannot"]} == {"sppruner:relevance=clip"}
    assert document["dataset"] == "drawn scenes (tuning)"
    assert (tmp_path / "e.md").read_text().count("cannot: ") == 2
    assert (tmp_path / "e.csv").read_text().count("\n") == 6
    with Image.open(tmp_path / "e.png") as plot:
        assert plot.width > 500
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {
        "tiny-llava-0.25.png",
        "tiny-llava-0.1.png",
    }
    captured = capsys.readouterr()
    assert "cannot: relevance 'clip' needs" in captured.err.replace("\n", " ")
    assert "majority answer" in captured.out


def test_questions_come_from_the_files_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    options = ["--methods", "grid", "--retain", "0.5", "--json", str(file)]
    assert evaluate.main([*pope(tmp_path), *options]) == 0
    dense, grid = json.loads(file.read_text())["rows"]
    assert dense["n"] == grid["n"] == 2
    assert grid["metrics"].keys() == {"f1", "precision", "recall", "yes_ratio"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "nope"], "there are none"),
        (["--methods", "sppruner:kapa=1"], "no option 'kapa'"),
        (["--retain", "many"], "give shares such as"),
        (["--retain", "22.2"], "outside (0, 1]"),
        (["--questions", "0"], "give at least 1"),
        (["--batch-rows", "0"], "give at least 1"),
        (["--first-scene", "-1"], "outside the 1,000,000"),
        (["--model", "no/such-model"], "not a local folder"),
        (["--data", "gone.json", "--images", "."], "gone.json: cannot be read"),
        (["--data", "gone.json"], "--data needs --images"),
        (["--images", "."], "--images goes with --data"),
        (["--json", "no/folder/e.json"], "its folder does not exist"),
        (["--overlay", __file__], "not a folder to write to"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate, "load_model", lambda *given: pytest.fail("it ran"))
    assert evaluate.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_image_that_cannot_be_decoded_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = pope(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    assert evaluate.main([*options, "--methods", "grid"]) == 2
    assert "x.jpg: cannot be used" in " ".join(capsys.readouterr().err.split())


def test_a_log_gets_plain_lines_until_every_question_is_answered() -> None:
    written = io.StringIO()
    with evaluate.show_progress(Console(file=written), "model", 1200) as advance:
        for _ in range(4):
            advance(300)
    lines = written.getvalue().splitlines()
    assert lines == ["model: 1,200 of 1,200 answers, 0 min left"], "one line in less than 30 s"
