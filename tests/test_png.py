"""Infotext as A1111 writes and reads it, ComfyUI graphs, and PNG files."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dodgeburn.errors import UserError
from dodgeburn.images.png import (
    Infotext,
    png_bytes,
    quote,
    read_infotext,
    read_png,
    unquote,
    write_infotext,
    write_picture,
)

pytestmark = pytest.mark.metadata

# A picture's text as A1111 1.10 saves it, with a quoted value and a two-line prompt.
REAL = (
    "masterpiece, (robotic Chicken:1.1) ,\nsecond line\n"
    "Negative prompt: blurry, low quality\n"
    "Steps: 45, Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 4, Seed: 1234, Size: 1344x768, "
    'Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 2, Lora hashes: "a: 0123456789ab, b: 00ff", '
    "Version: v1.10.1"
)

characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
line = st.text(characters.filter(lambda c: c != "\n"), max_size=40).map(str.strip)
lines = st.lists(line.filter(lambda text: not text.startswith("Negative prompt:")), min_size=1, max_size=3)
prompt = lines.map("\n".join).map(str.strip)
key = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]{0,12}[A-Za-z0-9]", fullmatch=True)
value = st.text(characters, min_size=1, max_size=30)


def test_reads_what_a1111_writes() -> None:
    info = read_infotext(REAL)
    assert info.prompt == "masterpiece, (robotic Chicken:1.1) ,\nsecond line"
    assert info.negative == "blurry, low quality"
    assert info.settings["Sampler"] == "DPM++ 2M SDE"
    assert info.settings["Lora hashes"] == "a: 0123456789ab, b: 00ff"
    assert info.settings["Version"] == "v1.10.1" and len(info.settings) == 11
    assert info.size == (1344, 768)


def test_writes_what_a1111_reads() -> None:
    assert write_infotext(read_infotext(REAL)) == REAL


def test_quoting() -> None:
    assert quote("Euler a") == "Euler a"
    assert quote("a, b") == '"a, b"'
    assert quote("a: b") == '"a: b"'
    assert quote("a\nb") == '"a\\nb"'
    assert quote("é, ü") == '"é, ü"'
    assert quote(7) == "7"
    assert unquote('"a, \\"b\\""') == 'a, "b"'
    assert unquote('"broken') == '"broken' and unquote('"') == '"' and unquote("") == ""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", Infotext("")),
        ("a cat", Infotext("a cat")),
        ("a: b, c: d", Infotext("a: b, c: d")),  # keys of one letter do not count
        ("Steps: 20, Seed: 1", Infotext("Steps: 20, Seed: 1")),  # two pairs are not settings
        ("Steps: 20, Seed: 1, Size: 8x8", Infotext("", "", {"Steps": "20", "Seed": "1", "Size": "8x8"})),
        ("p\nNegative prompt: n", Infotext("p", "n")),
        ("p\nNegative prompt:\nn\nm", Infotext("p", "\nn\nm")),
    ],
)
def test_reads_leniently(text: str, wanted: Infotext) -> None:
    assert read_infotext(text) == wanted


@given(prompt, prompt, st.dictionaries(key, value, min_size=3, max_size=6))
@settings(max_examples=80, deadline=None)
def test_infotext_round_trip(prompt: str, negative: str, pairs: dict[str, str]) -> None:
    info = Infotext(prompt, negative, pairs)
    assert read_infotext(write_infotext(info)) == info


@given(st.text(characters, max_size=60))
@settings(max_examples=80, deadline=None)
def test_any_text_can_be_read(text: str) -> None:
    read_infotext(text)
    assert unquote(quote(text)) == text


@given(prompt, st.dictionaries(key, value, min_size=3, max_size=4))
@settings(max_examples=30, deadline=None)
def test_png_round_trip(prompt: str, pairs: dict[str, str]) -> None:
    from io import BytesIO

    own = {"prompt": prompt, "nested": {"a": [1, 2.5, None]}}
    data = png_bytes(Image.new("RGB", (4, 3), (1, 2, 3)), Infotext(prompt, "", pairs), own)
    found = read_png(BytesIO(data))  # type: ignore[arg-type]
    assert found.infotext == Infotext(prompt, "", pairs)
    assert found.own == own
    assert found.graph is None


def test_same_bytes_and_file(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    info = Infotext("é ü 漢字", "", {"Steps": "1", "Seed": "2", "Size": "8x8"})
    assert png_bytes(image, info) == png_bytes(image, info)
    write_picture(tmp_path / "a.png", image, info, {"seed": 2})
    assert read_png(tmp_path / "a.png").infotext == info
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as again:
        assert again.getpixel((0, 0)) == (200, 10, 10)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_png(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="not a picture"):
        read_png(tmp_path / "text.png")
    data = png_bytes(Image.effect_noise((64, 64), 50), Infotext("p"))
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_png(tmp_path / "cut.png")
    with pytest.raises(UserError):
        write_picture(tmp_path / "no-folder" / "a.png", Image.new("RGB", (1, 1)))


def test_foreign_chunks_do_no_harm(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "{not json")
    info.add_text("dodgeburn", "[1, 2]")
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=info)
    found = read_png(tmp_path / "a.png")
    assert found.graph is None and found.own is None and found.infotext is None
    assert found.chunks["prompt"] == "{not json"


def test_reading_needs_no_torch() -> None:
    code = "import sys, dodgeburn.images.png; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
