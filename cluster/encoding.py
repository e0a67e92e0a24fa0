"""Texts that are not UTF-8. Arguments and names of files may be any bytes; Python carries what is
not UTF-8 of them as lone surrogates, which neither Ray nor a column of text takes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Final

from cluster.errors import UsageError

_READ_BY_RAY: Final = ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")


def is_utf8(text: str) -> bool:
    """Whether the text can be written in UTF-8."""
    return not re.search("[\ud800-\udfff]", text)


def shown(text: str) -> str:
    """The text for a message, with `\\xe9` for a byte that is not UTF-8."""
    escaped = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", text)
    return escaped.encode(errors="backslashreplace").decode()


def check_process(arguments: Sequence[str] | None = None) -> None:
    """Raises UsageError where Ray could not be told what it asks of every process that joins it:
    its arguments, its working directory, where its code is and where its files go.

    arguments: None for those of the process.
    """
    _check_arguments(sys.argv if arguments is None else arguments)
    try:
        folder = os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the working directory is gone ({error.strerror}): go to another one"
        ) from error
    _check("the working directory", folder, "work in a folder with another name")
    for place in map(str, sys.path):
        _check("Python looks for code in", place, "rename that folder, or change PYTHONPATH")
    for name in _READ_BY_RAY:
        _check(name, os.environ.get(name, ""), "set it to another value")


def _check_arguments(words: Sequence[str]) -> None:
    before = ""
    for word in words:
        is_value = before.startswith("--") and "=" not in before
        _check(before if is_value else "", word, "write it in UTF-8, or rename the file it names")
        before = word


def _check(what: str, text: str, advice: str) -> None:
    if not is_utf8(text):
        raise UsageError(
            f"{what} {shown(text)}: it is not UTF-8, and Ray takes nothing else; {advice}".lstrip()
        )
