"""Seeded fault schedules on a real Ray cluster, and a judge of the promises about rows and runs.

    python -m tests.chaos --seeds 0:200
    python -m tests.chaos --seeds 17:18 --keep out/chaos

The judge trusts no figure of a run: it knows the corpus before the run does, and reads the output's
Parquet files and the requests that reached the store.
"""
