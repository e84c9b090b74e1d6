"""The picture of the pocket world that is nearest to a given picture: what it would look like without artifacts.

The world draws 64 x 64 pictures in a millisecond, so it can be fitted: a reader names the attributes, then damped
Gauss-Newton steps move the continuous ones until the drawing lies over the picture. Pixels that do not fit count little
(Huber's weights), so a defect does not pull the rest along. What is left over is what the world does not draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, FINGER_COUNTS, Attributes
from dodgeburn.pocket.reader import Readings
from dodgeburn.pocket.world import Look, render

STEP = 0.03  # finite difference: below that, edges of the 256-pixel drawing don't move
HUBER = 10.0  # grey levels beyond which a pixel counts less and less
# Beyond what the world draws, so that blur and light can be measured where they are wrong.
LIMITS = {"sharpness": (-1.5, 1.0), "brightness": (-0.4, 1.4), "saturation": (-0.2, 1.7)}
ITERATIONS = 4


@dataclass
class Fit:
    """The nearest picture: its attributes (some may lie beyond 0..1, see LIMITS), its pixels float32 [64, 64, 3] in
    0..255, and by how much each number of fingers fits worse than the best (grey levels in the hand's area; empty
    without a hand).
    """

    attributes: Attributes
    pixels: np.ndarray
    look: Look
    finger_costs: dict[int, float]

    def in_world_light(self) -> np.ndarray:
        """The same with brightness and saturation within what the world draws: float32 [64, 64, 3]."""
        a = {**self.attributes, **{k: min(1.0, max(0.0, self.attributes[k])) for k in ("brightness", "saturation")}}
        return self.pixels if a == self.attributes else _draw(a, self.look)


def named(readings: Readings, i: int) -> Attributes:
    """A reader's reading of picture i as attributes to draw from."""
    found: Attributes = {name: float(readings.values[name][i]) for name in CONTINUOUS}
    found |= {name: str(readings.values[name][i]) for name in CATEGORICAL}
    fingers = int(readings.values["fingers"][i])
    found["fingers"] = 0 if found["hand"] != "waving" else (fingers if fingers in FINGER_COUNTS else 5)
    return found


def hand_area(size: int = 64) -> np.ndarray:
    """Where a waving hand's palm and fingers can be, bool [size, size]; the hand does not move with the person."""
    y, x = np.mgrid[0:size, 0:size] * (64 / size) + 0.5
    return np.hypot(x - 52, y - 48) < 13.5


def nearest(picture: np.ndarray, start: Attributes, looks: tuple[Look, ...] = ("plain",)) -> Fit:
    """Fit the world to a picture uint8 [64, 64, 3], from what a reader says of it. Of several looks, the best."""
    target = picture.astype(np.float32)
    fits = [_in_look(target, start, look) for look in looks]
    return min(fits, key=lambda fit: _cost(target - fit.pixels))


def likeliest_look(picture: np.ndarray, start: Attributes, looks: Sequence[Look]) -> Look:
    """The look in which a reader's reading, drawn as it is, lies nearest to the picture uint8 [64, 64, 3]."""
    target = picture.astype(np.float32)
    return min(looks, key=lambda look: _cost(target - _draw(start, look)))


def _draw(a: Attributes, look: Look) -> np.ndarray:
    return render(a, 64, look).astype(np.float32)


def _cost(residual: np.ndarray) -> float:
    size = np.abs(residual)
    return float(np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).mean())


def _moved(a: Attributes, change: np.ndarray) -> Attributes:
    out = dict(a)
    for name, value in zip(CONTINUOUS, change, strict=True):
        low, high = LIMITS.get(name, (0.0, 1.0))
        out[name] = float(np.clip(a[name] + value, low, high))
    return out


def _at_limit(a: Attributes, change: np.ndarray) -> np.ndarray:
    """Attributes at an end of their range that a change would push out of it, bool [12]."""
    ends = [LIMITS.get(name, (0.0, 1.0)) for name in CONTINUOUS]
    return np.array([
        (a[name] <= low and c < 0) or (a[name] >= high and c > 0)
        for name, c, (low, high) in zip(CONTINUOUS, change, ends, strict=True)
    ])  # fmt: skip


def _in_look(target: np.ndarray, start: Attributes, look: Look) -> Fit:
    a, pixels = dict(start), _draw(start, look)
    costs: dict[int, float] = {}
    if a["hand"] == "waving":
        a["fingers"], costs = _fingers(target, a, look)
        pixels = _draw(a, look)
    cost = _cost(target - pixels)
    jacobian = np.zeros((0, 0))
    for i in range(ITERATIONS):
        if i in (0, 2):  # twelve drawings: the old one still points down the step after
            jacobian = _jacobian(a, pixels, look)
        residual = (target - pixels).reshape(-1)
        weight = np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-6))
        weighted = jacobian * weight[:, None]
        normal = weighted.T @ jacobian
        normal += np.diag(0.05 * np.diag(normal) + 1e3)  # damped; 1e3 keeps what does not show where it is
        pull = weighted.T @ residual
        change = np.linalg.solve(normal, pull)
        stuck = _at_limit(a, change)
        if stuck.any():  # what can go no further must not hold up the rest
            free = ~stuck
            change = np.zeros_like(change)
            change[free] = np.linalg.solve(normal[np.ix_(free, free)], pull[free])
        for share in (1.0, 0.4, 0.15):
            trial = _moved(a, share * change)
            drawn = _draw(trial, look)
            found = _cost(target - drawn)
            if found < cost:
                break
        else:
            break
        better = cost - found
        a, pixels, cost = trial, drawn, found
        if better < 0.005 * cost:
            break
    if costs:
        a["fingers"], costs = _fingers(target, a, look)
        pixels = _draw(a, look)
    return Fit(a, pixels, look, costs)


def _jacobian(a: Attributes, pixels: np.ndarray, look: Look) -> np.ndarray:
    """Change of every value by each continuous attribute, [values, 12]."""
    columns = []
    for name in CONTINUOUS:
        high = LIMITS.get(name, (0.0, 1.0))[1]
        step = STEP if a[name] + STEP <= high else -STEP
        columns.append((_draw({**a, name: a[name] + step}, look) - pixels).reshape(-1) / step)
    return np.stack(columns, 1)


def _fingers(target: np.ndarray, a: Attributes, look: Look) -> tuple[int, dict[int, float]]:
    """The number of fingers whose drawing lies best over the hand, and each number's cost above that."""
    area = hand_area()
    found = {n: float(np.abs(target - _draw({**a, "fingers": n}, look))[area].mean()) for n in FINGER_COUNTS}
    best = min(found, key=lambda n: found[n])
    return best, {n: cost - found[best] for n, cost in found.items()}
