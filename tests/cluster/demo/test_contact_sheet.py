"""The contact sheet shows every tile in full, with its text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cluster.demo.contact_sheet import Tile, draw_contact_sheet, write_contact_sheet


def tile(colour: str, text: str = "a caption", *, failed: bool = False) -> Tile:
    return Tile(image=Image.new("RGB", (96, 48), colour), title="key", text=text, failed=failed)


def has_colour(sheet: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(sheet) == colour).all(axis=2).any())


def test_every_image_is_on_the_sheet() -> None:
    colours = ("red", "lime", "blue", "yellow", "cyan")
    sheet = draw_contact_sheet([tile(colour) for colour in colours])
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)):
        assert has_colour(sheet, colour)


def test_long_texts_make_the_row_taller_instead_of_being_cut() -> None:
    short = draw_contact_sheet([tile("red", "few words")])
    long = draw_contact_sheet([tile("red", "many words " * 40)])
    assert long.height > short.height + 100


def test_a_tile_without_an_image_is_an_empty_frame(tmp_path: Path) -> None:
    gone = Tile(image=None, title="key", text="image_undecodable", failed=True)
    path = write_contact_sheet([gone], tmp_path / "new" / "sheet.png")
    assert has_colour(Image.open(path), (180, 20, 20))
