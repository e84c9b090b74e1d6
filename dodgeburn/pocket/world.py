"""The pocket world: draws a portrait from its attributes, deterministically.

One drawing on a 256 x 256 canvas is reduced to 64 x 64 or 128 x 128, so both sizes show the same picture.
All lengths below are in units of 1/64 of the picture's side.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from dodgeburn.pocket.attributes import Attributes

CANVAS = 256
UNIT = CANVAS / 64
Colour = tuple[int, int, int]
Look = Literal["plain", "ink", "bold"]
LOOKS: tuple[Look, ...] = get_args(Look)
"""`plain` is the world; `ink` and `bold` are the looks that the two shipped fine-tunes are trained on."""

HAIR: dict[str, Colour] = {
    "black": (28, 26, 30), "brown": (112, 68, 36), "blonde": (238, 200, 92),
    "red": (196, 72, 24), "white": (240, 240, 238), "blue": (40, 150, 190),
}  # fmt: skip
BACKGROUND: dict[str, Colour] = {
    "blue": (66, 108, 196), "green": (62, 152, 84), "yellow": (244, 208, 58),
    "red": (214, 66, 62), "purple": (140, 66, 172), "grey": (148, 160, 164),
}  # fmt: skip
OUTFIT: dict[str, Colour] = {
    "casual": (62, 72, 92), "doctor": (238, 242, 246), "firefighter": (120, 28, 30), "gardener": (190, 206, 226),
}  # fmt: skip
SKIN: tuple[Colour, ...] = ((252, 222, 198), (204, 148, 106), (100, 62, 44))
LINE: Colour = (24, 20, 26)
EYE_AT = 0.47  # eyes this far from the middle, as a share of the face's half width
LIP: Colour = (186, 24, 48)
TEETH: Colour = (252, 240, 234)
LENS: Colour = (150, 214, 250)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Colour a share t of the way from a to b."""
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def skin_colour(tone: float) -> Colour:
    """Skin colour for a tone in [0, 1]."""
    return mix(SKIN[0], SKIN[1], tone * 2) if tone < 0.5 else mix(SKIN[1], SKIN[2], tone * 2 - 1)


class _Pen:
    """Draws in person coordinates: zoomed about the middle of the lower edge, shifted sideways for the hand."""

    def __init__(self, image: Image.Image, zoom: float, shift: float, outline: float) -> None:
        self.draw, self.zoom, self.shift, self.outline = ImageDraw.Draw(image), zoom, shift, outline

    def at(self, x: float, y: float) -> tuple[float, float]:
        return ((32 + (x - 32) * self.zoom + self.shift) * UNIT, (64 + (y - 64) * self.zoom) * UNIT)

    def width(self, w: float) -> int:
        return max(1, round(w * self.zoom * UNIT))

    def polygon(self, points: list[tuple[float, float]], fill: Colour, outlined: bool = True) -> None:
        p = [self.at(x, y) for x, y in points]
        self.draw.polygon(p, fill=fill)
        if outlined and self.outline:
            w = max(1, round(self.outline * UNIT))
            self.draw.line([*p, p[0], p[1]], fill=LINE, width=w, joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour | None, line: float = 0, outlined: bool = True
    ) -> None:
        x0, y0 = self.at(x - rx, y - ry)
        x1, y1 = self.at(x + rx, y + ry)
        w = self.width(line) if line else (max(1, round(self.outline * UNIT)) if outlined and self.outline else 0)
        self.draw.ellipse((x0, y0, x1, y1), fill=fill, outline=LINE if w else None, width=w)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        p, w = [self.at(x, y) for x, y in points], self.width(width)
        self.draw.line(p, fill=fill, width=w, joint="curve")
        for x, y in (p[0], p[-1]):  # round ends
            self.draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=fill)


def _background(image: Image.Image, a: Attributes) -> None:
    if a["style"] != "poster":
        return
    draw, base = ImageDraw.Draw(image), BACKGROUND[a["background"]]
    light = mix(base, (255, 255, 255), 0.38)
    for k in range(0, 16, 2):  # a sunburst: eight light rays behind the head
        t0, t1 = (k * math.pi / 8, (k + 1) * math.pi / 8)
        points = [(128, 128)] + [(128 + 300 * math.cos(t), 128 + 300 * math.sin(t)) for t in (t0, t1)]
        draw.polygon(points, fill=light)


def _body(pen: _Pen, a: Attributes, skin: Colour) -> None:
    cloth = OUTFIT[a["outfit"]]
    pen.polygon([(27.5, 42), (36.5, 42), (36.5, 56), (27.5, 56)], mix(skin, LINE, 0.18))
    pen.polygon([(8, 66), (10, 58), (16, 54), (26.5, 51.5), (32, 54.5), (37.5, 51.5), (48, 54), (54, 58), (56, 66)],
                cloth)  # fmt: skip
    if a["outfit"] == "doctor":
        for r in ((1.2, 3.4), (3.4, 1.2)):
            pen.polygon([(42 - r[0], 59 - r[1]), (42 + r[0], 59 - r[1]), (42 + r[0], 59 + r[1]),
                         (42 - r[0], 59 + r[1])], (214, 30, 40), outlined=False)  # fmt: skip
        pen.line([(27.5, 52.5), (32, 59), (36.5, 52.5)], (150, 160, 172), 1.2)
    elif a["outfit"] == "firefighter":
        for y in (57, 61.6):
            pen.line([(12, y), (52, y)], (250, 220, 40), 2.2)
    elif a["outfit"] == "gardener":
        pen.polygon([(22, 58), (42, 58), (42, 66), (22, 66)], (44, 104, 52))
        pen.line([(22, 58), (20, 53)], (44, 104, 52), 2.6)
        pen.line([(42, 58), (44, 53)], (44, 104, 52), 2.6)


def _hair_behind(pen: _Pen, a: Attributes, rx: float, hair: Colour) -> None:
    bottom, w = 25 + 31 * a["hair_length"], rx + 4.2
    points = [(32 + w * math.cos(t), 26 - 16.5 * math.sin(t)) for t in np.linspace(0, math.pi, 17)]
    pen.polygon([*points, (32 - w, bottom - 2), (32 - w + 2, bottom), (32 + w - 2, bottom), (32 + w, bottom - 2)], hair)


def _face(pen: _Pen, a: Attributes, rx: float, skin: Colour, hair: Colour) -> None:
    pen.ellipse(32, 30.5, rx, 16.5, skin)
    if a["beard"] > 0.03:  # grows down from the jaw and up the cheeks
        b, fill = a["beard"], mix(hair, LINE, 0.25)
        top, bottom = 42 - 5.5 * b, 46 + 11 * b
        outer = [(32 + rx * math.sqrt(max(0.0, 1 - ((y - 30.5) / 16.5) ** 2)) * 1.02, y)
                 for y in np.linspace(top, 45.5, 7)]  # fmt: skip
        low = [(32 + (rx * 0.62) * math.cos(t), 45.5 + (bottom - 45.5) * math.sin(t))
               for t in np.linspace(0.15, math.pi - 0.15, 11)]  # fmt: skip
        inner = [(32 - 7.6, 42.5 - 4.2 * b), (32 + 7.6, 42.5 - 4.2 * b)]
        pen.polygon([*outer, *low, *[(64 - x, y) for x, y in reversed(outer)], *inner], fill)
        pen.ellipse(32, 40.4, 7.2, 4.0, skin, outlined=False)
    _age(pen, a["age"], rx, skin)


def _age(pen: _Pen, age: float, rx: float, skin: Colour) -> None:
    """Cheeks from rosy through plain to hollow, and wrinkles that deepen."""
    rosy, hollow = max(0.0, 1 - 2 * age), max(0.0, 2 * age - 1)
    cheek = mix(mix(skin, (255, 120, 150), 0.9 * rosy), (46, 28, 26), 0.66 * hollow)
    wrinkle = mix(skin, (40, 20, 16), 0.85 * age)
    for side in (-1, 1):
        pen.ellipse(32 + side * rx * 0.68, 36.0, 3.5, 2.6, cheek, outlined=False)
    if age > 0.1:
        for y in (18.3, 20.5):
            pen.line([(26.0, y), (38.0, y)], wrinkle, 1.2)


def _features(pen: _Pen, a: Attributes, rx: float, skin: Colour) -> None:
    dark = mix(skin, LINE, 0.55)
    pen.line([(32, 30.5), (30.8, 35.2), (32.8, 35.6)], dark, 0.9)
    r = 1.5 + 2.4 * a["eye_size"]
    tilt = (a["brow_angle"] - 0.5) * 7.6
    for side in (-1, 1):
        x = 32 + side * rx * EYE_AT
        pen.ellipse(x, 29, r * 1.15, r, (252, 252, 252))
        pen.ellipse(x, 29, r * 0.54, r * 0.54, (30, 50, 96), outlined=False)
        pen.line([(x - side * 3.7, 22.8 + tilt / 2), (x + side * 3.7, 22.8 - tilt / 2)], LINE, 1.9)
    curve = (a["smile"] - 0.5) * 10.5
    mouth = [(32 + 6.9 * u, 40.6 + curve * (0.45 - 0.9 * u * u)) for u in np.linspace(-1, 1, 11)]
    pen.line(mouth, LIP, 3.2)
    pen.line(mouth, TEETH, 1.0)  # light inside red: seen on pale skin and on dark


def _hair_front(pen: _Pen, rx: float, hair: Colour) -> None:
    w = rx + 1.6
    top = [(32 + w * math.cos(t), 22.5 - 12.5 * math.sin(t)) for t in np.linspace(0, math.pi, 17)]
    pen.polygon([*top, (32 - w, 24), (32 - w + 2.2, 24), (32 - rx * 0.76, 17.8), (32, 16.8), (32 + rx * 0.76, 17.8),
                 (32 + w - 2.2, 24), (32 + w, 24)], hair)  # fmt: skip


def _glasses(pen: _Pen, rx: float, skin: Colour) -> None:
    """Tinted lenses under the eyes, a dark frame: wide enough that glasses are more than a line at 64 pixels."""
    for side in (-1, 1):
        x = 32 + side * rx * EYE_AT
        pen.ellipse(x, 29.2, 5.4, 5.2, mix(skin, LENS, 0.6), line=1.4)
        pen.line([(x + side * 5.4, 28.6), (32 + side * rx * 1.02, 27.6)], LINE, 1.4)
    pen.line([(32 - 1.2, 28.2), (32 + 1.2, 28.2)], LINE, 1.4)


def _hat(pen: _Pen, kind: str, rx: float) -> None:
    w = rx + 2.4
    if kind == "top hat":
        pen.polygon([(32 - w * 0.66, 3), (32 + w * 0.66, 3), (32 + w * 0.62, 14), (32 - w * 0.62, 14)], (38, 30, 56))
        pen.polygon([(32 - w * 0.64, 10.6), (32 + w * 0.64, 10.6), (32 + w * 0.63, 13), (32 - w * 0.63, 13)],
                    (176, 40, 60), outlined=False)  # fmt: skip
        pen.polygon([(32 - w - 3, 13.2), (32 + w + 3, 13.2), (32 + w + 3, 15.8), (32 - w - 3, 15.8)], (38, 30, 56))
    elif kind == "cap":
        dome = [(32 + w * math.cos(t), 15.7 - 9 * math.sin(t)) for t in np.linspace(0, math.pi, 13)]
        pen.polygon([*dome, (32 - w, 15.7)], (226, 110, 30))
        pen.polygon([(32 - 2, 13.4), (32 + w + 5, 13.8), (32 + w + 4, 16.8), (32 - 2, 16.8)], (160, 70, 16))
    elif kind == "crown":
        pen.polygon([(32 - w * 0.8, 15.2), (32 - w * 0.9, 5), (32 - w * 0.45, 9.6), (32, 3.5), (32 + w * 0.45, 9.6),
                     (32 + w * 0.9, 5), (32 + w * 0.8, 15.2)], (250, 206, 30))  # fmt: skip
        for dx in (-0.5, 0, 0.5):
            pen.ellipse(32 + w * dx, 12.4, 1.1, 1.1, (200, 30, 70), outlined=False)


def _hand(image: Image.Image, fingers: int, skin: Colour, outline: float) -> None:
    """A raised hand at the right: not zoomed with the person, so that its fingers can always be counted."""
    draw, px, py = ImageDraw.Draw(image), 52.0, 48.0
    edge = LINE if outline else mix(skin, LINE, 0.62)
    spread = math.radians(32)
    angles = [math.pi / 2 + (k - (fingers - 1) / 2) * spread for k in range(fingers)]
    for grow, colour in ((0.55 + outline / 2, edge), (0.0, skin)):
        for x0, y0, x1, y1, w in [(px, py, px + 1.5, 68, 5.4), *[
            (px + 3 * math.cos(t), py - 3 * math.sin(t), px + 10.2 * math.cos(t), py - 10.2 * math.sin(t), 2.5)
            for t in angles
        ]]:  # fmt: skip
            r = (w / 2 + grow) * UNIT
            draw.line([(x0 * UNIT, y0 * UNIT), (x1 * UNIT, y1 * UNIT)], fill=colour, width=round(2 * r))
            draw.ellipse((x1 * UNIT - r, y1 * UNIT - r, x1 * UNIT + r, y1 * UNIT + r), fill=colour)
        r = (4.6 + grow) * UNIT
        draw.ellipse((px * UNIT - r, py * UNIT - r, px * UNIT + r, py * UNIT + r), fill=colour)


def drawing(a: Attributes, look: Look = "plain") -> Image.Image:
    """The 256 x 256 drawing before light, colour and focus are applied."""
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUND[a["background"]])
    _background(image, a)
    outline = {"comic": 0.8}.get(a["style"], 0.0) + (0.5 if look == "ink" else 0.0)
    pen = _Pen(image, 0.88 + 0.22 * a["zoom"], -6.5 if a["hand"] == "waving" else 0.0, outline)
    rx, skin, hair = 11.2 + 4.2 * a["face_width"], skin_colour(a["skin_tone"]), HAIR[a["hair_colour"]]
    _hair_behind(pen, a, rx, hair)
    _body(pen, a, skin)
    _face(pen, a, rx, skin, hair)
    if a["glasses"] == "glasses":
        _glasses(pen, rx, skin)
    _features(pen, a, rx, skin)
    _hair_front(pen, rx, hair)
    if a["hat"] != "none":
        _hat(pen, a["hat"], rx)
    if a["hand"] == "waving":
        _hand(image, a["fingers"], skin, outline)
    return image


_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _light(size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1)
    return (1.22 - 0.72 * (0.55 * x + 0.45 * y))[..., None]


_LIGHT = {size: _light(size) for size in (64, 128)}


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian blur, edges repeated. x: [h, w, 3] float."""
    r = max(1, math.ceil(3 * sigma))
    k = np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2).astype(np.float32)
    k /= k.sum()
    for axis in (0, 1):
        p = np.pad(x, [(r, r) if i == axis else (0, 0) for i in range(3)], mode="edge")
        n = x.shape[axis]
        x = sum(k[i] * (p[i : i + n] if axis == 0 else p[:, i : i + n]) for i in range(2 * r + 1))
    return x


def render(a: Attributes, size: int = 64, look: Look = "plain") -> np.ndarray:
    """The finished picture: uint8 [size, size, 3]. `size` is 64 or 128; same attributes, same bytes."""
    if size not in _LIGHT:
        raise ValueError(f"the pocket world draws at 64 or 128 pixels, not {size}")
    x = np.asarray(drawing(a, look).reduce(CANVAS // size), dtype=np.float32) / 255
    if a["style"] == "shaded":
        x = np.minimum(x * _LIGHT[size], 1)
    chroma = 0.4 + 0.95 * a["saturation"]
    luma = (x @ _LUMA)[..., None]
    x = np.clip(luma + (x - luma) * chroma, 0, 1)
    x = x ** np.float32(2.0 ** (0.65 - 1.3 * a["brightness"]))  # gamma 1.57 (dark) to 0.64 (bright)
    if look == "ink":  # warm paper: no pure white, a sepia cast
        x = x * np.array([0.98, 0.93, 0.80], np.float32) + np.array([0.02, 0.015, 0.0], np.float32)
    if look == "bold":  # an S-curve for contrast, then more chroma
        x = x + 0.55 * x * (1 - x) * (2 * x - 1) * 2
        luma = (x @ _LUMA)[..., None]
        x = luma + (x - luma) * 1.35
    # The sharpest picture is blurred too, because below 0.35 pixels a blur changes nothing at 64 pixels.
    x = _blur(x, (0.35 + 0.65 * (1 - a["sharpness"])) * size / 64)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
