"""What a picture has that the nearest picture of its world has not, piece by piece: maps of excess and what they are.

A pixel may lie anywhere between its neighbours' colours in the other picture (3 x 3), so edges may be a pixel off in
either picture without counting; only what is beyond that by more than `TOLERANCE` grey levels does. Connected excess is
a piece, and each piece is named by what would explain it: a part that isn't there, one too many, blur, a colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dodgeburn.foresee.nearest import Fit
from dodgeburn.pocket.attributes import Attributes
from dodgeburn.pocket.world import EYE_AT, render

TOLERANCE = 18.0  # grey levels of 255; autoencoder round trips stay below on all but a few pixels
SPECKLE = 26.0  # grey levels by which a pixel stands out from its neighbours' median
CAST = 14.0  # grey levels that a picture's colours may be off everywhere
LEAST_AREA = 4  # pixels of a piece
THICK = 3  # pixels that a piece must be wide somewhere: thinner ones are outlines a little lighter or off
ALONE = 4  # pixels of speckle that may touch: more of them are a line
FLAT = 24.0  # grey levels of deviation below which a drawn eye is too faint to be missed
SIDE = 64
HAND_FROM, HAND_ABOVE = 44, 32  # columns of a hand, and rows above it
Part = tuple[np.ndarray, np.ndarray]
"""Where a part is drawn, bool [64, 64], and the drawing without it, [64, 64, 3]."""


@dataclass
class Piece:
    """Connected excess. mass: summed excess, in pixels that are wrong from black to white."""

    kind: str  # one of labels.TYPES
    mass: float
    where: np.ndarray  # bool [64, 64]


def beyond(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far a lies outside the range of b's 3 x 3 neighbourhoods, in grey levels; [h, w, 3] -> [h, w]."""
    high, low = ndimage.maximum_filter(b, (3, 3, 1)), ndimage.minimum_filter(b, (3, 3, 1))
    return np.maximum(0, np.maximum(a - high, low - a)).max(-1)


def tint(picture: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The map of colours (affine, [4, 3], the last row added) that takes the drawing to the picture's tint.

    Fitted robustly and held near the identity: light and contrast a little off are no artifact, but part of a
    generator's look.
    """
    x, y = _with_one(drawn), picture.reshape(-1, 3) / np.float32(255)
    at = np.eye(4, 3, dtype=np.float32)
    pull = 0.02 * len(x)
    for _ in range(4):
        weight = np.minimum(1, 0.04 / np.maximum(np.abs(y - x @ at).max(1, keepdims=True), 1e-6))
        at = np.linalg.solve(x.T @ (weight * x) + pull * np.eye(4), x.T @ (weight * y) + pull * np.eye(4, 3))
        at = at.astype(np.float32)
    return at


def tinted(drawn: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The drawing [h, w, 3] with its colours mapped."""
    return (np.clip(_with_one(drawn) @ at, 0, 1) * 255).reshape(drawn.shape)


def _with_one(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(-1, 3)
    return np.concatenate([flat / 255, np.ones((len(flat), 1))], 1).astype(np.float32)


def speckle(picture: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Pixels that stand out from their neighbours where nothing drawn does, in grey levels beyond SPECKLE; [h, w]."""
    own = np.abs(picture - ndimage.median_filter(picture, (3, 3, 1))).max(-1)
    expected = np.abs(drawn - ndimage.median_filter(drawn, (3, 3, 1))).max(-1)
    found = np.maximum(0, own - ndimage.maximum_filter(expected, 3) - SPECKLE)
    labels, n = ndimage.label(found > 0, np.ones((3, 3)))
    long = np.flatnonzero(np.bincount(labels.ravel(), minlength=n + 1)[1:] > ALONE) + 1
    return np.where(np.isin(labels, long), 0, found)


def thick(over: np.ndarray) -> np.ndarray:
    """Where excess [h, w] belongs to something that is THICK pixels wide, and the pixels beside it: bool [h, w]."""
    core = ndimage.binary_opening(over > 0, np.ones((THICK, THICK), bool))
    return np.asarray(ndimage.binary_dilation(core, np.ones((3, 3), bool)) & (over > 0))


def pieces(picture: np.ndarray, fit: Fit) -> tuple[list[Piece], float, np.ndarray]:
    """The pieces left over of a picture float32 [64, 64, 3], its colour cast in grey levels, and speckle [64, 64]."""
    at = tint(picture, fit.pixels)
    drawn = tinted(fit.pixels, at)
    cast = float(np.abs(drawn - fit.in_world_light()).mean())
    noise = speckle(picture, drawn)
    excess = np.maximum(beyond(picture, drawn), beyond(drawn, picture))
    smooth = ndimage.median_filter(picture, (3, 3, 1))
    without_noise = np.maximum(beyond(smooth, drawn), beyond(drawn, ndimage.maximum_filter(picture, (3, 3, 1))))
    excess = np.where(ndimage.maximum_filter(noise, 3) > 0, np.minimum(excess, without_noise), excess)
    over = np.maximum(0, excess - TOLERANCE)
    over = np.where(thick(over), over, 0)
    labels, n = ndimage.label(ndimage.binary_closing(over > 0, iterations=1) | (over > 0), np.ones((3, 3)))
    found = []
    parts = _parts(fit, drawn, at) if n else []
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        where = labels == k
        if (over[box] * (labels[box] == k) > 0).sum() < LEAST_AREA:
            continue
        mass = float(over[where].sum() / 255)
        found.append(Piece(_kind(picture, drawn, where, parts), mass, where))
    return found, cast, noise


def _kind(picture: np.ndarray, drawn: np.ndarray, where: np.ndarray, parts: list[Part]) -> str:
    around = ndimage.binary_dilation(where, iterations=2)
    off = np.abs(picture - drawn)[where].mean()
    if where.sum() >= 6 and _missing(picture, where, parts, off):
        return "part"
    if _blurred(picture, drawn, around):
        return "blur"
    detail, expected = _detail(picture)[where].mean(), _detail(drawn)[where].mean()
    if detail > 2 * expected + 10 and where.sum() >= 8:
        return "part"  # something where nothing is to be seen
    residual = (picture - drawn)[where]
    explained = len(residual) * (residual.mean(0) ** 2).sum() / max(1e-6, (residual**2).sum())
    grey = np.abs(residual.mean(1)).mean() / max(1e-6, np.abs(residual).max(1).mean())
    if explained > 0.7 and where.sum() >= 10 or (grey < 0.45 and where.sum() >= 10):
        return "colour"
    return "shape"


def _detail(x: np.ndarray) -> np.ndarray:
    """Deviation within 3 x 3 pixels, the channels' largest; [h, w]."""
    mean = ndimage.uniform_filter(x, (3, 3, 1))
    return np.sqrt(np.maximum(0, ndimage.uniform_filter(x * x, (3, 3, 1)) - mean * mean)).max(-1)


def _blurred(picture: np.ndarray, drawn: np.ndarray, around: np.ndarray) -> bool:
    off = np.abs(picture - drawn)[around].mean()
    softened = [ndimage.gaussian_filter(drawn, (sigma, sigma, 0)) for sigma in (0.8, 1.3, 2.0)]
    best = min(np.abs(picture - s)[around].mean() for s in softened)
    return bool(best < 0.6 * off and _detail(picture)[around].mean() < 0.85 * _detail(drawn)[around].mean())


def _parts(fit: Fit, drawn: np.ndarray, at: np.ndarray) -> list[Part]:
    """The hat, glasses and hand of the drawing: where each is, and the drawing without it (tinted by `at`)."""
    a, found = fit.attributes, []
    for name in ("hat", "glasses", "hand"):
        if a[name] != "none":
            # The person stands aside for a hand: what is behind it is seen where there are no fingers.
            without = drawn.copy() if name == "hand" else tinted(
                render({**a, name: "none"}, SIDE, fit.look).astype(np.float32), at
            )  # fmt: skip
            if name == "hand":
                without[:, HAND_FROM:] = without[:HAND_ABOVE, HAND_FROM:].mean(0, keepdims=True)
            found.append((np.abs(without - drawn).max(-1) > 12, without))
    return found


def _missing(picture: np.ndarray, where: np.ndarray, parts: list[Part], off: float) -> bool:
    """Whether the picture is, in this piece, rather what the drawing is without one of its parts."""
    for area, without in parts:
        if (area & where).sum() >= 0.6 * where.sum() and np.abs(picture - without)[where].mean() < 0.5 * off:
            return True
    return False


def missing_features(picture: np.ndarray, fit: Fit) -> list[np.ndarray]:
    """The eyes, brows and mouth that should be there and are not: flat where the drawing isn't; bool [64, 64] each."""
    drawn, found = tinted(fit.pixels, tint(picture, fit.pixels)), []
    for area in features(fit.attributes):
        expected = drawn[area].std(0).max()
        if expected > FLAT and picture[area].std(0).max() < 0.45 * expected:
            found.append(area)
    return found


def features(a: Attributes) -> list[np.ndarray]:
    """Where eyes, brows and mouth are drawn, bool [64, 64] each."""
    y, x = np.mgrid[0:64, 0:64] + 0.5
    zoom, shift = 0.88 + 0.22 * a["zoom"], -6.5 if a["hand"] == "waving" else 0.0
    rx, r = 11.2 + 4.2 * a["face_width"], 1.5 + 2.4 * a["eye_size"]
    u, v = (x - 32 - shift) / zoom + 32, (y - 64) / zoom + 64  # the person's own coordinates
    found = []
    for side in (-1, 1):
        at = 32 + side * rx * EYE_AT
        found.append(np.hypot((u - at) / 1.15, v - 29) < r + 0.5)
        found.append((np.abs(u - at) < 4.2) & (np.abs(v - 22.8) < 2.5))
    found.append((np.abs(u - 32) < 7.5) & (np.abs(v - 40.6) < 3.5))
    return found
