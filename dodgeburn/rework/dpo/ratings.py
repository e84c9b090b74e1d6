"""Programs that prefer one picture to another: a score for every picture, more is better.

Programmed here for the pocket world: `looks` sees pixels only, contrast and centring; `faithful` reads what the prompt
asks for, and counts fingers; `wishes` and `hands` are its two halves. `artifacts` lies above (`foresee/preference.py`).
The reader rates what training, calibration and choices use; evaluations hand in the judge. A user's own program is a
function in a Python file; a person's choices are no scores (`make_pairs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.measure.own_scorer import is_own_scorer, own_scorer
from dodgeburn.pocket.attributes import CATEGORICAL, FINGER_COUNTS, FINGER_SHARES
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.pocket.reader import Readings

Scores = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Pictures uint8 [n, h, w, 3] and their prompts -> float [n], more is better; NaN for one that cannot be rated."""

READ = ("faithful", "wishes", "hands")  # by a pocket reader
BUILT_IN = ("looks", *READ, "artifacts")
"""What `dpo pairs --by` knows by name; the last is rated above this part (`foresee/preference.py`)."""
CONTRAST_UNIT = 0.043  # standard deviation of `contrast` over the pocket's pictures of development prompts
CENTRING_UNIT = 0.088  # the same of `centring`: either counts as much as it varies
NEAR = 0.3  # how far outside the asked interval a continuous attribute earns nothing
HAND_WEIGHT = 2.0  # fingers count as much as two wishes of the prompt
FIVE = FINGER_SHARES[FINGER_COUNTS.index(5)]


class ReadsPictures(Protocol):
    """What reads pictures: uint8 [n, h, w, 3] -> Readings."""

    def read(self, pictures: np.ndarray, /) -> Readings: ...


@dataclass(frozen=True)
class Rating:
    """A preference as a program."""

    name: str  # looks, faithful, or the user's function
    by: str  # what rates: pixels, reader, judge, or the user's file
    scores: Scores


def contrast(pictures: np.ndarray) -> np.ndarray:
    """Root mean square contrast: the standard deviation of luma (Rec. 601) in [0, 1]; float64 [n] in [0, 0.5]."""
    luma = pictures @ np.array([0.299, 0.587, 0.114]) / 255
    return luma.std(axis=(1, 2))


def centring(pictures: np.ndarray) -> np.ndarray:
    """1 - the distance of what stands out from the middle, in half sides: float64 [n] in [1 - sqrt(2), 1].

    What stands out is the difference of every pixel's colour from the background's (the median of the upper edge and
    both sides); its centroid is compared with the middle. A picture of one colour has 1.
    """
    x = pictures.astype(np.float64) / 255
    _, h, w, _ = x.shape
    edge = np.median(np.concatenate([x[:, 0], x[:, :, 0], x[:, :, -1]], axis=1), axis=1)
    mass = np.sqrt(((x - edge[:, None, None]) ** 2).sum(axis=-1))
    down, across = np.mgrid[0:h, 0:w]
    total = np.maximum(mass.sum(axis=(1, 2)), 1e-9)
    offsets = [(mass * ((at + 0.5) / side * 2 - 1)).sum(axis=(1, 2)) / total for at, side in ((across, w), (down, h))]
    return 1 - np.hypot(*offsets)


def looks(pictures: np.ndarray) -> np.ndarray:
    """Contrast and centring, each in units of its spread over the pocket's pictures: float64 [n]."""
    return contrast(pictures) / CONTRAST_UNIT + centring(pictures) / CENTRING_UNIT


def faithfulness(asked: Sequence[Asked], readings: Readings, hand_weight: float = HAND_WEIGHT) -> np.ndarray:
    """How well each picture is readable, follows its prompt, and has five fingers: float64 [n] in [0, 1].

    The weighted mean of credits. A categorical wish: the reader's confidence if fulfilled, else 0. A continuous one: 1
    inside the asked interval, falling to 0 at `NEAR` outside. A hand: 1 with five fingers, else 0, with `hand_weight`;
    a picture without a hand gets what hands earn on average in the world, so that hands are neither sought nor
    avoided. Unreadable: 0. NaN for a prompt without wishes where hands have no weight.
    """
    if len(asked) != len(readings):
        raise ValueError(f"{len(asked)} prompts but {len(readings)} readings")
    out = np.zeros(len(asked))
    for i, wishes in enumerate(asked):
        if not wishes and not hand_weight:
            out[i] = np.nan
            continue
        if readings.unreadable[i]:
            continue
        credits = [_credit(name, wish, readings, i) for name, wish in wishes.items()]
        fingers = int(readings.values["fingers"][i])
        waves = str(readings.values["hand"][i]) == "waving" or fingers > 0
        hand = float(fingers == 5) if waves else FIVE
        out[i] = (sum(credits) + hand_weight * hand) / (len(credits) + hand_weight)
    return out


def five_fingers(readings: Readings) -> np.ndarray:
    """1 for a hand with five fingers, 0 with another number, NaN where there is no hand to count: float64 [n]."""
    fingers = np.asarray(readings.values["fingers"]).astype(int)
    return np.where(np.asarray(readings.unreadable) | (fingers == 0), np.nan, (fingers == 5).astype(np.float64))


def _credit(name: str, wish: str | tuple[float, float], readings: Readings, i: int) -> float:
    read = readings.values[name][i]
    if name in CATEGORICAL:
        return float(readings.confidence[name][i]) if str(read) == str(wish) else 0.0
    low, high = (float(end) for end in wish)
    outside = max(low - float(read), float(read) - high, 0.0)
    return max(0.0, 1 - outside / NEAR)


def rating(by: str, reader: ReadsPictures | None = None, name: str = "reader") -> Rating:
    """The preference that `by` names: looks, faithful, wishes, hands, or FILE.py:FUNCTION, called with (pictures,
    prompts). That of artifacts is `foresee.preference.artifact_rating`.

    `reader`, called `name`, rates what is read; None: the shipped reader. Raises UserError for anything else, and for
    a function that does not answer with one number a picture.
    """
    if by == "looks":
        return Rating("looks", "pixels", lambda pictures, prompts: looks(pictures))
    if by in READ:
        if reader is None:
            from dodgeburn.pocket.reader import Reader

            reader = Reader.load("reader")
        chosen = reader

        def by_reading(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            seen = chosen.read(pictures)
            if by == "hands":
                return five_fingers(seen)
            return faithfulness([parse(prompt) for prompt in prompts], seen, HAND_WEIGHT if by == "faithful" else 0.0)

        return Rating(by, name, by_reading)
    if not is_own_scorer(by):
        raise UserError(
            f"no preference {by!r}: {did_you_mean(by, BUILT_IN)}expected {', '.join(BUILT_IN)}, FILE.py:FUNCTION or a "
            "choices.json"
        )
    scores, function, file = own_scorer(by)
    return Rating(function, file, scores)


def wins(tuned: np.ndarray, base: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
    """For each pair of scores: 1 where the tuned picture is better, 0 where it is worse, 0.5 for a tie; float64.

    A picture that could not be rated (NaN) loses against one that could.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (tuned, base))
    lost_a, lost_b = np.isnan(a), np.isnan(b)
    same = (lost_a & lost_b) | (np.abs(a - b) <= tolerance)
    better = (lost_b & ~lost_a) | (a > b)
    return np.where(same, 0.5, better.astype(np.float64))
