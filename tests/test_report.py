import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.measure.report import Column, Report, Theme, picture_uri

VOID = {"meta", "img", "source", "br", "wbr", "rect", "link", "input"}


class Checker(HTMLParser):
    """Collects text and references; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset"):
                self.references.append(value)
            if name == "id":
                self.ids.add(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data) -> None:
        self.words.append(data)


def checked(report: Report) -> Checker:
    parser = Checker()
    parser.feed(report.html())
    assert parser.open == []
    return parser


def draw(theme: Theme):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1) if theme.narrow else (4, 2))
    figure.add_subplot().plot([0, 1], [0, 1], color=theme.accents[0])
    return figure


def full_report() -> Report:
    report = Report("A <b>title</b> & more", "lead")
    report.facts({"variants": "48"})
    report.heading("First")
    report.text("a < b & c")
    report.bullets(["one", "two <i>"])
    report.settings({"seeds": [0, 1], "negative": ""})
    rows = [
        {
            "name": "GradV <x>",
            "f": 0.5,
            "f_ci": [0.4, 0.6],
            "n": 3,
            "curve": [0, 0.5, 1],
            "d": -0.1,
            "d_ci": [-0.2, -0.001],
        },
        {"name": "none", "f": None, "f_ci": None, "n": float("nan"), "curve": (), "d": 0.2},
    ]
    columns = [
        Column("name", "name"), Column("f", "fidelity", "interval", 2), Column("n", "n", "number", 0),
        Column("curve", "shares", "curve"), Column("d", "minus A", "signed", 2, 'a "hint"'),
    ]  # fmt: skip
    report.table(columns, rows, "caption", lambda row: "marked" if row["f"] else "")
    report.figure(draw, "a line", "caption")
    report.heading("Second")
    tile = np.zeros((8, 8, 3), np.uint8)
    report.sheet([[tile, None]], ["a prompt"], ["A base", "TrueCubicHermite"], parents=["A base"], summary="folded")
    report.code("dodgeburn merge <A> <B>", "the command")
    return report


def test_page_is_well_formed_escaped_and_self_contained() -> None:
    page = full_report()
    parser = checked(page)
    text = page.html()
    assert "<b>title</b>" not in text and "<x>" not in text and "<i>" not in text.replace("<i style", "")
    assert all(r.startswith(("data:image/", "#s")) for r in parser.references)
    assert {r[1:] for r in parser.references if r.startswith("#")} <= parser.ids
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:[^\"]*", "", text))
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "Content-Security-Policy" in text


def test_numbers_intervals_and_gaps_are_shown() -> None:
    text = " ".join(checked(full_report()).words)
    assert "0.50" in text and "[0.40, 0.60]" in text and "-0.10" in text and "[-0.20, +0.00]" in text
    assert text.count("–") == 2 and "+0.20" in text and "GradV <x>" in text and "0, 1" in text


def test_figure_has_four_versions() -> None:
    report = Report("t")
    report.figure(draw, "alt")
    text = report.html()
    assert text.count("<source ") == 3 and text.count("data:image/png") == 4
    assert len(set(re.findall(r"data:image/png;base64,[^\"]+", text))) == 4


def test_large_pictures_are_reduced_and_small_ones_kept() -> None:
    import base64
    import io

    def size(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size

    assert size(picture_uri(np.zeros((64, 64, 3), np.uint8))) == (64, 64)
    assert size(picture_uri(np.zeros((1024, 512, 3), np.uint8))) == (128, 256)
    colour = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    back = Image.open(io.BytesIO(base64.b64decode(picture_uri(colour).partition(",")[2])))
    assert np.abs(np.asarray(back.convert("RGB")).astype(int) - colour).max() <= 8


def test_save_is_whole_or_a_user_error(tmp_path) -> None:
    assert full_report().save(tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(UserError):
        full_report().save(tmp_path / "missing" / "r.html")
