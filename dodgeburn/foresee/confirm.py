"""Which of many ways to save is taken: the cheapest that is good enough for sure, however many were tried.

The cheapest of thousands that all seem good enough on the same prompts may be the one that was luckiest there: a bound
for one way says nothing of the best of many. So the confidence is that of all ways at once. How far the luckiest of
them deviates by chance is drawn by a multiplier bootstrap over prompts (Chernozhukov, Chetverikov and Kato,
arXiv:1212.6906), which asks less of ways that rise and fall together than a correction for their number would. Two
things keep it from asking more than it must: ways that are too bad beyond doubt cannot pass by luck and do not count
(Hansen, "A test for superior predictive ability", 2005), nor do those that have passed already (Romano and Wolf,
"Stepwise multiple testing as formalized data snooping", 2005).
"""

from __future__ import annotations

import math

import numpy as np

SURE = 0.95  # with which no way that is too bad passes
DRAWS = 1000


def surely_good(off: np.ndarray, prompt: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which ways [ways] are good enough: the mean of `off` [ways, slots] is 0 or less, with 95 % confidence for all of
    them together. Slots of one prompt [slots] count as what they are together. With one prompt only those pass that are
    off by the same, 0 or less, in every slot."""
    names, of = np.unique(prompt, return_inverse=True)
    k, mean = len(names), off.mean(axis=1)
    passed = (np.ptp(off, axis=1) == 0) & (mean <= 0)
    vary = np.flatnonzero(np.ptp(off, axis=1) > 0)
    if k < 2 or not len(vary):
        return passed
    sums = np.stack([np.bincount(of, weights=off[way] - mean[way], minlength=k) for way in vary]) / off.shape[1]
    error = np.sqrt((sums**2).sum(axis=1) * k / (k - 1))
    t = mean[vary] / error
    luck = sums / error[:, None] @ np.random.default_rng(seed).normal(size=(k, DRAWS))
    open_ = t < math.sqrt(2 * math.log(max(math.log(k), 1.0)))
    while open_.any():
        factor = float(np.quantile(luck[open_].max(axis=0), SURE))
        new = open_ & (t + factor <= 0)
        if not new.any():
            break
        passed[vary[new]] = True
        open_ &= ~new
    return passed


def surely_cheapest(price: np.ndarray, off: np.ndarray, prompt: np.ndarray) -> int | None:
    """The cheapest way that is good enough; None if none surely is. price: mean of each way [ways], in whole pictures;
    off: its true severity above what is wanted [ways, slots]; prompt: of each slot [slots]."""
    enough = np.flatnonzero(surely_good(off, prompt)) if len(off) else np.zeros(0, dtype=np.int64)
    return int(enough[np.argmin(price[enough])]) if len(enough) else None
