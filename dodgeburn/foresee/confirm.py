"""Which of many ways to save is taken: sifted on half of the prompts, confirmed on the other half.

The cheapest of thousands that all seem good enough on the same prompts is the one that was luckiest there. So the
prompts are divided. Pareto testing (Laufer-Goldshtein et al., arXiv:2210.07913): one half shows which ways nothing else
beats in price and safety at once and puts them in order, the safest first; the other half tests them in that order and
stops at the first that fails. As the order is fixed beforehand, the chance of taking one that is too bad stays that of
a single test, however many ways were tried.
"""

from __future__ import annotations

import math

import numpy as np

CONFIDENT = 1.645  # standard errors of a one-sided bound of 95 %


def halves(prompt: np.ndarray) -> np.ndarray:
    """Which slots [slots] are sifted on: those of every second prompt, in the order in which prompts come."""
    names = list(dict.fromkeys(prompt.tolist()))
    return np.isin(prompt, names[::2])


def bound(off: np.ndarray, prompt: np.ndarray) -> float:
    """Upper 95 % bound of the mean of `off` [slots]; slots of one prompt count as what they are together (standard
    error over clusters). Infinite for a single prompt, unless nothing is off at all."""
    mean = float(off.mean())
    names, of = np.unique(prompt, return_inverse=True)
    k = len(names)
    if not off.any():
        return 0.0
    if k < 2:
        return math.inf
    sums = np.bincount(of, weights=off - mean, minlength=k)
    return mean + CONFIDENT * math.sqrt(float((sums**2).sum()) * k / (k - 1)) / len(off)


def confirmed(price: np.ndarray, off: np.ndarray, prompt: np.ndarray) -> int | None:
    """The cheapest way whose pictures are good enough; None if the safest of them is not.

    price: in whole pictures [ways, slots]; off: true severity above what is wanted [ways, slots]; prompt: of each slot
    [slots].
    """
    sifted = halves(prompt)
    if not len(price) or sifted.all():
        return None
    safety = np.array([bound(row[sifted], prompt[sifted]) for row in off])
    prices = price[:, sifted].mean(axis=1)
    taken, cheapest = None, math.inf
    for way in np.lexsort((prices, safety)):
        if prices[way] >= cheapest:  # one that comes before it is as safe and no dearer
            continue
        if bound(off[way, ~sifted], prompt[~sifted]) > 0:
            break
        taken, cheapest = int(way), float(prices[way])
    return taken
