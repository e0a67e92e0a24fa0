"""Answers the question of every row of a VQA corpus and scores it against reference answers.

    python jobs/answer_vqa.py
    python jobs/answer_vqa.py --input s3://bucket/vqa --output s3://bucket/answers

Reads the columns `question` and, if present, `answers` or `answer`. {question} in the prompt stands
for the row's question: --prompt "{question} Answer with a single word or phrase.". The same command
resumes a run. Exit codes: 0 done, 1 the store or the replicas failed, 2 usage, 3 done with error
rows, 4 stopped because too many rows failed, 5 not complete yet, 130 interrupted, 143
terminated.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.boundary import end_with
from jobs.labelling_cli import Job
from jobs.labelling_cli import main as run_job

JOB = Job(kind="vqa", prompt="{question}", max_new_tokens=16, about=__doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(JOB, argv)


if __name__ == "__main__":
    end_with(main)
