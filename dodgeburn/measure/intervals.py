"""95 % intervals of a mean over prompts and seeds, by resampling both.

A mean over 8 prompts x 4 seeds is uncertain for two reasons: other prompts could have been chosen, and other seeds.
The bootstrap here is nested: prompts are drawn with replacement, then for each drawn prompt its seeds are, and the mean
of the whole is taken; the interval is between the percentiles of 2 000 such means. (Davison and Hinkley 1997,
section 3.8; drawing at both levels errs a little on the wide side, few prompts a little on the narrow side.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with the ends of its interval; `low` and `high` are NaN where there is nothing to resample."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> list[float] | None:
        """[low, high], or None where there is none."""
        return None if np.isnan(self.low) else [self.low, self.high]


def bootstrap_mean(values: np.ndarray, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0,
                   shares: bool = False) -> Interval:  # fmt: skip
    """Mean of `values` [prompts, seeds] with its interval at `level` over prompts and seeds.

    NaN values are left out (a prompt that is all NaN entirely). The draws depend on `seed` and the shape only, so
    equal shapes are resampled alike. `shares`: values lie in [0, 1]; where all are 0 or all 1 resampling would claim
    certainty, and the exact binomial interval (Clopper and Pearson) of that many pictures stands instead.
    """
    grid = np.asarray(values, dtype=np.float64)
    if grid.ndim != 2:
        raise ValueError(f"expected values [prompts, seeds], not shape {grid.shape}")
    grid = grid[~np.isnan(grid).all(axis=1)]
    if grid.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    known = grid[~np.isnan(grid)]
    mean = float(known.mean())
    if len(known) < 2:
        return Interval(mean, float("nan"), float("nan"))
    if shares and (np.all(known == 0) or np.all(known == 1)):
        return Interval(mean, *binomial_interval(int(known.sum()), len(known), level))
    rng = np.random.default_rng(seed)
    n_prompts, n_seeds = grid.shape
    prompts = rng.integers(n_prompts, size=(resamples, n_prompts, 1))
    seeds = rng.integers(n_seeds, size=(resamples, n_prompts, n_seeds))
    drawn = grid[prompts, seeds].reshape(resamples, -1)
    there = ~np.isnan(drawn)
    counts = there.sum(axis=1)
    means = np.where(there, drawn, 0.0).sum(axis=1)[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def bootstrap_ratio(above: np.ndarray, below: np.ndarray, level: float = 0.95, resamples: int = RESAMPLES,
                    seed: int = 0) -> Interval:  # fmt: skip
    """Mean of `above` [prompts, seeds] over that of `below` [other prompts, seeds], with its interval.

    Prompts and seeds of either are drawn again by themselves. Everything is NaN where the mean of `below` is 0.
    """
    if not below.mean() > 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)

    def drawn(grid: np.ndarray) -> np.ndarray:
        n_prompts, n_seeds = grid.shape
        prompts = rng.integers(n_prompts, size=(resamples, n_prompts, 1))
        return grid[prompts, rng.integers(n_seeds, size=(resamples, n_prompts, n_seeds))].mean((1, 2))

    mean = float(above.mean() / below.mean())
    if above.size < 2 or below.size < 2:
        return Interval(mean, float("nan"), float("nan"))
    top, bottom = drawn(above), drawn(below)
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def binomial_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934) from `successes` of `n` independent trials."""
    from scipy.stats import binomtest

    ends = binomtest(successes, n).proportion_ci(confidence_level=level, method="exact")
    return float(ends.low), float(ends.high)


def bootstrap_statistics(
    statistics: Callable[[np.ndarray, np.ndarray], dict[str, float]], shape: tuple[int, int], level: float = 0.95,
    resamples: int = 300, seed: int = 0,
) -> dict[str, Interval]:  # fmt: skip
    """Intervals of statistics that are no plain means, over prompts and seeds resampled as in `bootstrap_mean`.

    statistics: called with the rows to use, prompts int [p] and their seeds int [p, n]; first with all as they are,
    which gives the estimates. Repeated seeds pull some statistics aside (a mean of magnitudes grows), so percentiles
    are shifted by the mean of the resampled values minus the estimate. NaN values of resamples are left out; a
    statistic that is NaN in more than half of them has no interval, nor has one that never changes (a share of 0 in all
    pictures): resampling would claim certainty.
    """
    prompts, seeds = shape
    estimate = statistics(np.arange(prompts), np.tile(np.arange(seeds), (prompts, 1)))
    if prompts * seeds < 2:
        return {name: Interval(value, float("nan"), float("nan")) for name, value in estimate.items()}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in estimate}
    for _ in range(resamples):
        chosen = rng.integers(prompts, size=prompts)
        for name, value in statistics(chosen, rng.integers(seeds, size=(prompts, seeds))).items():
            drawn[name].append(value)
    out = {}
    for name, value in estimate.items():
        found = np.asarray(drawn[name])
        found = found[~np.isnan(found)]
        if np.isnan(value) or 2 * len(found) < resamples or np.ptp(found) == 0:
            out[name] = Interval(value, float("nan"), float("nan"))
            continue
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) - (found.mean() - value)
        out[name] = Interval(value, float(low), float(high))
    return out
