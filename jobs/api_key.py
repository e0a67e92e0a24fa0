"""Makes an API key for the endpoint.

    python jobs/api_key.py team-a --requests-per-minute 600 --file keys.yaml

The key itself is shown once, on stdout, and kept nowhere. Its entry, which holds a hash of it, is
added to the endpoint's file of keys, or shown without --file. Exit codes: 0 done, 2 an argument
that cannot work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from cluster.errors import UsageError
from cluster.serving.http.api_keys import ApiKey, make_key, parse_keys, read_keys
from jobs.boundary import end_with, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(lambda: _make(build_parser().parse_args(arguments)), arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the holder, for logs: letters, digits and . - _ @")
    parser.add_argument("--file", type=Path, help="add the entry to this file of keys")
    parser.add_argument("--requests-per-minute", type=float, help="default: any number")
    parser.add_argument("--tokens-per-minute", type=float, help="prompt and answer; default: any")
    parser.add_argument("--concurrent", type=int, help="requests at the same time; default: any")
    return parser


def _make(given: argparse.Namespace) -> int:
    key, entry = make_key(
        given.name,
        requests_per_minute=given.requests_per_minute,
        tokens_per_minute=given.tokens_per_minute,
        concurrent=given.concurrent,
    )
    keys = [entry]
    if given.file is not None and given.file.exists():
        keys = [*read_keys(str(given.file)), entry]
    text = _to_yaml(keys)
    parse_keys(text)  # also that no other key has this name
    if given.file is None:
        print(text, end="")
    else:
        _replace(given.file, text)
    print(f"key of {entry.name}, shown only now: {key}")
    return 0


def _to_yaml(keys: Sequence[ApiKey]) -> str:
    entries = [
        {name: value for name, value in asdict(key).items() if value is not None} for key in keys
    ]
    return yaml.safe_dump({"keys": entries}, sort_keys=False)


def _replace(path: Path, text: str) -> None:
    """At once: an endpoint that reads the file never sees half of it."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.touch(mode=0o600)
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        raise UsageError(f"--file {path}: {error.strerror}") from error


if __name__ == "__main__":
    end_with(main)
