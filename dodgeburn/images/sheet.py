"""Contact sheets: pictures in rows and columns with labels, sized to be read."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dodgeburn.errors import UserError

BACKGROUND = (250, 250, 250)
INK = (30, 30, 30)
FAINT = (220, 220, 220)
RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures side by side without labels, row by row; `columns` None makes it about square. RGB."""
    if not images:
        raise UserError("a grid needs at least one picture")
    per_row = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = [list(images[i : i + per_row]) for i in range(0, len(images), per_row)]
    return contact_sheet(rows, gap=gap, cell=max(max(i.size) for i in images))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str = "",
    cell: int | None = None,
    resample: str = "bicubic",
    font_size: int | None = None,
    gap: int = 6,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """A sheet of pictures, one list a row; None leaves a cell empty.

    `cell` is the longer side in pixels that a picture is drawn at; None draws pictures smaller than 192
    pixels at the next whole multiple that reaches it (64 -> 192, 128 -> 256), others as they are.
    `captions` are written under the pictures, one each in the same rows.
    `resample` "nearest" shows the model's own pixels, "bicubic" is kinder. Long labels are wrapped. Returns
    RGB. Raises UserError for no pictures, label lists of the wrong length, or an unknown `resample`.
    """
    pictures = [image for row in rows for image in row if image is not None]
    if not pictures:
        raise UserError("a contact sheet needs at least one picture")
    if resample not in RESAMPLING:
        raise UserError(f"unknown resampling {resample!r}: expected {' or '.join(RESAMPLING)}")
    columns = max(len(row) for row in rows)
    for what, labels, wanted in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels is not None and len(labels) != wanted:
            raise UserError(f"{len(labels)} {what} labels for {wanted} {what}s")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise UserError("captions do not fit the pictures: give one for each, in the same rows")
    longest = max(max(image.size) for image in pictures)
    side = cell or (longest if longest >= 192 else longest * -(-192 // longest))
    width, height = (max(round(image.size[axis] * side / max(image.size)) for image in pictures) for axis in (0, 1))

    font = _font(font_size or max(12, side // 14))
    heading = _font(round((font_size or max(12, side // 14)) * 1.4))
    left = _Labels(row_labels or [], font, max(width, 120) if row_labels else 0)
    top = _Labels(column_labels or [], font, width)
    x0 = gap + (left.width + gap if row_labels else 0)
    title_lines = _wrap(title, heading, x0 + columns * (width + gap) - gap) if title else []
    title_height = len(title_lines) * _line_height(heading) + (gap if title_lines else 0)
    y0 = gap + title_height + (top.height + gap if column_labels else 0)
    under = [[_wrap(text, font, width) for text in row] for row in captions or []]
    below = max((len(lines) for row in under for lines in row), default=0) * _line_height(font)

    sheet = Image.new("RGB", (x0 + columns * (width + gap), y0 + len(rows) * (height + below + gap)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title_lines:
        draw.multiline_text((gap, gap), "\n".join(title_lines), fill=INK, font=heading)
    for c, lines in enumerate(top.wrapped):
        draw.multiline_text(
            (x0 + c * (width + gap) + width / 2, y0 - gap), "\n".join(lines), fill=INK, font=font,
            anchor="md", align="center",
        )  # fmt: skip
    for r, row in enumerate(rows):
        y = y0 + r * (height + below + gap)
        if row_labels:
            draw.multiline_text((gap, y + height / 2), "\n".join(left.wrapped[r]), fill=INK, font=font, anchor="lm")
        for c in range(columns):
            x = x0 + c * (width + gap)
            image = row[c] if c < len(row) else None
            if image is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), outline=FAINT)
                continue
            scale = side / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            drawn = image.convert("RGB")
            if size != image.size:
                drawn = drawn.resize(size, RESAMPLING[resample])
            sheet.paste(drawn, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
        for c, lines in enumerate(under[r] if under else ()):
            x = x0 + c * (width + gap)
            draw.multiline_text((x + width / 2, y + height + 2), "\n".join(lines), fill=INK, font=font, anchor="ma",
                                align="center")  # fmt: skip
    return sheet


class _Labels:
    """Labels wrapped to a width; the room they take."""

    def __init__(self, labels: Sequence[str], font: ImageFont.FreeTypeFont, width: int) -> None:
        self.wrapped = [_wrap(label, font, width) for label in labels]
        lines = [line for label in self.wrapped for line in label]
        self.width = round(max((font.getlength(line) for line in lines), default=0)) + 2
        self.height = max((len(label) for label in self.wrapped), default=0) * _line_height(font)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 4  # 4 is multiline_text's spacing


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of `text` that fit `width` pixels; words longer than a line are broken."""
    per_line = max(4, int(width / max(1.0, font.getlength("abcdefghij") / 10)))
    lines: list[str] = []
    for paragraph in text.split("\n"):
        n = per_line
        wrapped = textwrap.wrap(paragraph, n) or [""]
        while n > 4 and any(font.getlength(line) > width for line in wrapped):
            n -= 1
            wrapped = textwrap.wrap(paragraph, n) or [""]
        lines += wrapped
    return lines
