"""Contact sheets: sizes, places, labels."""

import numpy as np
import pytest
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.images.sheet import BACKGROUND, contact_sheet, grid

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns (y, x) of the pixels of a colour."""
    return np.argwhere((np.asarray(sheet) == colour).all(-1))


def test_small_pictures_are_enlarged_in_place() -> None:
    sheet = contact_sheet([[plain(RED), plain(GREEN)], [plain(BLUE), None]])
    for colour in (RED, GREEN, BLUE):
        assert len(area(sheet, colour)) == 192 * 192
    assert area(sheet, RED)[:, 1].max() < area(sheet, GREEN)[:, 1].min()
    assert area(sheet, RED)[:, 0].max() < area(sheet, BLUE)[:, 0].min()
    assert area(sheet, RED)[:, 1].min() == area(sheet, BLUE)[:, 1].min()


def test_cell_size_and_big_pictures() -> None:
    assert len(area(contact_sheet([[plain(RED, 128)]]), RED)) == 256 * 256
    assert len(area(contact_sheet([[plain(RED, 300)]]), RED)) == 300 * 300
    assert len(area(contact_sheet([[plain(RED, 64)]], cell=100), RED)) == 100 * 100
    wide = Image.new("RGB", (64, 32), RED)
    assert len(area(contact_sheet([[wide]]), RED)) == 192 * 96


def test_nearest_keeps_pixels_and_bicubic_does_not() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    colours = {tuple(c) for c in np.asarray(image).reshape(-1, 3)} | {BACKGROUND}
    nearest = contact_sheet([[image]], resample="nearest")
    assert {tuple(c) for c in np.asarray(nearest).reshape(-1, 3)} <= colours
    smooth = contact_sheet([[image]], resample="bicubic")
    assert not {tuple(c) for c in np.asarray(smooth).reshape(-1, 3)} <= colours


def test_labels_take_room_and_leave_the_pictures_alone() -> None:
    rows = [[plain(RED), plain(GREEN)]]
    bare = contact_sheet(rows)
    labelled = contact_sheet(rows, ["a very long row label that must be wrapped"], ["one", "two"], title="Title")
    assert labelled.width > bare.width and labelled.height > bare.height
    assert len(area(labelled, RED)) == len(area(labelled, GREEN)) == 192 * 192
    dark = np.asarray(labelled.convert("L")) < 60
    top, left = area(labelled, RED).min(0)
    assert dark[:top, left:].any(), "column labels are drawn above"
    assert dark[top:, :left].any(), "row labels are drawn to the left"


def test_labels_stay_inside_their_cells() -> None:
    sheet = contact_sheet([[plain(RED)] * 2], None, ["w" * 60, "i " * 60])
    ink = np.asarray(sheet.convert("L")) < 60
    top, left = area(sheet, RED).min(0)
    ink = ink[:top]
    assert ink.any()
    columns = np.flatnonzero(ink.any(0))
    assert columns.min() >= left - 2 and columns.max() <= area(sheet, RED)[:, 1].max() + 2
    assert not ink[:, left + 193 : left + 196].any(), "the gap between the columns is free"


def test_grid() -> None:
    sheet = grid([plain(RED)] * 5, gap=2)
    assert len(area(sheet, RED)) == 5 * 64 * 64
    assert sheet.size == (2 + 3 * 66, 2 + 2 * 66)
    assert grid([plain(RED)] * 5, columns=5).height == 2 + 66


def test_bad_input() -> None:
    with pytest.raises(UserError, match="at least one"):
        contact_sheet([[None]])
    with pytest.raises(UserError, match="at least one"):
        grid([])
    with pytest.raises(UserError, match="2 row labels for 1"):
        contact_sheet([[plain(RED)]], ["a", "b"])
    with pytest.raises(UserError, match="lanczos"):
        contact_sheet([[plain(RED)]], resample="lanczos")


def test_captions_stand_under_their_pictures() -> None:
    rows = [[plain(RED), plain(GREEN)], [plain(BLUE)]]
    bare, said = contact_sheet(rows), contact_sheet(rows, captions=[["+1", "a caption of two lines at least"], [""]])
    assert said.height > bare.height and said.width == bare.width
    for colour in (RED, GREEN, BLUE):
        assert len(area(said, colour)) == 192 * 192  # no caption runs into a picture
    red = area(said, RED)
    strip = np.asarray(said)[red[:, 0].max() + 1 : area(said, BLUE)[:, 0].min(), : red[:, 1].max()]
    assert (strip.sum(-1) < 400).any()  # ink between the rows
    with pytest.raises(UserError, match="captions do not fit"):
        contact_sheet(rows, captions=[["+1"], [""]])
