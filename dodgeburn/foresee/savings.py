"""What stopping early saves when several seeds are tried and the best picture is kept.

Comparisons are at equal quality: against fewer complete pictures for the same price, not against running all of them.
Quality is the true severity of the chosen picture (the user's eye chooses among the finished ones, in both arms). All
pictures compared have the same prompt and settings. Prices are in whole pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from dodgeburn.foresee.confirm import surely_cheapest
from dodgeburn.foresee.policy import GRID

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)  # where estimators look
NEAR = 0.03  # looks fall on whole steps, so a little beside those shares


@dataclass(frozen=True)
class Funnel:
    """`begin` candidates a slot; after a share of the steps so many go on: ((share, candidates), ...)."""

    begin: int
    stages: tuple[tuple[float, int], ...] = ()

    @property
    def price(self) -> float:
        """Whole pictures' worth of evaluations a slot."""
        total, alive, before = 0.0, self.begin, 0.0
        for share, n in self.stages:
            total += alive * (share - before)
            alive, before = min(alive, n), share
        return total + alive * (1 - before)

    def keep(self, progress: float, before: float) -> int | None:
        """How many go on at the first step whose progress reaches a stage; None where nothing is due."""
        due = [n for share, n in self.stages if before + NEAR < share <= progress + NEAR]
        return min(due) if due else None


@dataclass
class Slots:
    """Pictures of one prompt and settings, n a slot: what was estimated and what came out."""

    rank: np.ndarray  # [slots, n, GRID] estimates at shares 1/GRID ... 1, larger is worse
    severity: np.ndarray  # [slots, n] true, 0..5
    prompt: np.ndarray  # [slots] which prompt


class Result(NamedTuple):
    """Means over slots."""

    severity: float  # true severity of the chosen picture
    price: float  # whole pictures a slot


def best_of(slots: Slots) -> np.ndarray:
    """Expected severity of the best of 1, 2 .. n complete pictures drawn from each slot: [slots, n].

    Exact: the i-th best of n is the best of m drawn ones in C(n - i, m - 1) of C(n, m) cases.
    """
    n = slots.severity.shape[1]
    ordered = np.sort(slots.severity, axis=1)
    shares = np.array([[math.comb(n - 1 - i, m - 1) / math.comb(n, m) for i in range(n)] for m in range(1, n + 1)])
    return np.asarray(ordered @ shares.T)


def run(funnel: Funnel, slots: Slots, draws: int = 12, seed: int = 0) -> np.ndarray:
    """Severity of each slot's chosen picture [slots], mean over random choices of its candidates."""
    if not funnel.stages:
        return best_of(slots)[:, funnel.begin - 1]  # exact
    rng = np.random.default_rng(seed)
    total = np.zeros(len(slots.severity))
    n = slots.severity.shape[1]
    rows = np.arange(len(slots.severity))[:, None]
    for _ in range(draws):
        chosen = rng.permuted(np.tile(np.arange(n), (len(rows), 1)), axis=1)[:, : funnel.begin]
        for share, keep in funnel.stages:
            at = slots.rank[rows, chosen, min(GRID - 1, max(0, math.ceil(share * GRID - 1e-6) - 1))]
            order = np.argsort(at, axis=1, kind="stable")[:, :keep]
            chosen = np.take_along_axis(chosen, order, axis=1)
        total += np.take_along_axis(slots.severity, chosen, axis=1).min(axis=1)
    return total / draws


def funnels(most: int) -> list[Funnel]:
    """One- and two-stage funnels of up to `most` candidates."""
    found = []
    for begin in range(2, most + 1):
        found += [Funnel(begin, ((s, k),)) for s in SHARES for k in range(1, begin)]
        found += [
            Funnel(begin, ((s, k), (t, m)))
            for (s, t), k, m in product([(s, t) for s in SHARES for t in SHARES if s < t], (2, 3, 4, 5), (1, 2))
            if m < k < begin
        ]
    return found


def equal_price(severity: float, curve: np.ndarray) -> float:
    """How many complete pictures reach this severity, between whole numbers by mixing; the curve's end if none does."""
    if severity >= curve[0]:
        return 1.0
    below = np.flatnonzero(curve <= severity + 1e-12)
    if not len(below):
        return float(len(curve))
    m = int(below[0])  # best of m + 1 is at least as good, best of m is not
    return m + float((curve[m - 1] - severity) / max(curve[m - 1] - curve[m], 1e-12))


def cheapest(slots: Slots, wanted: np.ndarray, most: int) -> Funnel:
    """The cheapest funnel whose chosen pictures are with 95 % confidence at least as good as `wanted` (true severity
    [slots]) in the mean: on prompts that nothing else learned from (`confirm.py`).

    Complete pictures are among the candidates, so where estimates are worthless nothing is stopped.
    """
    n = slots.severity.shape[1]
    ways = [*(Funnel(m) for m in range(1, n + 1)), *funnels(min(most, n))]
    off = np.array([run(funnel, slots) for funnel in ways]) - wanted
    off[np.abs(off) < 1e-9] = 0.0  # as many pictures as are wanted are as good, whatever the rounding
    taken = surely_cheapest(np.array([funnel.price for funnel in ways]), off, slots.prompt)
    return Funnel(n) if taken is None else ways[taken]


def gain(severity: float, curve: np.ndarray, n: int) -> float:
    """Share of the improvement from one picture to the best of n."""
    return float((curve[0] - severity) / max(curve[0] - curve[n - 1], 1e-12))


def slots_of(
    rank: np.ndarray, severity: np.ndarray, group: Sequence[str], prompt: Sequence[str], least: int = 4
) -> Slots | None:
    """Slots from pictures [n]: groups cut to the size that most have; None if no group has `least` pictures."""
    index = members_of(group, least)
    if not len(index):
        return None
    return Slots(rank[index], severity[index], np.array([prompt[rows[0]] for rows in index]))


def members_of(group: Sequence[str], least: int = 4) -> np.ndarray:
    """Indices [slots, n] of the pictures of each group, cut to the size that most have; none if no group has
    `least`."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(group):
        members.setdefault(name, []).append(i)
    sizes = [len(rows) for rows in members.values() if len(rows) >= least]
    if not sizes:
        return np.zeros((0, 0), dtype=np.int64)
    size = max(set(sizes), key=lambda s: (s * sum(x >= s for x in sizes), s))
    return np.array([rows[:size] for rows in members.values() if len(rows) >= size])
