"""Calibration: the raw scale at which an attribute moves by one natural standard deviation, folded into alpha.

A raw slider's 1.0 means whatever training made of it. Afterwards 1.0 is one natural standard deviation ("sigma") of the
attribute, in any program that loads the file, because the factor is in the file's alphas. The response beyond is as it
is: a file is linear in its scale, so a curve that flattens cannot be straightened in it. It is measured and reported.

Calibration looks at prompts and seeds of its own, with the reader (or, where there is none, a scorer that is named as a
proxy). Evaluations use others, and the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.readings import ReadsPictures, attribute_of, values_of

Scores = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [n, h, w, 3] -> float [n], NaN for one that cannot be read."""


@dataclass(frozen=True)
class Scorer:
    """What says how much of an attribute a picture has."""

    attribute: str  # "smile"; of a proxy a phrase for what it measures
    by: str  # "reader", "judge" or "proxy: …"
    scores: Scores


def reader_scorer(target: str, reader: ReadsPictures, name: str = "reader") -> Scorer:
    """A pocket reader's values of one target. Raises UserError for an unknown attribute."""
    attribute_of(target)
    return Scorer(target, name, lambda pictures: values_of(reader.read(pictures), target))


@dataclass(frozen=True)
class CalibrationSettings:
    """How calibration looks for the unit and for the safe range; lengths are in units (sigma)."""

    step: float = 0.5  # between the scales at which the range is measured
    furthest: float = 4.0  # no scale beyond is tried
    parse_loss: float = 0.02  # share of pictures that may become unreadable
    least_gain: float = 0.15  # a step is safe if it moves the attribute by this share of what a unit slope would
    rounds: int = 8  # tries to find the unit
    first: float = 1.0  # raw scale that is tried first
    few: int | None = None  # pictures that find about where the unit is, and how the response bends, which differs less
    # from picture to picture than its strength does; all are drawn at one pair of scales alone. None: at every scale
    largest: float = 64.0  # raw scale: a slider that needs more does nothing


@dataclass(frozen=True)
class Calibration:
    """What was found. Scales are in units: the calibrated file's."""

    attribute: str
    by: str
    factor: float  # raw scale of one unit; negative if the raw slider pushed the other way
    sigma: float  # one unit in the scorer's own units
    safe_range: tuple[float, float]
    curve: list[tuple[float, float]]  # (scale, mean move in sigma), rising, with (0, 0)
    readable: list[tuple[float, float]]  # (scale, share of readable pictures)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    pictures: int = 0  # edited ones that were made for it

    @property
    def unit(self) -> str:
        """What 1.0 means, in words."""
        return f"one natural standard deviation of {self.attribute}, by the {self.by}".replace("the proxy", "proxy")

    def applied(self, adapter: Adapter) -> Adapter:
        """The adapter with the unit folded into its alphas."""
        return adapter.scaled(self.factor)


def calibrate(
    edit: Edit, scorer: Scorer, prompts: Sequence[str], seeds: Sequence[int], spread_seeds: Sequence[int] = (),
    settings: CalibrationSettings | None = None, sigma: float | None = None, paired: bool = False,
) -> Calibration:  # fmt: skip
    """Find an edit's unit, safe range and response on every prompt with every seed.

    paired: prompt i with seed i alone, as many of either. Pictures of one seed respond alike, whatever their prompts
    (docs/sliders.md), so for few pictures that tells more.
    sigma: the natural standard deviation, where it is known already. spread_seeds: further seeds for it alone, which
    needs more pictures than the mean does (unedited ones, shared by all sliders of a run). The unit is where half the
    distance between the mean moves at +s and -s is sigma. The safe range goes out from 0 on either side, step by step,
    as long as the mean still moves on (`least_gain`) and no more than `parse_loss` of the readable pictures are lost.
    Raises UserError if nothing can be read, if the attribute does not vary, or if the edit does not move it.
    """
    settings = settings or CalibrationSettings()
    probe = _Probe(edit, scorer, _rows(prompts, seeds, paired), list(spread_seeds), sigma, settings.few)
    unit = _find_unit(probe, settings) if settings.few is None else _find_unit_by_few(probe, settings)
    if settings.few is not None:  # few pictures are drawn in one batch, however far the response turns out to be safe
        steps = range(1, round(settings.furthest / settings.step) + 1)
        probe.measure([sign * unit * i * settings.step for i in steps for sign in (-1, 1)])
    # All pictures were seen to move by one unit, so that far it is safe if they can be read there; the few have the say
    # of what is beyond.
    read = all(probe.seen[raw].lost <= settings.parse_loss for raw in probe.by_all)
    least = 1.0 if probe.by_all and read and settings.step > 1 else 0.0
    low, high = (sign * max(least, _safe_end(probe, unit, sign, settings)) for sign in (-1, 1))
    if not low < high:
        raise UserError(f"the slider is not safe at any scale: the first step of {settings.step:g} sigma goes wrong")
    rows = sorted((round(raw / unit, 4), probe.move(raw), found.rate) for raw, found in probe.seen.items())
    return Calibration(
        attribute=scorer.attribute, by=scorer.by, factor=unit, sigma=probe.sigma, safe_range=(low, high),
        curve=[(scale, round(move, 4)) for scale, move, _ in rows if not math.isnan(move)],
        readable=[(scale, round(rate, 4)) for scale, _, rate in rows],
        prompts=list(prompts), seeds=list(seeds), pictures=probe.made,
    )  # fmt: skip


Rows = list[tuple[str, int]]


def _rows(prompts: Sequence[str], seeds: Sequence[int], paired: bool) -> Rows:
    """(prompt, seed) of every picture."""
    if not prompts or not seeds:
        raise UserError("calibration needs at least one prompt and one seed")
    if not paired:
        return [(prompt, seed) for prompt in prompts for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds are no pairs")
    return list(zip(prompts, seeds, strict=True))


@dataclass(frozen=True)
class _Seen:
    """What was measured at a raw scale."""

    move: float  # mean, in sigma; NaN where nothing could be read
    rate: float  # share of readable pictures
    lost: float  # by how much that is less than of the same pictures unedited


class _Probe:
    """Mean moves and parse rates at raw scales, each measured once, on the first `few` pictures.

    Moves are multiplied by how much further all pictures move than the few, once `of_all` has found that.
    """

    def __init__(
        self, edit: Edit, scorer: Scorer, rows: Rows, more: list[int], sigma: float | None, few: int | None
    ) -> None:
        self.edit, self.scorer, self.rows = edit, scorer, rows
        self.few, self.ratio = min(few or len(rows), len(rows)), 1.0
        prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
        both = list(dict.fromkeys([*rows, *((prompt, seed) for prompt in prompts for seed in more)]))
        # Where sigma is known, the other unedited pictures tell nothing: a distance from +s to -s needs none.
        score = self._scores(both if sigma is None else rows[: self.few], [0.0])[:, 0]
        known = score[~np.isnan(score)]
        if len(known) < 2:
            raise UserError(f"{len(known)} of {score.size} unedited pictures can be read: calibration needs 2 at least")
        self.sigma = float(np.std(known, ddof=1)) if sigma is None else sigma
        if self.sigma < 1e-6:
            raise UserError(f"{scorer.attribute} is the same in all {len(known)} unedited pictures: it has no unit")
        self.plain = score[: self.few]
        self.seen: dict[float, _Seen] = {0.0: _Seen(0.0, 1 - float(np.isnan(self.plain).mean()), 0.0)}
        self.made = 0
        self.by_all: list[float] = []  # the pair of scales at which all were measured last

    def _scores(self, rows: Rows, scales: list[float]) -> np.ndarray:
        every = [(prompt, seed, scale) for prompt, seed in rows for scale in scales]
        pictures = self.edit.pictures([r[0] for r in every], [r[1] for r in every], [r[2] for r in every])
        return np.asarray(self.scorer.scores(pictures), dtype=np.float64).reshape(-1, len(scales))

    def measure(self, raw: Sequence[float]) -> None:
        """Measure what is not known yet, in one call."""
        new = [scale for scale in dict.fromkeys(raw) if scale not in self.seen]
        if new:
            self._keep(new, self._scores(self.rows[: self.few], new))

    def _keep(self, scales: list[float], found: np.ndarray) -> None:
        """Scores [rows, scales], of which the first rows are the few."""
        self.made += found.size
        moves = (found[: self.few] - self.plain[:, None]) / self.sigma
        rates = 1 - np.isnan(found).mean(0)
        lost = 1 - float(np.isnan(self.plain).mean()) - rates
        for scale, move, rate, less in zip(scales, _means(moves), rates, lost, strict=True):
            self.seen[scale] = _Seen(float(move), float(rate), float(less))

    def move(self, raw: float) -> float:
        """Mean move of all pictures in sigma, as far as it is known."""
        return self.seen[raw].move * self.ratio

    def half(self, raw: float) -> float:
        """Half the distance between the mean moves at +raw and -raw, in sigma; one side's where the other is lost."""
        self.measure([raw, -raw])
        sides = [move for move in (self.move(raw), -self.move(-raw)) if not math.isnan(move)]
        return sum(sides) / len(sides) if sides else math.nan

    def of_all(self, raw: float) -> float:
        """`half` by all pictures, which must not have been measured there before; NaN where none can be read."""
        scales = [raw, -raw]
        found = self._scores(self.rows, scales)
        self._keep(scales, found)
        self.by_all = scales
        apart = (found[:, 0] - found[:, 1]) / (2 * self.sigma)
        every, few = (float(_means(one[:, None])[0]) for one in (apart, apart[: self.few]))
        # Few that hardly move, or the other way, say nothing of the shape either: then they are taken as they are.
        self.ratio = every / few if few and 1 / MOST_APART <= every / few <= MOST_APART else 1.0
        return every


def _means(moves: np.ndarray) -> np.ndarray:
    """Means of columns over what is known; NaN for a column of which nothing is."""
    known = ~np.isnan(moves)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, moves, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _find_unit(probe: _Probe, settings: CalibrationSettings) -> float:
    """The raw scale whose half distance is one sigma, signed: by secants, halving where they make no headway."""
    raw = settings.first
    low, high = (0.0, 0.0), (math.inf, math.inf)  # (raw scale, size) known to be too small, too large
    best = (math.inf, raw)  # (error, unit)
    last_side = 0
    for _ in range(settings.rounds):
        if raw > settings.largest:
            break
        moved = probe.half(raw)
        size = math.inf if math.isnan(moved) else abs(moved)  # where nothing can be read it is too much
        if 0.05 < size < math.inf:
            best = min(best, (abs(size - 1), math.copysign(raw, moved)))
            if best[0] <= 0.03:
                break
        side = 1 if size >= 1 else -1
        low, high = (low, (raw, size)) if side > 0 else ((raw, size), high)
        if high[0] == math.inf:
            raw *= min(4.0, 1 / max(size, 1e-6))
        elif high[1] == math.inf or side == last_side:
            raw = (low[0] + high[0]) / 2 if low[0] else high[0] / 4
        else:
            raw = low[0] + (1 - low[1]) / (high[1] - low[1]) * (high[0] - low[0])
        last_side = side
    if best[0] > 0.03 and high[1] < math.inf:
        # Out of rounds between two scales: on the straight line between them.
        between = low[0] + (1 - low[1]) / (high[1] - low[1]) * (high[0] - low[0])
        return math.copysign(between, best[1]) if best[0] < math.inf else between
    if best[0] <= 0.25:
        return best[1]
    raise _no_unit(probe)


def _find_unit_by_few(probe: _Probe, settings: CalibrationSettings) -> float:
    """The same where few pictures find about where it is, all measure there, and the rest is a step along the curve."""
    raw = settings.first
    for _ in range(settings.rounds):
        moved = probe.half(raw)
        if abs(moved) >= NOTICED or raw >= settings.largest:
            break
        raw = raw / 2 if math.isnan(moved) else min(4 * raw, settings.largest)
    size, tried = abs(moved), raw
    if math.isnan(moved) or size < NOTICED:
        raise _no_unit(probe)
    raw, measured = tried * min(4.0, 1 / size), None
    for last in (False, True):
        if raw in probe.seen:
            raw *= 1.01  # a scale is drawn once
        moved = probe.of_all(raw)
        if math.isnan(moved):
            raise _no_unit(probe)
        if abs(abs(moved) - 1) <= NEAR:
            break
        if abs(moved) < NOTICED or last:
            raise _no_unit(probe)
        measured = raw, abs(moved)
        raw = _reaches_1(measured, (tried, abs(probe.half(tried))), 4.0)
    # On from there along a response that flattens as it does between this pair and another one: where all were measured
    # before, or else the few's first.
    other = measured or (tried, abs(probe.half(tried)))
    return math.copysign(_reaches_1((raw, abs(moved)), other, FURTHER, ENOUGH), moved)


def _reaches_1(
    here: tuple[float, float], there: tuple[float, float], furthest: float, enough: float = 1.0
) -> float:  # fmt: skip
    """Where a tanh(s / c) through two (scale, move), both above 0, reaches 1; at most `furthest` times from `here`.

    It always rises, as a slider does until it breaks. Where its top is about 1 or lower, `enough` of the top will do,
    or flat ground would be crossed for nothing (at 1 it never gets there: the furthest). Points that lie straight, bend
    upwards, or lie so near each other that a bend would be chance, are taken as a straight line from 0 through `here`.
    """
    scale, moved = here
    ends = scale / furthest, scale * furthest
    (low, at_low), (high, at_high) = sorted((here, there))
    grows = at_high / at_low
    if high - low <= APART * scale or grows >= 0.999 * high / low:
        return float(np.clip(scale / moved, *ends))
    bends = np.geomspace(low / 20, 50 * high, 2000)  # c, from flat between the two to straight
    c = float(bends[np.argmin(np.abs(np.tanh(high / bends) / np.tanh(low / bends) - grows))])
    top = moved / math.tanh(scale / c)
    share = min(1 / top, enough)
    return float(np.clip(c * math.atanh(share), *ends)) if share < 1 else ends[1]


FURTHER = 1.7  # times the scale at which all were measured last: beyond (or below its inverse) nothing is guessed
MOST_APART = 3.0  # times that all pictures may move as far as the few
APART = 0.15  # of a scale: two pairs that are nearer show more of chance than of a bend
NOTICED = 0.15  # sigma: a smaller move tells nothing of the scale
ENOUGH = 0.97  # of the most that a flattening slider moves by: what is left below 1 is less than units are off by
NEAR = 0.4  # sigma by which all pictures may miss the few's unit for one step along the curve to mend it


def _no_unit(probe: _Probe) -> UserError:
    reached = max((abs(probe.move(raw)) for raw, one in probe.seen.items() if not math.isnan(one.move)), default=0.0)
    return UserError(
        f"the slider moves {probe.scorer.attribute} by {reached:.2f} natural standard deviations at most (scales up to "
        f"{max(probe.seen):g}): there is no scale to call 1.0"
    )


def _safe_end(probe: _Probe, unit: float, sign: int, settings: CalibrationSettings) -> float:
    """How many units the response is safe on the side of `sign`: a multiple of the step, 0 if the first is not."""
    safe = 0.0
    for i in range(1, round(settings.furthest / settings.step) + 1):
        raw = sign * unit * i * settings.step
        probe.measure([raw])
        found = probe.seen[raw]
        gain = sign * (probe.move(raw) - probe.move(sign * unit * safe))
        lost = found.lost > settings.parse_loss + 1e-9
        if math.isnan(found.move) or lost or gain < settings.least_gain * settings.step:
            break
        safe = i * settings.step
    return safe
