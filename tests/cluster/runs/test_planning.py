"""Planning: the identity of a run, when a run is resumed and when its output is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from cluster.corpus.listing import list_corpus
from cluster.errors import SettingsChanged, StoreError, UsageError
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.unit_names import UnitNames
from cluster.runs.planning import corpus_uri, plan_run
from cluster.store import Store, open_store
from sppruner.spec import Budget, PruneSpec
from tests.cluster.corpora import IMAGE, config, image, plan, put_parquet, tar_bytes


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def source(place: str) -> Store:
    store = open_store(f"{place}/in")
    for name in ("a", "b"):
        put_parquet(store, f"{name}.parquet", rows(10), group_rows=4)
    return store


def rows(number: int) -> pa.Table:
    return pa.table({"image": pa.array([image()] * number, IMAGE)})


def test_a_second_start_resumes_without_indexing_again(source: Store, place: str) -> None:
    with capture_logs() as events:
        first, _ = plan(source.uri, f"{place}/out")
        again, _ = plan(source.uri, f"{place}/out")
    assert [event["event"] for event in events] == ["run_planned", "run_resumed"]
    assert again.units == first.units
    assert (again.run_id, again.created) == (first.run_id, first.created)
    assert again.mapping.schema == first.mapping.schema


def test_the_run_id_does_not_depend_on_the_output(source: Store, place: str) -> None:
    ids = {plan(source.uri, f"{place}/out{n}").manifest.run_id for n in range(2)}
    assert len(ids) == 1
    assert len(ids.pop()) == 16


def test_the_run_id_does_not_depend_on_replicas_or_error_limits(source: Store, place: str) -> None:
    first = plan(source.uri, f"{place}/out")
    again = plan(source.uri, f"{place}/out", replicas=3, max_error_share=0.5, max_attempts=9)
    assert again.manifest.run_id == first.manifest.run_id


def test_changed_settings_are_refused_and_listed(source: Store, place: str) -> None:
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))
    plan(source.uri, f"{place}/out", spec=spec)
    other = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
    with pytest.raises(SettingsChanged) as caught:
        plan(source.uri, f"{place}/out", spec=other, prompt="tell me", dtype="bfloat16")
    message = str(caught.value)
    assert "spec.budget.ratio: 0.5 → 0.25" in message
    assert 'prompt: "describe" → "tell me"' in message
    assert "bfloat16" in message
    assert "unit_rows" not in message
    assert "another --output" in message


def test_a_changed_corpus_is_refused_and_its_changes_listed(source: Store, place: str) -> None:
    plan(source.uri, f"{place}/out")
    put_parquet(source, "b.parquet", rows(11))
    put_parquet(source, "c.parquet", rows(1))
    with pytest.raises(SettingsChanged) as caught:
        plan(source.uri, f"{place}/out")
    assert "corpus: added c.parquet" in str(caught.value)
    assert "corpus: changed b.parquet" in str(caught.value)
    assert "a.parquet" not in str(caught.value)


def test_drivers_that_start_concurrently_use_one_manifest(source: Store, place: str) -> None:
    with capture_logs() as events, ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: plan(source.uri, f"{place}/out").manifest, range(4)))
    assert len({(p.run_id, p.created, p.units) for p in plans}) == 1
    assert [event["event"] for event in events].count("run_planned") == 1


def test_an_output_with_parquet_files_of_another_origin_is_refused(
    source: Store, place: str
) -> None:
    open_store(f"{place}/out").put("other.parquet", b"x")
    with pytest.raises(UsageError, match=r"other\.parquet is there already"):
        plan(source.uri, f"{place}/out")


def test_an_unreadable_manifest_is_refused(source: Store, place: str) -> None:
    open_store(f"{place}/out").put("_run/manifest.json", b'{"some": "json"}')
    with pytest.raises(StoreError, match="not a manifest"):
        plan(source.uri, f"{place}/out")


@pytest.mark.parametrize(("inner", "outer"), [("/in/out", "/in"), ("/in", ""), ("/in/", "/in")])
def test_input_and_output_may_not_overlap(place: str, inner: str, outer: str) -> None:
    """Commits would change the corpus, or readers of the output would read the corpus too."""
    for source, output in ((inner, outer), (outer, inner)):
        with pytest.raises(UsageError, match=r"overlap|its own prefix"):
            plan(place + source, place + output)


def test_an_output_inside_the_input_is_found_by_any_name(tmp_path: Path) -> None:
    """Its units would be corpus to the next call, which then could not resume."""
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (f"{tmp_path}/other/../in/out", f"{tmp_path}/link/out"):
        with pytest.raises(UsageError, match="overlap"):
            list_corpus(f"{tmp_path}/in", output)


def test_prefixes_with_a_common_start_of_the_name_do_not_overlap(source: Store, place: str) -> None:
    assert plan(source.uri, f"{place}/in-labelled").units


def test_an_input_without_a_corpus_is_refused_and_its_objects_listed(place: str) -> None:
    with pytest.raises(UsageError, match="but nothing; check --input"):
        plan(f"{place}/empty", f"{place}/out")
    store = open_store(f"{place}/wrong")
    store.put("x.csv", b"1")
    store.put("_notes.parquet", b"1")
    with pytest.raises(UsageError, match=r"1 objects \(\.csv\)"):
        plan(store.uri, f"{place}/out")


def test_a_corpus_without_rows_is_refused(place: str) -> None:
    """A run of no units would report success and write nothing."""
    put_parquet(open_store(f"{place}/in"), "a.parquet", rows(0))
    with pytest.raises(UsageError, match="1 files without a single row"):
        plan(f"{place}/in", f"{place}/out")


def test_mixed_formats_are_refused(source: Store, place: str) -> None:
    source.put("x.tar", tar_bytes([("a.jpg", b"x")]))
    with pytest.raises(UsageError, match=r"mixes Parquet \(a\.parquet\) and WebDataset \(x\.tar\)"):
        plan(source.uri, f"{place}/out")


def test_the_tables_that_img2dataset_writes_beside_its_tars_are_ignored(place: str) -> None:
    store = open_store(f"{place}/dataset")
    store.put("00000.tar", tar_bytes([("a.jpg", b"x"), ("b.jpg", b"x")]))
    put_parquet(store, "00000.parquet", rows(5))
    store.put("00001_stats.json", b'{"successes": 0}')
    put_parquet(store, "00001.parquet", rows(5))  # of a shard without a single download
    with capture_logs() as events:
        assert {u.file for u in plan(store.uri, f"{place}/out").units} == {"00000.tar"}
    assert [e["files"] for e in events if e["event"] == "parquet_beside_tars_ignored"] == [2]
    tables = plan(store.uri, f"{place}/tables", format="parquet")
    pieces = [piece.file for unit in tables.units for piece in unit.pieces]
    assert pieces == ["00000.parquet", "00001.parquet"]
    put_parquet(store, "other.parquet", rows(1))
    with pytest.raises(UsageError, match="--format parquet or --format webdataset"):
        plan(store.uri, f"{place}/mixed")
    tars = plan(store.uri, f"{place}/tars", format="webdataset")
    assert {unit.file for unit in tars.units} == {"00000.tar"}


def test_a_format_that_is_not_there_is_refused(source: Store, place: str) -> None:
    with pytest.raises(UsageError, match=r"holds no \*\.tar, but 2 objects"):
        plan(source.uri, f"{place}/out", format="webdataset")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_archives_are_refused(place: str, name: str) -> None:
    open_store(f"{place}/packed").put(name, b"x")
    with pytest.raises(UsageError, match=r"store plain \.tar files"):
        plan(f"{place}/packed", f"{place}/out")


def test_a_single_file_is_a_corpus(source: Store, place: str) -> None:
    planned = plan(f"{source.uri}/b.parquet", f"{place}/out")
    assert {unit.file for unit in planned.units} == {"b.parquet"}
    assert planned.manifest.source == source.uri


@pytest.mark.parametrize("limit", [1, 4, 5, 13, 20, 99])
def test_a_limit_takes_the_first_rows(source: Store, place: str, limit: int) -> None:
    planned = plan(source.uri, f"{place}/out", limit=limit)
    assert planned.manifest.rows == min(limit, 20)
    everything = plan(source.uri, f"{place}/all")
    starts = [(unit.file, unit.row_start) for unit in planned.units]
    assert starts == [(u.file, u.row_start) for u in everything.units][: len(starts)]
    shared = {u.unit_id for u in planned.units} & {u.unit_id for u in everything.units}
    whole = [u for u in planned.units if u in everything.units]
    assert shared == {u.unit_id for u in whole}


def test_objects_in_folders_are_not_committed_units(source: Store, place: str) -> None:
    planned = plan(source.uri, f"{place}/out")
    store = open_store(planned.output.uri)
    assert planned.output.committed_units() == set()
    first = planned.units[0].unit_id
    store.put(UnitNames.of(planned.manifest).key(first), b"x")
    store.put("_run/progress.parquet", b"x")
    store.put(f"folder/{UnitNames.of(planned.manifest).key('other')}", b"x")
    assert planned.output.committed_units() == {first}


def test_relative_paths_are_resolved_for_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The working directory of a Ray worker is not the driver's."""
    monkeypatch.chdir(tmp_path)
    put_parquet(open_store("in"), "a.parquet", rows(1))
    planned = plan("in", "out")
    assert planned.manifest.source == str(tmp_path / "in")
    assert planned.output.uri == str(tmp_path / "out")


def test_a_manifest_round_trips_through_json(source: Store, place: str) -> None:
    plan(source.uri, f"{place}/out", limit=7)
    data = open_store(f"{place}/out").get("_run/manifest.json")
    assert Manifest.from_json(data).to_json() == data


@pytest.mark.parametrize("given", ["in", "in/a.parquet"])
def test_a_relative_input_is_found_again_from_another_folder(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    rows = pa.table({"image": [image(b"x")] * 2})
    put_parquet(open_store(tmp_path / "in"), "a.parquet", rows)
    put_parquet(open_store(tmp_path / "in"), "b.parquet", rows)
    monkeypatch.chdir(tmp_path)
    manifest = plan(given, str(tmp_path / "out")).manifest
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = plan_run(
        config(given, str(tmp_path / "out")),
        RunOutput.open(tmp_path / "out"),
        model_revision="r1",
        image_backend="pil",
        place=corpus_uri(manifest),
    )
    assert again == manifest
