"""What is not UTF-8 is refused by name, before anything is planned, wherever Ray would meet it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RunConfig
from cluster.encoding import check_process, is_utf8, shown
from cluster.errors import UsageError
from cluster.runs.run import run
from sppruner.spec import DENSE

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too
BAD = os.fsdecode(b"caf\xe9")


def encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(text=ANY_TEXT)
def test_a_text_is_utf8_exactly_if_it_can_be_encoded(text: str) -> None:
    assert is_utf8(text) == encodes(text)
    assert encodes(shown(text))
    assert shown(text) == text or not is_utf8(text)


@given(name=st.binary())
def test_a_name_is_utf8_exactly_if_its_bytes_are(name: bytes) -> None:
    try:
        name.decode()
    except UnicodeDecodeError:
        assert not is_utf8(os.fsdecode(name))
    else:
        assert is_utf8(os.fsdecode(name))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prompt", BAD], r"--prompt caf\\xe9: it is not UTF-8"),
        (["--output", "x", "--input", f"/data/{BAD}"], r"--input /data/caf\\xe9: it is not"),
        ([f"--prompt={BAD}"], r"--prompt=caf\\xe9: it is not"),
        (["--json", f"--{BAD}"], r"--json --caf\\xe9: it is not"),
        ([BAD, "--codes", "x"], r"^caf\\xe9: it is not"),
        (["--retain=0.5", BAD], r"^caf\\xe9: it is not"),
    ],
)
def test_an_argument_is_named(words: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        check_process(words)
    check_process([word for word in words if is_utf8(word)])


def test_the_process_s_own_arguments_are_those_that_ray_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--prompt", BAD])
    with pytest.raises(UsageError, match=r"--prompt caf\\xe9"):
        check_process()
    check_process([])


def test_a_working_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / BAD).mkdir()
    monkeypatch.chdir(tmp_path / BAD)
    with pytest.raises(UsageError, match=r"the working directory .*/caf\\xe9: it is not UTF-8"):
        check_process([])
    (tmp_path / BAD).rmdir()
    with pytest.raises(UsageError, match=r"the working directory is gone \(No such file"):
        check_process([])


def test_a_folder_of_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(f"/home/{BAD}")
    with pytest.raises(UsageError, match=r"looks for code in /home/caf\\xe9: .* PYTHONPATH"):
        check_process([])


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"])
def test_a_variable_that_ray_reads_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"/tmp/{BAD}")
    with pytest.raises(UsageError, match=rf"{name} /tmp/caf\\xe9: it is not UTF-8"):
        check_process([])


TEXTS = {"input": "in", "output": "out", "model": "m", "prompt": "p", "image_column": "x"}


@pytest.mark.parametrize("name", [*TEXTS, "key_column", "question_column", "engine"])
@pytest.mark.parametrize("bad", [BAD, "\ud800"])
def test_a_setting_is_named_whoever_makes_it(name: str, bad: str) -> None:
    texts = TEXTS | {name: f"{TEXTS.get(name, '')}{bad}"}
    with pytest.raises(UsageError, match=rf"{name} .*: it is not UTF-8"):
        RunConfig(kind="caption", spec=DENSE, **texts)  # type: ignore[arg-type]


def test_a_run_from_python_is_refused_before_it_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(
        kind="caption", input=str(tmp_path), output=str(tmp_path / "out"), model="m", prompt="p",
        spec=DENSE,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["x.py", BAD])
    with pytest.raises(UsageError, match="not UTF-8"):
        run(config)
    assert not (tmp_path / "out").exists()
