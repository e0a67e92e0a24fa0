"""Answers the question of every row of a VQA corpus; with reference answers, reports accuracy.

    python jobs/answer_vqa.py
    python jobs/answer_vqa.py --input s3://bucket/vqa --output s3://bucket/answers

Reads the columns `question` and, where there is one, `answers`. A prompt with {question} in it
wraps each question, e.g. --prompt "{question} Answer with a single word or phrase.". Run the same
command again to resume. Exit codes: 0 done, 2 usage, 3 done with error rows, 4 stopped because
too many rows failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.labelling_cli import Job
from jobs.labelling_cli import main as run_job

JOB = Job(kind="vqa", prompt="{question}", max_new_tokens=16, about=__doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
