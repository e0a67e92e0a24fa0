"""The examples run as printed, with the embedded model and a drawn photo in place of real ones."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import sppruner
from sppruner.evaluation import drawn_scenes
from sppruner.models.loading import EMBEDDED
from sppruner.tiny import TINY_MODELS

README = Path(__file__).parents[2] / "README.md"


def examples() -> dict[str, str]:
    """The package docstring's example, and the README's blocks that use the library."""
    assert sppruner.__doc__ is not None
    indented = re.search(r"(?:^    .*\n|\n)+", sppruner.__doc__, re.MULTILINE)
    assert indented is not None
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found = {f"README {i}": text for i, text in enumerate(blocks) if "Pruner(" in text}
    return {"docstring": textwrap.dedent(indented.group()).strip(), **found}


@pytest.mark.parametrize("source", examples())
def test_the_example_answers_from_a_share_of_the_tokens(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = examples()[source]
    assert code.startswith("from PIL import Image")
    item = next(item for item in drawn_scenes(1).items if item.kind == "background")
    item.image().save(tmp_path / "photo.jpg")
    stand_ins = {
        "llava-hf/llava-1.5-7b-hf": str(TINY_MODELS[EMBEDDED]),
        "photo.jpg": str(tmp_path / "photo.jpg"),
        "What is in the image?": item.prompt,
    }
    for printed, real in stand_ins.items():
        assert printed in code
        code = code.replace(printed, real)
    exec(compile(code, source, "exec"), {})
    answer, tokens = capsys.readouterr().out.splitlines()
    assert answer == item.answers[0]
    assert tokens == "32 of 144"
