"""The pocket world: draws a portrait from its attributes, deterministically.

One drawing on a 256 x 256 canvas is reduced to 64 x 64 or 128 x 128, so both sizes show the same picture.
All lengths below are in units of 1/64 of the picture's side.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from dodgeburn.pocket.attributes import Attributes

CANVAS = 256
UNIT = CANVAS / 64
Colour = tuple[int, int, int]
Look = Literal["plain", "ink", "bold"]
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
SKIN: tuple[Colour, ...] = ((250, 218, 192), (206, 150, 108), (84, 50, 34))
LINE: Colour = (24, 20, 26)
LIP: Colour = (176, 34, 48)


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
    pen.polygon([(28, 40), (36, 40), (36, 54), (28, 54)], mix(skin, LINE, 0.18))
    pen.polygon([(9, 66), (11, 57), (17, 52.5), (27, 50), (32, 53), (37, 50), (47, 52.5), (53, 57), (55, 66)], cloth)
    if a["outfit"] == "doctor":
        for r in ((1.2, 3.6), (3.6, 1.2)):
            pen.polygon([(41 - r[0], 58 - r[1]), (41 + r[0], 58 - r[1]), (41 + r[0], 58 + r[1]),
                         (41 - r[0], 58 + r[1])], (214, 30, 40), outlined=False)  # fmt: skip
        pen.line([(28, 51), (32, 58), (36, 51)], (150, 160, 172), 1.2)
    elif a["outfit"] == "firefighter":
        for y in (56.5, 61.5):
            pen.line([(12, y), (52, y)], (250, 220, 40), 2.2)
    elif a["outfit"] == "gardener":
        pen.polygon([(22, 57), (42, 57), (42, 66), (22, 66)], (44, 104, 52))
        pen.line([(22, 57), (20, 51.5)], (44, 104, 52), 2.6)
        pen.line([(42, 57), (44, 51.5)], (44, 104, 52), 2.6)


def _hair_behind(pen: _Pen, a: Attributes, rx: float, hair: Colour) -> None:
    bottom, w = 25 + 30 * a["hair_length"], rx + 4.4
    points = [(32 + w * math.cos(t), 26 - 15.5 * math.sin(t)) for t in np.linspace(0, math.pi, 17)]
    pen.polygon([*points, (32 - w, bottom - 2), (32 - w + 2, bottom), (32 + w - 2, bottom), (32 + w, bottom - 2)], hair)


def _face(pen: _Pen, a: Attributes, rx: float, skin: Colour, hair: Colour) -> None:
    pen.ellipse(32, 30, rx, 15, skin)
    if a["beard"] > 0.03:  # grows down from the jaw and up the cheeks
        b, fill = a["beard"], mix(hair, LINE, 0.25)
        top, bottom = 40 - 5 * b, 43 + 11 * b
        outer = [(32 + rx * math.sqrt(max(0.0, 1 - ((y - 30) / 15) ** 2)) * 1.02, y)
                 for y in np.linspace(top, 43.5, 7)]  # fmt: skip
        low = [(32 + (rx * 0.62) * math.cos(t), 43.5 + (bottom - 43.5) * math.sin(t))
               for t in np.linspace(0.15, math.pi - 0.15, 11)]  # fmt: skip
        inner = [(32 - 6.2, 40.5 - 3.4 * b), (32 + 6.2, 40.5 - 3.4 * b)]
        pen.polygon([*outer, *low, *[(64 - x, y) for x, y in reversed(outer)], *inner], fill)
        pen.ellipse(32, 39, 5.6, 2.8, skin, outlined=False)
    if a["age"] < 0.5:
        blush = mix(skin, (232, 76, 92), 0.85 * (1 - 2 * a["age"]))
        for side in (-1, 1):
            pen.ellipse(32 + side * rx * 0.62, 35, 2.6, 1.9, blush, outlined=False)
    if a["age"] > 0.15:
        old = mix(skin, (40, 20, 16), 0.85 * (a["age"] - 0.15))
        for side in (-1, 1):
            pen.line([(32 + side * 4.0, 34.5), (32 + side * 6.6, 38.8)], old, 1.1)
            x = 32 + side * rx * 0.46
            pen.line([(x - 2.4, 32.2), (x, 33.1), (x + 2.4, 32.2)], old, 1.0)
        pen.line([(26.5, 22.4), (37.5, 22.4)], old, 1.0)


def _features(pen: _Pen, a: Attributes, rx: float, skin: Colour) -> None:
    dark = mix(skin, LINE, 0.55)
    pen.line([(32, 30), (31, 34.2), (32.6, 34.6)], dark, 0.7)
    r = 1.5 + 1.9 * a["eye_size"]
    tilt = (a["brow_angle"] - 0.5) * 6.0
    for side in (-1, 1):
        x = 32 + side * rx * 0.46
        pen.ellipse(x, 29, r * 1.15, r, (252, 252, 252))
        pen.ellipse(x, 29, r * 0.52, r * 0.52, (34, 56, 96), outlined=False)
        pen.line([(x - side * 2.9, 24.6 + tilt / 2), (x + side * 2.9, 24.6 - tilt / 2)], LINE, 1.3)
    curve = (a["smile"] - 0.5) * 9.2
    mouth = [(32 + 5.8 * u, 39.2 + curve / 2 * 0.9 - curve * u * u * 0.9) for u in np.linspace(-1, 1, 9)]
    pen.line(mouth, LIP, 1.6)


def _hair_front(pen: _Pen, rx: float, hair: Colour) -> None:
    w = rx + 1.6
    top = [(32 + w * math.cos(t), 22.5 - 11.5 * math.sin(t)) for t in np.linspace(0, math.pi, 17)]
    pen.polygon([*top, (32 - w, 24), (32 - w + 2.2, 24), (32 - rx * 0.72, 20.6), (32, 19.6), (32 + rx * 0.72, 20.6),
                 (32 + w - 2.2, 24), (32 + w, 24)], hair)  # fmt: skip


def _glasses(pen: _Pen, rx: float) -> None:
    for side in (-1, 1):
        pen.ellipse(32 + side * rx * 0.46, 29, 4.6, 4.4, None, line=1.0)
    pen.line([(32 - 1.0, 28.2), (32 + 1.0, 28.2)], LINE, 1.0)
    for side in (-1, 1):
        pen.line([(32 + side * (rx * 0.46 + 4.6), 28.6), (32 + side * rx * 1.02, 27.6)], LINE, 1.0)


def _hat(pen: _Pen, kind: str, rx: float) -> None:
    w = rx + 2.4
    if kind == "top hat":
        pen.polygon([(32 - w * 0.66, 4), (32 + w * 0.66, 4), (32 + w * 0.62, 16), (32 - w * 0.62, 16)], (38, 30, 56))
        pen.polygon([(32 - w * 0.64, 12.4), (32 + w * 0.64, 12.4), (32 + w * 0.63, 14.8), (32 - w * 0.63, 14.8)],
                    (176, 40, 60), outlined=False)  # fmt: skip
        pen.polygon([(32 - w - 3, 15), (32 + w + 3, 15), (32 + w + 3, 17.6), (32 - w - 3, 17.6)], (38, 30, 56))
    elif kind == "cap":
        dome = [(32 + w * math.cos(t), 17.5 - 9 * math.sin(t)) for t in np.linspace(0, math.pi, 13)]
        pen.polygon([*dome, (32 - w, 17.5)], (226, 110, 30))
        pen.polygon([(32 - 2, 15.2), (32 + w + 6, 15.6), (32 + w + 5, 18.6), (32 - 2, 18.6)], (160, 70, 16))
    elif kind == "crown":
        pen.polygon([(32 - w * 0.8, 17), (32 - w * 0.9, 6), (32 - w * 0.45, 11), (32, 4.5), (32 + w * 0.45, 11),
                     (32 + w * 0.9, 6), (32 + w * 0.8, 17)], (250, 206, 30))  # fmt: skip
        for dx in (-0.5, 0, 0.5):
            pen.ellipse(32 + w * dx, 14, 1.1, 1.1, (200, 30, 70), outlined=False)


def _hand(image: Image.Image, fingers: int, skin: Colour, outline: float) -> None:
    """A raised hand at the right: not zoomed with the person, so that its fingers can always be counted."""
    draw, px, py = ImageDraw.Draw(image), 52.0, 47.0
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
    pen = _Pen(image, 0.86 + 0.28 * a["zoom"], -4.5 if a["hand"] == "waving" else 0.0, outline)
    rx, skin, hair = 10.2 + 3.8 * a["face_width"], skin_colour(a["skin_tone"]), HAIR[a["hair_colour"]]
    _hair_behind(pen, a, rx, hair)
    _body(pen, a, skin)
    _face(pen, a, rx, skin, hair)
    _features(pen, a, rx, skin)
    _hair_front(pen, rx, hair)
    if a["glasses"] == "glasses":
        _glasses(pen, rx)
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
    chroma = 0.45 + 0.9 * a["saturation"]
    luma = (x @ _LUMA)[..., None]
    x = np.clip(luma + (x - luma) * chroma, 0, 1)
    x = x ** np.float32(2.0 ** (0.75 - 1.5 * a["brightness"]))  # gamma 1.68 (dark) to 0.59 (bright)
    if look == "ink":  # warm paper: no pure white, a sepia cast
        x = x * np.array([0.98, 0.93, 0.80], np.float32) + np.array([0.02, 0.015, 0.0], np.float32)
    if look == "bold":  # an S-curve for contrast, then more chroma
        x = x + 0.55 * x * (1 - x) * (2 * x - 1) * 2
        luma = (x @ _LUMA)[..., None]
        x = luma + (x - luma) * 1.35
    sigma = 0.75 * (1 - a["sharpness"]) * size / 64
    if sigma > 0.12 * size / 64:
        x = _blur(x, sigma)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
