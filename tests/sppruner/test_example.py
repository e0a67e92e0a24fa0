"""The examples run as printed, except for the model's name, the photo and the prompt."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import sppruner
from sppruner.evaluation import Item, drawn_scenes
from sppruner.models.loading import EMBEDDED
from sppruner.selectors import Selector
from sppruner.tiny import TINY_MODELS
from tests.sppruner.selectors.images import make

ROOT = Path(__file__).parents[2]
LIBRARY_PAGE = "sppruner/README.md"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def examples() -> dict[str, str]:
    """The script of the package's docstring, and the same in the pages."""
    assert sppruner.__doc__ is not None
    indented = re.search(r"(?:^    .*\n|\n)+", sppruner.__doc__, re.MULTILINE)
    assert indented is not None
    found = {
        f"{page} {i}": text
        for page in ("README.md", LIBRARY_PAGE)
        for i, text in enumerate(blocks(page))
        if "build_inputs" in text
    }
    return {"docstring": textwrap.dedent(indented.group()).strip(), **found}


def run(code: str, source: str, item: Item, folder: Path) -> dict[str, Any]:
    """Runs a block on the embedded model and a drawn scene; returns the names it defines."""
    item.image().save(folder / "photo.jpg")
    stand_ins = {
        "llava-hf/llava-1.5-7b-hf": str(TINY_MODELS[EMBEDDED]),
        "photo.jpg": str(folder / "photo.jpg"),
        "What is in the image?": item.prompt,
    }
    for printed, real in stand_ins.items():
        code = code.replace(printed, real)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, source, "exec"), names)
    return names


@pytest.fixture
def item() -> Item:
    return next(item for item in drawn_scenes(1).items if item.kind == "background")


@pytest.mark.parametrize("source", examples())
def test_the_script_answers_from_a_share_of_the_tokens(
    source: str, item: Item, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = examples()[source]
    assert code.startswith("from PIL import Image")
    for printed in ("llava-hf/llava-1.5-7b-hf", "photo.jpg", "What is in the image?"):
        assert printed in code
    run(code, source, item, tmp_path)
    answer, tokens = capsys.readouterr().out.splitlines()
    assert answer == item.answers[0]
    assert tokens == "32 of 144"


def test_the_library_page_has_the_docstring_s_script() -> None:
    assert examples()["docstring"] + "\n" in blocks(LIBRARY_PAGE)


@pytest.mark.parametrize("number", range(len(blocks(LIBRARY_PAGE))))
def test_every_block_of_the_library_page_runs(number: int, item: Item, tmp_path: Path) -> None:
    run(blocks(LIBRARY_PAGE)[number], f"{LIBRARY_PAGE} {number}", item, tmp_path)


def test_the_page_s_method_has_exact_counts_and_raster_order(item: Item, tmp_path: Path) -> None:
    """The example of a new method keeps the 14 border tokens of a 4 × 5 plane, in raster order."""
    (code,) = (text for text in blocks(LIBRARY_PAGE) if "(Selector)" in text)
    names = run(code, "method", item, tmp_path)
    (method,) = (
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, Selector) and value is not Selector
    )
    (selection,) = method().select([make(4, 5)], [14])
    inner = {6, 7, 8, 11, 12, 13}
    assert selection.index_K.tolist() == sorted(set(range(20)) - inner)
