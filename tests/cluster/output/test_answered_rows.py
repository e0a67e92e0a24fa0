"""Answered rows with their images: rows within the limit are read again, and no others."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from cluster.output.answered_rows import answered_rows
from cluster.output.unit_names import UnitNames
from cluster.store import open_store
from tests.cluster.corpora import Planned, plan, put_parquet
from tests.cluster.labelled_tables import SPEC, mask

IMAGES = [b"0", None, b"2", b"3"]  # the second was removed after it was labelled
FAILED = "image_missing"


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Two units of two rows."""
    corpus = pa.table({"key": list("abcd"), "image": pa.array(IMAGES, pa.binary())})
    put_parquet(open_store(str(tmp_path / "in")), "x.parquet", corpus)
    return plan(str(tmp_path / "in"), str(tmp_path / "out"), spec=SPEC, unit_rows=2)


def commit(planned: Planned, number: int, errors: list[str | None]) -> None:
    """Commits the rows of unit `number`: answered where the error code is None."""
    unit = planned.units[number]
    table = pa.table(
        {
            "key": list("abcd")[unit.row_start :][: unit.row_count],
            "unit_row": range(unit.row_count),
            "error_code": pa.array(errors, pa.string()),
            "prune_spec": [SPEC.to_json()] * unit.row_count,
            "kept_tokens": [mask(2, 8)] * unit.row_count,
        }
    )
    key = UnitNames.of(planned.manifest).key(unit.unit_id)
    put_parquet(open_store(planned.output.uri), key, table)


def keys(planned: Planned, limit: int) -> list[str]:
    return [row.key for row in answered_rows(planned.output.uri, limit)]


def test_answered_rows_are_in_corpus_order_without_failed_rows(planned: Planned) -> None:
    commit(planned, 1, [None, None])
    commit(planned, 0, [None, FAILED])
    assert [keys(planned, limit) for limit in (1, 2, 9)] == [["a"], ["a", "c"], ["a", "c", "d"]]


def test_a_missing_image_is_an_error_only_if_its_row_is_within_the_limit(planned: Planned) -> None:
    commit(planned, 0, [None, None])
    assert keys(planned, 1) == ["a"]
    with pytest.raises(UsageError, match="row 'b': its image cannot be read again"):
        keys(planned, 2)


def test_without_answered_rows_the_error_depends_on_whether_the_run_is_complete(
    planned: Planned,
) -> None:
    commit(planned, 0, [FAILED, FAILED])
    with pytest.raises(UsageError, match="no labelled row yet: resume the run first"):
        keys(planned, 1)
    commit(planned, 1, [FAILED, FAILED])
    with pytest.raises(UsageError, match=r"every row failed: .* to another --output"):
        keys(planned, 1)


def test_rows_of_a_version_without_kept_tokens_are_refused(planned: Planned) -> None:
    """An overlay of such rows could not show which tokens the model saw."""
    commit(planned, 0, [None, None])
    key = UnitNames.of(planned.manifest).key(planned.units[0].unit_id)
    store = open_store(planned.output.uri)
    committed = pq.read_table(io.BytesIO(store.get(key)))
    put_parquet(store, key, committed.drop_columns(["kept_tokens"]))
    with pytest.raises(UsageError, match="do not say which tokens were kept"):
        answered_rows(planned.output.uri, 1)
