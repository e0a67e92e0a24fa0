"""The results of an embedded run are kept in a local folder, and cost nobody what is theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.accounting.ledger import UnitLedger
from cluster.output.summary import Summary
from cluster.store import open_store
from jobs import caption_corpus
from jobs.demo_results import check_folder, copy_results
from jobs.make_corpus import make_corpus
from tests.cluster.corpora import put_parquet


def ended_run(folder: Path, run_id: str, rows: int) -> Summary:
    """An embedded run that has ended: its corpus, a unit for each row, its summary."""
    corpus_folder = folder / f"in-{run_id}"
    make_corpus(kind="caption", rows=rows, output=str(corpus_folder))
    corpus = pq.read_table(corpus_folder).to_pylist()
    for number, row in enumerate(corpus):
        labels = {
            "key": row["key"], "text": row["caption"], "caption": row["caption"],
            "error_code": None, "error_message": None, "visual_tokens": 9, "visual_tokens_kept": 2,
        }  # fmt: skip
        unit = f"{run_id}-{number:020x}.parquet"
        put_parquet(open_store(folder / run_id), unit, pa.Table.from_pylist([labels]))
    return Summary(
        run_id=run_id, created="", settings={}, input=str(corpus_folder),
        output=str(folder / run_id), units=rows, units_done=rows, rows_planned=rows,
        total=UnitLedger(rows=rows), measured=None, duplicate_keys=0, accuracy=None,
    )  # fmt: skip


def test_the_results_of_an_embedded_run_replace_those_of_an_earlier_one(tmp_path: Path) -> None:
    for run_id, rows in (("a" * 16, 3), ("b" * 16, 2)):
        check_folder("caption", tmp_path)
        message = copy_results("caption", ended_run(tmp_path, run_id, rows), tmp_path)
        assert f"{rows} of {rows} captions describe their scene word for word" in message
        kept = sorted(path.name for path in (tmp_path / "caption").glob("*.parquet"))
        assert kept == [f"{run_id}-{number:020x}.parquet" for number in range(rows)]
        assert json.loads((tmp_path / "caption/summary.json").read_text())["run_id"] == run_id
        assert (tmp_path / "caption/sheet.png").stat().st_size > 1_000


def test_results_that_were_cut_short_are_known_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = ended_run(tmp_path, "a" * 16, 2)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr("jobs.demo_results.pa.concat_tables", fail)
        with pytest.raises(OSError, match="full"):
            copy_results("caption", summary, tmp_path)
    (tmp_path / "caption/.DS_Store").touch()
    (tmp_path / f"caption/{'0' * 20}.parquet").touch()  # of an earlier version
    check_folder("caption", tmp_path)


@pytest.mark.parametrize(
    "theirs",
    ["_run/manifest.json", "00000.parquet", "00000.tar", f"{'c' * 16}-0.parquet", "notes/a.txt"],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_what_an_embedded_run_did_not_write_is_neither_removed_nor_mixed_with_it(
    theirs: str,
    earlier: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the run: a user's own output or corpus may be called out/caption."""
    monkeypatch.chdir(tmp_path)
    if earlier:
        copy_results("caption", ended_run(tmp_path, "a" * 16, 1), Path("out"))
    path = tmp_path / "out/caption" / theirs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"theirs")
    assert caption_corpus.main([]) == 2
    assert "none of an embedded run's results" in capsys.readouterr().err
    assert path.read_bytes() == b"theirs"
