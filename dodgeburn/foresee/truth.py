"""The truth about a pocket picture's artifacts: how bad, of which types, and where, from its pixels and its prompt.

A reader says what the picture shows; the world's nearest drawing is fitted to it (`nearest.py`), what is left over is
named piece by piece (`left_over.py`), and what is shown is compared with what the prompt asks for. A wrong number of
fingers is one whose drawing lies better over the hand than five do. Severity runs from 0 to 5 by the published cut-offs
below; from 3 on a picture is bad. What a prompt leaves open can't be wrong, and asked-for blur is no artifact.

Whose reader: `reader` for training, the judge for evaluations (the fit and the comparisons are the same).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dodgeburn.foresee.labels import TYPES, Label, one_opinion
from dodgeburn.foresee.left_over import CAST, missing_features, pieces
from dodgeburn.foresee.nearest import Fit, hand_area, named, nearest
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.pocket.reader import SIZE, Reader, Readings
from dodgeburn.pocket.world import Look

# Severity 1, 2, 3, 4, 5 from so much on; in between it is linear in the logarithm.
MASS_CUTS = (2.0, 6.0, 18.0, 50.0, 140.0)  # pixels of 64 x 64 that are wrong from black to white, summed
SPECKLE_CUTS = (0.4, 1.5, 4.0, 12.0, 40.0)  # the same, of single pixels
CAST_CUTS = (14.0, 20.0, 28.0, 40.0, 60.0)  # grey levels that all colours are off
BLUR_CUTS = (0.12, 0.3, 0.6, 0.9, 1.4)  # sharpness below what was asked for, or below the world's blurriest
WRONG_FINGERS = {1: 3.0, 2: 3.6}  # fingers too many or too few
MISSING, EXTRA, OTHER = 4.0, 3.4, 3.4  # something asked for is not there; there unasked; there is another kind of it
NO_FEATURE = 3.2  # an eye, a brow or the mouth is gone; half a point for each further one
CONFIDENT = 0.8  # a reader's confidence from which what it names is held against the prompt
FINGER_MARGIN = 1.0  # grey levels by which another count must fit the hand better than five


@dataclass
class Finding:
    """What is wrong with one picture.

    types: severity 0..5 by TYPES. mask: bool [64, 64], where (all False where it can't be pointed at: something that is
    missing). notes: one phrase for each thing found.
    """

    types: dict[str, float]
    mask: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def severity(self) -> float:
        """The worst type's, and a little for the others: 5 at most. What is under 1 can't be seen, and is 0."""
        return severity_of(self.types.values())

    def label(self, source: str) -> Label:
        """As a label."""
        return one_opinion(self.severity, source, [round(self.types[t], 3) for t in TYPES])


def severity_of(types: Iterable[float]) -> float:
    """Of the severities of all types: the worst, and a fifth of each other visible one (1 or more); 5 at most.

    Amounts below the first cut-off are what the fit and the autoencoder leave anywhere: no picture is ranked by them.
    """
    visible = sorted((v for v in types if v >= 1), reverse=True)
    return min(5.0, visible[0] + 0.2 * sum(visible[1:])) if visible else 0.0


def graded(amount: float, cuts: Sequence[float]) -> float:
    """Severity of an amount: 1 at the first cut, 5 at the fifth, linear in the logarithm between, and in the amount
    below the first.
    """
    if amount <= cuts[0]:
        return max(0.0, amount / cuts[0])
    return float(np.interp(np.log(amount), np.log(cuts), np.arange(1, len(cuts) + 1)))


def find_artifacts(
    pictures: np.ndarray, prompts: Sequence[str], reader: Reader, looks: tuple[Look, ...] = ("plain",)
) -> list[Finding]:
    """Artifacts of pocket pictures uint8 [n, h, w, 3] (64 pixels a side, or a multiple) made for these prompts.

    An empty prompt asks for nothing: then only what the world does not draw is found. looks: drawings to compare with;
    a fine-tune's pictures are no failures of the plain world.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts")
    small = pictures if pictures.shape[1] == SIZE else np.stack([reduced(p) for p in pictures])
    readings = reader.read(small)
    return [_one(small[i], parse(prompts[i]), readings, i, looks) for i in range(len(small))]


def reduced(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 [k 64, k 64, 3] averaged to 64 pixels a side."""
    k = picture.shape[0] // SIZE
    return picture.reshape(SIZE, k, SIZE, k, 3).mean((1, 3)).round().astype(np.uint8)


def _one(picture: np.ndarray, asked: Asked, readings: Readings, i: int, looks: tuple[Look, ...]) -> Finding:
    found = Finding(dict.fromkeys(TYPES, 0.0), np.zeros((SIZE, SIZE), bool))
    if readings.unreadable[i]:
        found.types["shape"] = 5.0
        found.mask[:] = True
        found.notes.append("no portrait")
        return found
    fit = nearest(picture, named(readings, i), looks)
    found = against_drawing(picture, fit)
    _blur(found, fit, asked)
    _against_prompt(found, asked, readings, i, fit)
    return found


def against_drawing(picture: np.ndarray, fit: Fit) -> Finding:
    """What a picture uint8 [64, 64, 3] has that its drawing has not, and the drawing's wrong number of fingers."""
    found = Finding(dict.fromkeys(TYPES, 0.0), np.zeros((SIZE, SIZE), bool))
    _left_over(found, picture.astype(np.float32), fit)
    _fingers(found, fit)
    return found


def _raise(found: Finding, kind: str, severity: float, note: str) -> None:
    found.types[kind] = max(found.types[kind], severity)
    if severity >= 1:
        found.notes.append(note)


def _left_over(found: Finding, picture: np.ndarray, fit: Fit) -> None:
    left, cast, noise = pieces(picture, fit)
    for kind in TYPES:
        of_kind = [p for p in left if p.kind == kind]
        mass = sum(p.mass for p in of_kind)
        _raise(found, kind, graded(mass, MASS_CUTS), f"{kind}: {len(of_kind)} pieces, {mass:.1f} pixels")
    if sum(p.mass for p in left) >= MASS_CUTS[0]:
        # Each kind may be little where all together isn't: the whole counts as the largest kind's.
        total = graded(sum(p.mass for p in left), MASS_CUTS)
        largest = max(("part", "shape", "colour", "blur"), key=lambda k: sum(p.mass for p in left if p.kind == k))
        _raise(found, largest, total - 0.3, f"{largest}: most of what is left over")
    for piece in left:
        found.mask |= piece.where
    gone = missing_features(picture, fit)
    if gone:
        _raise(
            found, "part", min(5.0, NO_FEATURE + 0.5 * (len(gone) - 1)), f"part: {len(gone)} of eyes, brows, mouth gone"
        )
        found.mask |= np.any(gone, 0)
    amount = float(noise.sum() / 255)
    _raise(found, "speckle", graded(amount, SPECKLE_CUTS), f"speckle: {int((noise > 0).sum())} pixels")
    if amount >= SPECKLE_CUTS[0]:
        found.mask |= noise > 0
    if cast > CAST:
        _raise(found, "colour", graded(cast, CAST_CUTS), f"colour: a cast of {cast:.0f} grey levels")


def _fingers(found: Finding, fit: Fit) -> None:
    a = fit.attributes
    if a["hand"] != "waving" or a["fingers"] == 5 or fit.finger_costs.get(5, 0.0) < FINGER_MARGIN:
        return
    off = min(2, abs(a["fingers"] - 5))
    _raise(found, "fingers", WRONG_FINGERS[off], f"fingers: {a['fingers']}")
    found.mask |= hand_area()


def _blur(found: Finding, fit: Fit, asked: Asked) -> None:
    low = _interval(asked, "sharpness")[0] if "sharpness" in asked else 0.0
    # A prompt asks for fifths of the scale; one fifth off is a matter of prompt following, not an artifact.
    missing = max(0.0, low - 0.2 - fit.attributes["sharpness"])
    severity = graded(missing, BLUR_CUTS)
    _raise(found, "blur", severity, f"blur: sharpness {fit.attributes['sharpness']:.2f}")
    if severity >= 1:
        found.mask[:] = True


def _interval(asked: Asked, name: str) -> tuple[float, float]:
    value = asked[name]
    assert not isinstance(value, str)  # of a continuous attribute
    return value


def _against_prompt(found: Finding, asked: Asked, readings: Readings, i: int, fit: Fit) -> None:
    def shown(name: str) -> str | None:
        """What the reader names, where it is sure."""
        return str(readings.values[name][i]) if readings.confidence[name][i] >= CONFIDENT else None

    for name in ("hat", "glasses", "hand"):
        seen = shown(name)
        if name not in asked or seen is None or seen == asked[name]:
            continue
        severity = MISSING if seen == "none" else EXTRA if asked[name] == "none" else OTHER
        _raise(found, "part", severity, f"part: {name} {seen}, asked for {asked[name]}")
    seen = shown("outfit")
    if "outfit" in asked and seen is not None and seen != asked["outfit"]:
        _raise(found, "part", OTHER, f"part: outfit {seen}, asked for {asked['outfit']}")
    for name in ("hair_colour", "background"):
        seen = shown(name)
        if name in asked and seen is not None and seen != asked[name]:
            _raise(found, "colour", OTHER, f"colour: {name} {seen}, asked for {asked[name]}")
    for name, kind in (("beard", "part"), ("skin_tone", "colour")):
        if name in asked:
            low, high = _interval(asked, name)
            away = max(low - fit.attributes[name], fit.attributes[name] - high)
            if away > 0.3:
                _raise(found, kind, OTHER, f"{kind}: {name} {fit.attributes[name]:.2f}, asked for {low} to {high}")
