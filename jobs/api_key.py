"""Makes an API key for the endpoint.

    python jobs/api_key.py team-a --requests-per-minute 600 >> keys.yaml

The key itself is shown once, on stderr, and kept nowhere; the entry for the endpoint's file of keys
goes to stdout: for a new file it begins with the line `keys:`, unless --entry leaves that out. Exit
codes: 0 done, 2 an argument that cannot work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import yaml

from cluster.serving.http.api_keys import make_key
from jobs.boundary import end_with, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(lambda: _make(_parse(arguments)), arguments)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="of the holder, for logs: letters, digits and . - _ @")
    parser.add_argument("--requests-per-minute", type=float, help="default: any number")
    parser.add_argument("--tokens-per-minute", type=float, help="prompt and answer; default: any")
    parser.add_argument("--concurrent", type=int, help="requests at the same time; default: any")
    parser.add_argument("--entry", action="store_true", help="for a file that has keys already")
    return parser.parse_args(arguments)


def _make(given: argparse.Namespace) -> int:
    key, entry = make_key(
        given.name,
        requests_per_minute=given.requests_per_minute,
        tokens_per_minute=given.tokens_per_minute,
        concurrent=given.concurrent,
    )
    stated = {name: value for name, value in asdict(entry).items() if value is not None}
    text = yaml.safe_dump([stated], sort_keys=False)
    if not given.entry:
        print("keys:")
    print("".join(f"  {line}\n" for line in text.splitlines()), end="")
    print(f"key of {entry.name}, shown only now: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end_with(main)
