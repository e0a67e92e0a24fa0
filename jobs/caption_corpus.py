"""Captions every image of a corpus with visual-token pruning and measures the saving.

    python jobs/caption_corpus.py
    python jobs/caption_corpus.py --input s3://bucket/images --output s3://bucket/captions
    ray job submit --working-dir . -- python jobs/caption_corpus.py --input … --output …

The same command resumes a run. Exit codes: 0 done, 1 the store or the replicas failed, 2
usage, 3 done with error rows, 4 stopped because too many rows failed, 5 not
complete yet, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.boundary import end_with
from jobs.labelling_cli import Job
from jobs.labelling_cli import main as run_job
from sppruner.tiny.questions import CAPTION_PROMPT

JOB = Job(kind="caption", prompt=CAPTION_PROMPT, max_new_tokens=64, about=__doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(JOB, argv)


if __name__ == "__main__":
    end_with(main)
