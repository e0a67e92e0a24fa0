"""Suites of `jobs/benchmark.py`, one file each; published results are in `RESULTS.md`."""
