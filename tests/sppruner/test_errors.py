"""Every error has the code and stage that its docstring's tree draws, and rows carry both."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from sppruner import errors
from sppruner.engine.interface import Request, error_result
from sppruner.errors import EngineError, InputError, PruningHadNoEffect, SpprunerError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
ERRORS = [kind for kind in CLASSES if issubclass(kind, SpprunerError)]


def test_the_tree_draws_every_error_with_its_parent_code_and_stage() -> None:
    assert errors.__doc__ is not None
    drawn = {}
    parents: list[str] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│├└─ ]*)(\w+) +(\w+) +(\w+)(  |$)", line):
            indent, name, code, stage, _ = found.groups()
            parents[len(indent) // 4 :] = [name]
            drawn[name] = (parents[-2:-1], code, stage)
    assert drawn == {
        kind.__name__: (
            [b.__name__ for b in kind.__bases__ if issubclass(b, SpprunerError)],
            kind.code,
            kind.stage,
        )
        for kind in ERRORS
    }


def test_no_error_of_the_library_lives_outside_the_tree() -> None:
    names = {kind.__name__ for kind in ERRORS}
    for file in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and file != Path(errors.__file__):
                assert not {ast.unparse(base) for base in node.bases} & names, (file, node.name)


@pytest.mark.parametrize(
    ("error", "code", "stage"),
    [
        (PruningHadNoEffect("no"), "pruning_no_effect", "infer"),
        (EngineError("no"), "inference_failed", "infer"),
        (InputError("no"), "prompt_invalid", "prompt"),
        (RuntimeError("no"), "inference_failed", "infer"),
        (ValueError("no"), "inference_failed", "infer"),
    ],
)
def test_a_failed_request_carries_the_code_and_stage_of_its_error(
    error: Exception, code: str, stage: str
) -> None:
    result = error_result(Request(id="a", prompt="p"), error)
    assert (result.id, result.text) == ("a", None)
    assert (result.error_code, result.error_stage) == (code, stage)
    assert result.error_message == f"{type(error).__name__}: no"
