"""The page at `/` in a real browser: Debian's Chromium, headless. SPPRUNER_SCREENSHOTS names a
folder for pictures of it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RUN = {
    "run_id": "0a1b2c3d",
    "state": "running",
    "rows_done": 300,
    "rows_total": 1200,
    "rows_failed": {"image_undecodable": 2},
    "rows_per_second": 12.5,
    "eta_seconds": 90_061,
    "visual_tokens": 1000,
    "visual_tokens_kept": 222,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, endpoint: str) -> Iterator[Page]:
    """The page, in which every request to another party and every message of an error fails."""
    context = browser.new_context(
        color_scheme=request.param, viewport={"width": 1100, "height": 1400}
    )
    opened = context.new_page()
    foreign, errors = [], []
    opened.on("request", lambda r: foreign.append(r.url) if not own(r.url, endpoint) else None)
    opened.on("console", lambda m: errors.append(m.text) if is_fault(m) else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(f"{endpoint}/")
    yield opened
    context.close()
    assert foreign == []
    assert errors == []


def is_fault(message: Any) -> bool:
    """Whether the page's own code complains: a browser also notes each request that is refused."""
    refused = message.text.startswith("Failed to load resource")
    return bool(message.type == "error" and not refused)


def own(url: str, endpoint: str) -> bool:
    return url.startswith((endpoint, "data:", "blob:"))


def scene() -> dict[str, Any]:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (384, 288), (235, 235, 230))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 60, 160, 180), fill=(200, 40, 40))
    draw.rectangle((220, 120, 340, 240), fill=(40, 90, 200))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "scene.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def keep(page: Page, name: str) -> None:
    """A picture of the page, where somebody wants to look at it."""
    if folder := os.environ.get("SPPRUNER_SCREENSHOTS"):
        scheme = page.evaluate(
            "matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'"
        )
        page.screenshot(path=Path(folder) / f"{name}-{scheme}.png", full_page=True)


def test_an_image_is_asked_about_both_ways_and_dropped_tokens_are_shown(page: Page) -> None:
    from playwright.sync_api import expect

    ask = page.get_by_role("button", name="Ask both ways")
    expect(ask).to_be_disabled()
    page.get_by_label("Image:").set_input_files(scene())  # type: ignore[arg-type]
    expect(page.locator("#status")).to_contain_text("384 × 288 pixels")
    page.get_by_label("Question").fill("describe the scene .")
    page.get_by_label("Visual tokens kept").fill("25")
    expect(page.locator("#budget-shown")).to_have_text("25.0 %")
    before = page.evaluate("document.querySelector('#pruned canvas').toDataURL()")
    ask.click()
    expect(page.locator("#saving")).to_contain_text("of the dense answer's time", timeout=60_000)
    expect(page.locator("#dense dl")).to_contain_text("144 of 144")
    expect(page.locator("#pruned dl")).to_contain_text("36 of 144")
    expect(page.locator("#pruned .text")).not_to_be_empty()
    assert page.evaluate("document.querySelector('#pruned canvas').toDataURL()") != before
    darkened = page.evaluate(
        """() => {
          const canvas = document.querySelector('#pruned canvas');
          const plain = document.querySelector('#dense canvas');
          const read = (c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          const [one, other] = [read(canvas), read(plain)];
          let changed = 0;
          for (let i = 0; i < one.length; i += 4) changed += one[i] !== other[i];
          return changed / (one.length / 4);
        }"""
    )
    assert 0.6 < darkened < 0.85, "three quarters of the tokens were dropped"
    keep(page, "asked")


def test_the_page_is_used_by_keyboard_alone(page: Page) -> None:
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert names[:6] == ["Ask", "Runs", "file", "prompt", "method", "budget"]
    page.focus("#budget")
    page.keyboard.press("ArrowRight")
    assert page.locator("#budget-shown").text_content() == "22.3 %"


def test_what_the_endpoint_refuses_is_said_as_it_says_it(page: Page) -> None:
    from playwright.sync_api import expect

    page.get_by_label("Image:").set_input_files(scene())  # type: ignore[arg-type]
    page.get_by_label("Question").fill("word " * 5000)
    page.get_by_role("button", name="Ask both ways").click()
    expect(page.locator("#status")).to_contain_text("exceed the model's context", timeout=60_000)


def test_a_file_that_is_no_image_is_refused_here(page: Page) -> None:
    from playwright.sync_api import expect

    page.get_by_label("Image:").set_input_files(
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"x"}
    )
    expect(page.locator("#status")).to_have_text("That is no image.")
    page.get_by_label("Image:").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"x"}
    )
    expect(page.locator("#status")).to_contain_text("cannot read a.png")


def test_runs_are_shown_with_their_progress(page: Page, endpoint: str) -> None:
    from playwright.sync_api import expect

    body = json.dumps({"object": "list", "data": [RUN]})
    page.route(
        "**/v1/runs", lambda route: route.fulfill(body=body, content_type="application/json")
    )
    page.goto(f"{endpoint}/")
    row = page.locator("#runs-rows tr")
    expect(row).to_have_count(1)
    for text in ("0a1b2c3d", "running", "300 of 1200", "12.5", "25:01:01", "22.2 %"):
        expect(row).to_contain_text(text)
    assert row.get_by_role("progressbar").get_attribute("value") == "300"
    keep(page, "runs")


def test_every_control_has_a_name_for_those_who_do_not_see_it(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button, canvas')]
          .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
