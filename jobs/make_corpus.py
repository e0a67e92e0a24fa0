"""Draws a corpus of procedural scenes with reference answers, to try or test the jobs on.

    python jobs/make_corpus.py --kind caption --rows 2000 --output s3://bucket/corpus
    python jobs/make_corpus.py --kind vqa --rows 500 --format webdataset --faults --output out/vqa

The scenes are held out: the embedded model was not trained on any of them. With --faults about 3 %
of the rows are faulty in known ways; `_faults.json` beside the corpus lists them with their error
codes. Exit codes: 0 written, 1 the store does not answer, 2 usage.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

from cluster.config import Kind
from cluster.corpus.unit import Format
from cluster.demo import CUT_BYTES, Fault, draw_rows, encode_parquet, encode_tar, plant_faults
from cluster.errors import UsageError
from cluster.store import FIRST_CONTACT_S, open_store
from jobs.boundary import end_with, run_command

FAULTS_KEY = "_faults.json"
FILE_ROWS = 1024


def make_corpus(
    *,
    kind: Kind,
    rows: int,
    output: str,
    format: Format = "parquet",
    seed: int = 0,
    faults: bool = False,
) -> list[Fault]:
    """Writes the corpus and returns its planted faults; equal arguments give equal corpora.

    Raises UsageError if `output` is not empty or no place for files, StoreError if it cannot be
    written. A WebDataset with faults ends with a truncated archive, which adds one row.
    """
    if rows < 1:
        raise UsageError(f"--rows {rows}: give at least 1")
    if seed < 0:
        raise UsageError(f"--seed {seed}: negative seeds are training scenes; give 0 or more")
    store = open_store(output)
    at_first = store.with_patience(FIRST_CONTACT_S)
    at_first.check_place()
    found = at_first.list()
    if found:
        raise UsageError(f"{store.uri_of(found[0].key)} exists already; give an empty --output")
    *drawn, extra = islice(draw_rows(kind, seed), rows + 1)
    planted: list[Fault] = []
    if faults:
        drawn, planted = plant_faults(drawn, kind=kind, format=format, seed=seed)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        part = drawn[first : first + FILE_ROWS]
        if format == "parquet":
            store.put(f"{number:05}.parquet", encode_parquet(part, kind))
            continue
        key = f"{number:05}.tar"
        cut = faults and first + FILE_ROWS >= rows
        archive = encode_tar(part, cut=extra if cut else None)
        store.put(key, archive)
        if cut:
            truncated = "archive_truncated"
            key = f"{key}@{len(archive) - CUT_BYTES}"
            planted.append(Fault(row=rows, key=key, fault=truncated, error_code=truncated))
    if faults:
        listing = [asdict(fault) for fault in planted]
        store.put(FAULTS_KEY, json.dumps(listing, ensure_ascii=False, indent=1).encode())
    return planted


def build_parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--kind", choices=("caption", "vqa"), required=True, help="task of the rows"
    )
    parser.add_argument("--rows", type=int, required=True, help="number of rows")
    parser.add_argument("--output", required=True, help="empty s3://bucket/prefix or path")
    parser.add_argument(
        "--format",
        choices=("parquet", "webdataset"),
        default="parquet",
        help="file format (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="scenes to draw; different seeds share none (%(default)s)",
    )
    parser.add_argument("--faults", action="store_true", help="make about 3 %% of the rows faulty")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    return run_command(lambda: _make(options), argv)


def _make(options: argparse.Namespace) -> int:
    planted = make_corpus(**vars(options))
    print(f"{options.output}: {options.rows} rows, {options.format}")
    for name, number in sorted(Counter(fault.fault for fault in planted).items()):
        print(f"  planted {name}: {number}")
    return 0


if __name__ == "__main__":
    end_with(main)
