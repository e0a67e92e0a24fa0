"""Pages stay true to the tree: every link resolves, and every script or test they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNTRACKED = {"out", "shared"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
SCRIPT = re.compile(r"\b(?:jobs|tests)/[\w/-]+\.py\b")


def pages() -> list[str]:
    """Every Markdown page, relative to the root; tools keep their own in hidden folders."""
    found = []
    for page in sorted(ROOT.rglob("*.md")):
        folders = page.relative_to(ROOT).parts[:-1]
        hidden = {name for name in folders if name.startswith(".")} - {".github"}
        if not hidden and not UNTRACKED & set(folders):
            found.append(str(page.relative_to(ROOT)))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rules; a repeated heading gets a number."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        text = LINK.sub(lambda link: link.group()[1:].partition("]")[0], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


@pytest.mark.parametrize("page", pages())
def test_every_relative_link_resolves(page: str) -> None:
    file = ROOT / page
    for link in LINK.findall(FENCE.sub("", file.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page} links to {link}"


@pytest.mark.parametrize("page", pages())
def test_every_script_and_test_that_a_page_names_exists(page: str) -> None:
    for script in SCRIPT.findall((ROOT / page).read_text()):
        assert (ROOT / script).is_file(), f"{page} names {script}"


def test_anchors_follow_github_s_rules(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A, B & `c_d`\n## Same\n## Same\n```\n# no heading\n```\n### [Link](x.md) too\n"
    )
    assert anchors(page) == {"a-b--c_d", "same", "same-1", "link-too"}
