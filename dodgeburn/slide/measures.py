"""What a sweep's readings say about an edit. Pure functions of `SweepReadings`; every definition stands here.

Lengths are in natural standard deviations ("sigma"): how far the attribute varies by itself among the unedited pictures
of the same prompts. Edits are compared at equal *displacement* of their target, never at equal strength: a weak edit
leaves everything in peace. An unreadable picture fails its sweep; it is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import rankdata

from dodgeburn.errors import UserError
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.slide.readings import SweepReadings, others_of

DISPLACEMENTS = (0.5, 1.0, 2.0)
REQUESTED = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # scales at which a calibrated file is held to its word
LEAST_SIGMA = 1e-3  # of a [0, 1] reading: below it an attribute doesn't vary and a share of it means nothing


@dataclass(frozen=True)
class Natural:
    """How much attributes vary by themselves, and how well they are read."""

    sigma: Mapping[str, float]  # continuous attributes and targets: standard deviation over unedited pictures
    differ: Mapping[str, float]  # categorical ones: share of pairs of seeds of one prompt that differ
    rmse: Mapping[str, float] = field(default_factory=dict)  # the reader's error; 0 for what is missing

    def error(self, target: str) -> float:
        """The reader's RMSE of a target; a category is read right or wrong, so 0."""
        return float(self.rmse.get(target, 0.0))


def natural_spread(
    sweep: SweepReadings, rmse: Mapping[str, float] | None = None, targets: Sequence[str] = ()
) -> Natural:
    """Spread of every attribute over the sweep's unedited pictures.

    sigma: standard deviation (n - 1) over all readable ones, prompts and seeds together. differ: over all pairs of two
    seeds of one prompt, the share whose values differ, at least one half pair (so that a change of what never changes
    weighs much, but not infinitely). targets: categorical targets ("hat=crown") that need a sigma as well. Raises
    UserError for a sweep of one picture.
    """
    zero, ok = sweep.zero, ~sweep.unreadable[:, :, sweep.zero]
    if ok.size < 2:
        raise UserError("one picture has no spread to measure moves by: take more prompts or seeds")
    sigma = {}
    for name in (*CONTINUOUS, *(t for t in targets if t not in CONTINUOUS)):
        read = sweep.of(name)[:, :, zero]
        known = read[~np.isnan(read)]
        sigma[name] = max(LEAST_SIGMA, float(np.std(known, ddof=1))) if len(known) > 1 else LEAST_SIGMA
    differ = {}
    for name in CATEGORICAL:
        values = sweep.values[name][:, :, zero]
        unequal = (values[:, :, None] != values[:, None, :]) & ok[:, :, None] & ok[:, None, :]
        pairs = int((ok.sum(1) * (ok.sum(1) - 1)).sum())  # ordered; so is `unequal`
        differ[name] = max(float(unequal.sum()), 1.0) / pairs if pairs else 1.0
    return Natural(sigma, differ, dict(rmse or {}))


# -------------------------------------------------------------------------------------------------------- one sweep


def monotone(sweep: SweepReadings, natural: Natural, target: str, drawdown: bool = False) -> np.ndarray:
    """Which sweeps rise: bool [prompts, seeds].

    A sweep rises if all its pictures are readable, no step from one scale to the next falls by more than 2 x the
    reader's RMSE, and the last reading is at least 1 sigma above the first (a flat sweep fails). `drawdown` is
    stricter: no reading may be that far below *any* earlier one, so that a finer grid of scales makes it no easier.
    """
    read = sweep.of(target)
    slack = 2 * natural.error(target) + 1e-9
    fall = (np.maximum.accumulate(read, 2) - read).max(2) if drawdown else -np.diff(read, axis=2).min(2)
    enough = read[:, :, -1] - read[:, :, 0] >= natural.sigma[target] - 1e-9
    with np.errstate(invalid="ignore"):
        return ~sweep.unreadable.any(2) & (fall <= slack) & enough


def spearman(sweep: SweepReadings, target: str) -> np.ndarray:
    """Spearman's rho of scale and reading of each sweep: float64 [prompts, seeds].

    0 for a sweep with an unreadable picture, and for one whose readings are all the same.
    """
    ranks = rankdata(sweep.of(target), axis=2, nan_policy="omit")
    scale = np.arange(len(sweep.scales), dtype=np.float64)
    a, b = ranks - ranks.mean(2, keepdims=True), scale - scale.mean()
    norm = np.sqrt((a**2).sum(2) * (b**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (a * b).sum(2) / norm
    return np.where(sweep.unreadable.any(2) | ~(norm > 0), 0.0, rho)


def end_to_end(sweep: SweepReadings, natural: Natural, target: str) -> np.ndarray:
    """Last reading minus first of each sweep, in sigma: float64 [prompts, seeds]; 0 if an end is unreadable."""
    read = sweep.of(target)
    return np.nan_to_num((read[:, :, -1] - read[:, :, 0]) / natural.sigma[target], nan=0.0)


# ---------------------------------------------------------------------------------------------------- all sweeps


def response(sweep: SweepReadings, natural: Natural, target: str) -> np.ndarray:
    """Mean move of the target in sigma at each scale, over the readable pictures: float64 [k]; NaN where none is."""
    return mean_known(sweep.moves(target) / natural.sigma[target], (0, 1))


def linearity(sweep: SweepReadings, target: str) -> float:
    """R^2 of moves that are proportional to the scale, one slope for all sweeps: 1 - sum((m - b s)^2) / sum(m^2).

    Over the readable pictures at scales other than 0. The edit's moves differ from picture to picture, so this is
    below the R^2 of the mean curve. NaN if nothing moves.
    """
    moves = np.delete(sweep.moves(target), sweep.zero, 2)
    scales = np.broadcast_to(np.delete(sweep.scales, sweep.zero), moves.shape)
    known = ~np.isnan(moves)
    m, s = moves[known], scales[known]
    if not len(m) or not (m**2).sum():
        return float("nan")
    slope = (m * s).sum() / (s**2).sum()
    return float(1 - ((m - slope * s) ** 2).sum() / (m**2).sum())


def calibration_error(sweep: SweepReadings, natural: Natural, target: str, per_picture: bool = False,
                      up_to: float = np.inf, sigma: float | None = None) -> float:  # fmt: skip
    """Median of |reached - requested| in sigma, where scale s requests s sigma, over prompts and REQUESTED scales.

    Reached is the mean over a prompt's readable seeds, linear between the scales of the sweep; requested scales beyond
    its ends, or beyond `up_to` in magnitude, are left out. sigma: what the file declares one unit to be; None: the
    spread of the sweep's unedited pictures. `per_picture` takes every picture by itself, which adds the reader's error
    and the spread between seeds. NaN where no requested scale was swept.
    """
    scales = sweep.scales
    asked = [s for s in REQUESTED if scales[0] - 1e-9 <= s <= scales[-1] + 1e-9 and abs(s) <= up_to + 1e-9]
    if not asked:
        return float("nan")
    moves = sweep.moves(target) / (natural.sigma[target] if sigma is None else sigma)
    reached = np.stack([_at_scale(moves, scales, s) for s in asked], axis=2)
    error = np.abs((reached if per_picture else mean_known(reached, 1)) - np.array(asked))
    return float(np.nanmedian(error)) if not np.isnan(error).all() else float("nan")


def symmetry(sweep: SweepReadings, target: str) -> float:
    """|effect(+s)| against |effect(-s)|: the smaller over the larger, averaged over the sweep's magnitudes s.

    1 is even. An effect is the mean move, linear between scales; magnitudes that only one side reaches are left out. A
    pair whose effects do not point in opposite directions counts 0. NaN without a pair.
    """
    mean, scales = mean_known(sweep.moves(target), (0, 1)), sweep.scales
    reach = min(-float(scales[0]), float(scales[-1])) + 1e-9
    ratios = []
    for size in sorted({round(abs(float(s)), 6) for s in scales if 0 < abs(s) <= reach}):
        up, down = (float(np.interp(s, scales, mean)) for s in (size, -size))
        ratios.append(min(abs(up), abs(down)) / max(abs(up), abs(down)) if up * down < 0 else 0.0)
    return float(np.mean(ratios)) if ratios else float("nan")


def parse_rate(sweep: SweepReadings) -> np.ndarray:
    """Share of readable pictures at each scale: float64 [k]."""
    return 1 - sweep.unreadable.mean((0, 1))


def parse_loss(sweep: SweepReadings) -> float:
    """The largest fall of the parse rate below the unedited pictures', over all scales; at least 0."""
    rate = parse_rate(sweep)
    return float(max(0.0, (rate[sweep.zero] - rate).max()))


# ------------------------------------------------------------------------------------------- at equal displacement


def scale_at(sweep: SweepReadings, natural: Natural, target: str, displacement: float) -> float | None:
    """The scale at which the mean move of the target first reaches `displacement` sigma, going out from 0.

    Linear between scales; a negative displacement is looked for at negative scales. None if it is not reached.
    """
    curve, sign = response(sweep, natural, target), 1.0 if displacement > 0 else -1.0
    order = range(sweep.zero, len(sweep.scales)) if sign > 0 else range(sweep.zero, -1, -1)
    last_scale, last = 0.0, 0.0
    for k in order:
        here = sign * float(curve[k])
        if here >= abs(displacement) - 1e-6 and here > last:
            part = min(1.0, (abs(displacement) - last) / (here - last))
            return float(last_scale + part * (sweep.scales[k] - last_scale))
        if not np.isnan(here):
            last_scale, last = float(sweep.scales[k]), here
    return None


def _at_scale(values: np.ndarray, scales: np.ndarray, scale: float) -> np.ndarray:
    """Values [p, n, k] at a scale between: [p, n], linear; NaN if either neighbour is."""
    right = int(np.clip(np.searchsorted(scales, scale), 1, len(scales) - 1))
    part = (scale - scales[right - 1]) / (scales[right] - scales[right - 1])
    if part >= 1 - 1e-9:
        return values[:, :, right]
    return values[:, :, right - 1] * (1 - part) + values[:, :, right] * part if part > 1e-9 else values[:, :, right - 1]


def moves_at(sweep: SweepReadings, natural: Natural, target: str, attribute: str, displacement: float
             ) -> np.ndarray | None:  # fmt: skip
    """Each picture's move of an attribute where the target has moved by `displacement` sigma on average: [p, n].

    Continuous (and the target itself): signed, in the attribute's own sigma. Categorical: changed (0 to 1), over
    `Natural.differ`. None where the displacement is not reached.
    """
    scale = scale_at(sweep, natural, target, displacement)
    if scale is None:
        return None
    if attribute in CATEGORICAL:
        return _at_scale(sweep.changed(attribute), sweep.scales, scale) / natural.differ[attribute]
    return _at_scale(sweep.moves(attribute), sweep.scales, scale) / natural.sigma[attribute]


@dataclass(frozen=True)
class Leak:
    """How far an attribute moved at a displacement of the target, both directions averaged."""

    signed: float  # mean move towards the target's: (move at +d - move at -d) / 2; NaN for categorical attributes
    absolute: float  # per prompt the mean over seeds, without its sign, averaged over prompts
    strict: float  # per picture without its sign, averaged
    floor: float  # what `absolute` would be on average if every picture's move had a random sign


def leak(sweep: SweepReadings, natural: Natural, target: str, attribute: str, displacement: float = 1.0) -> Leak:
    """A cell of the leakage matrix: what `attribute` does where `target` has moved by `displacement` sigma.

    `absolute` lets the seeds of a prompt cancel, not different prompts: a slider that ages women and rejuvenates men
    leaks. With few seeds chance alone leaves something: `floor` (the half-normal mean, sqrt(2/pi) x the root mean
    square move / sqrt(seeds)) says how much. Categorical: see `moves_at`; chance is no issue there (floor 0). All
    NaN where neither +d nor -d is reached; where one is, it stands alone.
    """
    found = []
    for sign in (1, -1):
        moves = moves_at(sweep, natural, target, attribute, sign * displacement)
        if moves is None or np.isnan(moves).all():
            continue
        by_prompt = mean_known(moves, 1)
        known = np.maximum(1, (~np.isnan(moves)).sum(1))
        floor = np.sqrt(2 / np.pi) * np.sqrt(mean_known(moves**2, 1)) / np.sqrt(known)
        categorical = attribute in CATEGORICAL and attribute != target
        found.append((
            np.nan if categorical else sign * float(np.nanmean(by_prompt)),
            float(np.nanmean(np.abs(by_prompt))),
            float(np.nanmean(np.abs(moves))),
            0.0 if categorical else float(np.nanmean(floor)),
        ))  # fmt: skip
    if not found:
        return Leak(*[float("nan")] * 4)
    return Leak(*(float(np.mean(column)) for column in zip(*found, strict=True)))


def leakage(sweep: SweepReadings, natural: Natural, target: str, displacement: float = 1.0) -> dict[str, Leak]:
    """A row of the leakage matrix: every other attribute's `leak`."""
    return {name: leak(sweep, natural, target, name, displacement) for name in others_of(target)}


def selectivity(own: Leak, others: Iterable[Leak], strict: bool = False) -> float:
    """Own move / mean of the others' moves: both `Leak.absolute`, or both `Leak.strict`, at one displacement.

    NaN where the displacement is not reached, or where nothing else moves at all.
    """
    moved = float(np.mean([leak.strict if strict else leak.absolute for leak in others]))
    return float((own.strict if strict else own.absolute) / moved) if moved > 0 else float("nan")


def identity_kept(sweep: SweepReadings, natural: Natural, target: str, displacement: float = 1.0) -> np.ndarray:
    """Share of the other attributes that a picture keeps where the target has moved: float64 [prompts, seeds].

    At the scales of the sweep nearest to +d and -d, averaged. Kept: a continuous reading within 2 x the reader's RMSE
    of the unedited picture's, a categorical one the same. An unreadable picture keeps nothing; NaN where the unedited
    one is unreadable or no displacement is reached.
    """
    shares = []
    for sign in (1, -1):
        scale = scale_at(sweep, natural, target, sign * displacement)
        if scale is None:
            continue
        k = int(np.argmin(np.abs(sweep.scales - scale)))
        kept = []
        for name in others_of(target):
            if name in CATEGORICAL:
                kept.append(sweep.changed(name)[:, :, k] == 0)
            else:
                with np.errstate(invalid="ignore"):
                    kept.append(np.abs(sweep.moves(name)[:, :, k]) <= 2 * natural.error(name) + 1e-9)
        shares.append(np.mean(kept, axis=0))
    if not shares:
        return np.full(sweep.shape, np.nan)
    return np.where(sweep.unreadable[:, :, sweep.zero], np.nan, np.mean(shares, axis=0))


def off_class_effect(off_class: np.ndarray, in_class: np.ndarray) -> float:
    """Mean pixel distance that an edit causes where its subject is absent, over the one that it causes where it is.

    Both float64 of any shape, from `measure.distances.pixel_distance` at the same strengths. NaN if the edit does
    nothing in class.
    """
    there = float(np.mean(in_class))
    return float(np.mean(off_class)) / there if there > 0 else float("nan")


def mean_known(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean over the values that are not NaN; NaN (without a warning) where there is none."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
