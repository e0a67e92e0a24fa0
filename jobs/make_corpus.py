"""Draws a labelled corpus of procedural scenes, to try the jobs on or to test them against.

    python jobs/make_corpus.py --kind caption --rows 2000 --output s3://bucket/corpus
    python jobs/make_corpus.py --kind vqa --rows 500 --format webdataset --faults --output out/vqa

The scenes are held out: the embedded model never saw one of them. With --faults about 3 % of the
rows are broken in known ways; `_faults.json` beside the corpus says which, and what each becomes.
Exit status: 0 written, 2 a setting that cannot work, 1 a store that does not answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

from cluster.config import Kind
from cluster.corpus.unit import Format
from cluster.demo import Fault, draw_rows, parquet_file, plant, tar_file
from cluster.errors import RunError, UsageError
from cluster.store import open_store

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
    """Writes the corpus and returns what was planted; the same arguments give the same corpus.

    Raises UsageError where `output` holds something already, StoreError where it cannot be
    written. A WebDataset with faults ends with a truncated archive: one more row to expect.
    """
    if rows < 1:
        raise UsageError(f"--rows {rows}: give at least 1")
    if seed < 0:
        raise UsageError(f"--seed {seed}: below 0 lie the scenes that models are trained on")
    store = open_store(output)
    found = store.list()
    if found:
        raise UsageError(f"{store.uri_of(found[0].key)} is there already; give an empty --output")
    *drawn, extra = islice(draw_rows(kind, seed), rows + 1)
    planted: list[Fault] = []
    if faults:
        drawn, planted = plant(drawn, kind=kind, format=format, seed=seed)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        part = drawn[first : first + FILE_ROWS]
        if format == "parquet":
            store.put(f"{number:05}.parquet", parquet_file(part, kind))
            continue
        key = f"{number:05}.tar"
        cut = faults and first + FILE_ROWS >= rows
        store.put(key, tar_file(part, cut=extra if cut else None))
        if cut:
            truncated = "archive_truncated"
            planted.append(Fault(row=rows, key=key, fault=truncated, error_code=truncated))
    if faults:
        listing = [asdict(fault) for fault in planted]
        store.put(FAULTS_KEY, json.dumps(listing, ensure_ascii=False, indent=1).encode())
    return planted


def main(arguments: Sequence[str] | None = None) -> int:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kind", choices=("caption", "vqa"), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--output", required=True, help="s3://bucket/prefix or a path; empty")
    parser.add_argument("--format", choices=("parquet", "webdataset"), default="parquet")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--faults", action="store_true", help="break about 3 %% of the rows")
    options = parser.parse_args(arguments)
    try:
        planted = make_corpus(**vars(options))
    except RunError as error:
        print(f"make_corpus: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {options.rows} rows, {options.format}")
    for name, number in sorted(Counter(fault.fault for fault in planted).items()):
        print(f"  planted {name}: {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
