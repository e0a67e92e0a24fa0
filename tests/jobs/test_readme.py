"""jobs/README.md names every command and each of its flags."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from jobs import (
    answer_vqa,
    api_key,
    benchmark,
    caption_corpus,
    evaluate,
    labelling_cli,
    make_corpus,
    report,
    retry_errors,
    train_tiny,
    tune,
)

README = Path(labelling_cli.__file__).with_name("README.md").read_text()
PARSERS = {
    "caption_corpus": labelling_cli.build_parser(caption_corpus.JOB),
    "answer_vqa": labelling_cli.build_parser(answer_vqa.JOB),
    "retry_errors": retry_errors.build_parser(),
    "report": report.build_parser(),
    "make_corpus": make_corpus.build_parser(),
    "evaluate": evaluate.build_parser(),
    "benchmark": benchmark.build_parser(),
    "tune": tune.build_parser(),
    "api_key": api_key.build_parser(),
    "train_tiny": train_tiny.build_parser(),
}


def section(command: str) -> str:
    """The text of one command; the VQA job shares the flags of the captioning job."""
    _, _, rest = README.partition(f"\n## {command}.py\n")
    assert rest, f"no section for {command}.py"
    text, _, _ = rest.partition("\n## ")
    return text + (section("caption_corpus") if command == "answer_vqa" else "")


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}


@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_is_documented_in_its_section(command: str) -> None:
    documented = set(re.findall(r"--[a-z][a-z-]*", section(command)))
    assert flags(PARSERS[command]) <= documented


@pytest.mark.parametrize("command", PARSERS)
def test_every_documented_flag_exists(command: str) -> None:
    """Flags in code spans that start with `--`; those of other programs have a command before."""
    documented = set(re.findall(r"`(--[a-z][a-z-]*)", section(command)))
    assert documented <= flags(PARSERS[command])


def test_every_command_of_the_folder_has_a_section() -> None:
    folder = Path(labelling_cli.__file__).parent
    commands = {
        path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert commands == set(PARSERS)
