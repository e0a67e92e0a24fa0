"""The suites of `jobs/benchmark.py`, one file each."""
