"""The output prefix of a run: its layout, manifest, checks, commits and summary."""
