"""What a run did and saved, read from its output alone; works while it runs and ever after.

python jobs/report.py s3://bucket/captions
python jobs/report.py s3://bucket/captions --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster.errors import RunError
from cluster.report import print_report
from cluster.summary import summarise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a run did and saved, from its output.")
    parser.add_argument("output", help="the --output of a job")
    parser.add_argument("--json", action="store_true", help="machine-readable, to stdout")
    arguments = parser.parse_args(argv)
    try:
        summary = summarise(arguments.output)
    except RunError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(summary.to_json())
    else:
        print_report(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
