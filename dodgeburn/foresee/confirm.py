"""Which of many ways to save is taken: the cheapest that is good enough for sure, however many were tried.

The cheapest of thousands that all seem good enough on the same prompts may be the one that was luckiest there: a bound
for one way says nothing of the best of many. So the bounds hold for all ways at once. What the largest of their
deviations does by chance is drawn by a multiplier bootstrap over prompts (Chernozhukov, Chetverikov and Kato,
arXiv:1212.6906), which takes less for ways that rise and fall together than a correction for their number would.
"""

from __future__ import annotations

import numpy as np

SURE = 0.95  # with which all bounds hold
DRAWS = 1000


def upper_bounds(off: np.ndarray, prompt: np.ndarray, seed: int = 0) -> np.ndarray:
    """Upper 95 % bounds [ways] of the means of `off` [ways, slots], all at once; slots of one prompt [slots] count as
    what they are together. Infinite where there is one prompt only, but for ways that are off by the same in every
    slot."""
    names, of = np.unique(prompt, return_inverse=True)
    mean = off.mean(axis=1)
    same = np.ptp(off, axis=1) == 0
    if len(names) < 2:
        return np.where(same, mean, np.inf)
    k = len(names)
    sums = np.stack([np.bincount(of, weights=row, minlength=k) for row in off - mean[:, None]]) / off.shape[1]
    error = np.sqrt((sums**2).sum(axis=1) * k / (k - 1))
    if same.all():
        return mean
    studentized = sums[~same] / error[~same, None]
    weights = np.random.default_rng(seed).normal(size=(k, DRAWS))
    factor = float(np.quantile((studentized @ weights).max(axis=0), SURE))
    return np.asarray(mean + factor * np.where(same, 0.0, error))


def surely_cheapest(price: np.ndarray, off: np.ndarray, prompt: np.ndarray) -> int | None:
    """The cheapest way that is good enough; None if none surely is. price: mean of each way [ways], in whole pictures;
    off: its true severity above what is wanted [ways, slots]; prompt: of each slot [slots]."""
    enough = np.flatnonzero(upper_bounds(off, prompt) <= 0) if len(off) else np.zeros(0, dtype=np.int64)
    return int(enough[np.argmin(price[enough])]) if len(enough) else None
