"""Whether pictures show what their prompts ask for, by a reader's readings.

Everything here works on parallel lists: `asked[i]` is what picture i's prompt asks for (`pocket.captions.parse`), and
`readings` holds what a reader saw in the pictures. An unreadable picture counts as a failure wherever right and wrong
are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dodgeburn.pocket.attributes import (
    CATEGORICAL,
    CONTINUOUS,
    FINGER_COUNTS,
    FINGER_SHARES,
    PLANTED,
    Planted,
    marginal,
)
from dodgeburn.pocket.captions import Asked

if TYPE_CHECKING:
    from dodgeburn.pocket.reader import Readings

TOLERANCE = 0.1
"""How far outside the asked interval a continuous reading may lie. A graded word covers 0.2; the reader errs by about
0.05, and neighbouring words overlap in use, so half a word is allowed on either side. A uniformly random reading then
passes 36 times in 100."""

BINS = 5  # equal bins in which a continuous attribute's readings are compared with the uniform distribution


def satisfied(attribute: str, asked: str | tuple[float, float], values: np.ndarray, tolerance: float = TOLERANCE
              ) -> np.ndarray:  # fmt: skip
    """Whether readings of one attribute are what was asked for: bool [n].

    Categorical: the same value. Continuous (`asked` is an interval): inside it, widened by `tolerance` at both ends.
    """
    if attribute in CATEGORICAL:
        return np.asarray(values).astype(str) == str(asked)
    assert not isinstance(asked, str), f"{attribute} is continuous: asked for as an interval"
    low, high = asked
    read = np.asarray(values, dtype=np.float64)
    # The tiny slack keeps a reading on the border (0.3 + 0.1) inside whatever float arithmetic makes of it.
    return (read >= float(low) - tolerance - 1e-6) & (read <= float(high) + tolerance + 1e-6)


def fidelity(asked: Sequence[Asked], readings: Readings, tolerance: float = TOLERANCE) -> np.ndarray:
    """Prompt fidelity of each picture: float64 [n] in [0, 1].

    The mean over the attributes that its prompt names, each 1 if satisfied, else 0. An unreadable picture has 0. A
    prompt that names nothing the reader knows gives NaN.
    """
    _check(asked, readings)
    out = np.full(len(asked), np.nan)
    for i, wishes in enumerate(asked):
        if wishes:
            hits = [satisfied(name, wish, readings.values[name][i : i + 1], tolerance)[0]
                    for name, wish in wishes.items()]  # fmt: skip
            out[i] = 0.0 if readings.unreadable[i] else float(np.mean(hits))
    return out


def named_accuracy(asked: Sequence[Asked], readings: Readings) -> dict[str, tuple[float, int]]:
    """For each categorical attribute that some prompt names: (share of right readings, number of pictures)."""
    _check(asked, readings)
    out = {}
    for name in CATEGORICAL:
        rows = _naming(asked, name)
        if len(rows):
            wanted = np.array([str(asked[i][name]) for i in rows])
            right = (np.asarray(readings.values[name])[rows].astype(str) == wanted) & ~readings.unreadable[rows]
            out[name] = (float(right.mean()), len(rows))
    return out


def graded_spearman(asked: Sequence[Asked], readings: Readings) -> dict[str, tuple[float, int]]:
    """For each continuous attribute: (Spearman's rho between the asked intervals' middles and the readings, pictures).

    An unreadable picture enters with the reading 0.5, which knows nothing, so it lowers rho. rho is 0 where the asked
    or the read values are all the same (no order was shown), NaN with fewer than 3 pictures.
    """
    from scipy.stats import spearmanr

    _check(asked, readings)
    out = {}
    for name in CONTINUOUS:
        rows = _naming(asked, name)
        if not len(rows):
            continue
        middles = np.array([(float(asked[i][name][0]) + float(asked[i][name][1])) / 2 for i in rows])
        read = np.where(readings.unreadable[rows], 0.5, np.asarray(readings.values[name], dtype=np.float64)[rows])
        if len(rows) < 3:
            rho = float("nan")
        elif np.ptp(middles) == 0 or np.ptp(read) == 0:
            rho = 0.0
        else:
            rho = float(spearmanr(middles, read).statistic)
        out[name] = (rho, len(rows))
    return out


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of absolute differences of two distributions over the same values; in [0, 1]."""
    return float(np.abs(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)).sum() / 2)


def shares_read(attribute: str, values: np.ndarray) -> np.ndarray:
    """Shares of the values that were read: in the order of the table, or over `BINS` equal bins; float64 [values].

    `fingers`: over the finger counts, of the hands that were read.
    """
    if attribute in CATEGORICAL:
        counts = np.array([(np.asarray(values).astype(str) == v).sum() for v in CATEGORICAL[attribute]])
    elif attribute == "fingers":
        counts = np.array([(np.asarray(values) == v).sum() for v in FINGER_COUNTS])
    else:
        inside = np.clip(np.asarray(values, dtype=np.float64), 0, 1)
        counts = np.histogram(inside, bins=BINS, range=(0, 1))[0]
    return counts / max(1, counts.sum())


def expected_shares(attribute: str, planted: tuple[Planted, ...] = PLANTED) -> np.ndarray:
    """What `shares_read` gives in the training world: its marginal, planted ties included."""
    if attribute in CATEGORICAL:
        return marginal(attribute, planted)
    if attribute == "fingers":
        return np.asarray(FINGER_SHARES)
    return np.full(BINS, 1 / BINS)


def marginal_tv(asked: Sequence[Asked], readings: Readings, planted: tuple[Planted, ...] = PLANTED
                ) -> dict[str, tuple[float, int]]:  # fmt: skip
    """For each attribute, over the readable pictures whose prompt does not name it: (total variation between what was
    read and the training world's marginal, number of pictures).

    Meant for prompts that are captions of random pictures of that world: only then is the marginal what to expect.
    `fingers` are compared over the pictures in which a hand was read. Attributes without a picture are left out.
    """
    _check(asked, readings)
    out = {}
    for name in (*CONTINUOUS, *CATEGORICAL, "fingers"):
        rows = np.array([i for i, wishes in enumerate(asked) if name not in wishes and not readings.unreadable[i]], int)
        values = np.asarray(readings.values[name])[rows]
        if name == "fingers":
            values = values[values > 0]
        if len(values):
            tv = total_variation(shares_read(name, values), expected_shares(name, planted))
            out[name] = (tv, len(values))
    return out


def planted_shares(asked: Sequence[Asked], readings: Readings, planted: tuple[Planted, ...] = PLANTED
                   ) -> dict[str, tuple[float, int]]:  # fmt: skip
    """For each planted tie, as "outfit: attribute = value": (share of pictures that show the value, pictures).

    Over the readable pictures whose prompt names the outfit and leaves the tied attribute open; NaN if there are none.
    """
    _check(asked, readings)
    out = {}
    for tie in planted:
        rows = np.array(
            [
                i
                for i, wishes in enumerate(asked)
                if wishes.get("outfit") == tie.outfit and tie.attribute not in wishes and not readings.unreadable[i]
            ],
            int,
        )
        shown = np.asarray(readings.values[tie.attribute])[rows].astype(str) == tie.value
        share = float(shown.mean()) if len(rows) else float("nan")
        out[f"{tie.outfit}: {tie.attribute} = {tie.value}"] = (share, len(rows))
    return out


def _naming(asked: Sequence[Asked], name: str) -> np.ndarray:
    return np.array([i for i, wishes in enumerate(asked) if name in wishes], int)


def _check(asked: Sequence[Asked], readings: Readings) -> None:
    if len(asked) != len(readings.unreadable):
        raise ValueError(f"{len(asked)} prompts but {len(readings.unreadable)} readings")
