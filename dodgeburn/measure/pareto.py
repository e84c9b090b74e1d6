"""Which candidates no other one beats in everything."""

from __future__ import annotations

import numpy as np


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Whether each point [n, goals] (more is better in every goal) is on the Pareto front: bool [n].

    A point is off the front if another is at least as good in all goals and better in one; equal points stay together.
    A point with NaN is off the front.
    """
    grid = np.asarray(points, dtype=np.float64)
    known = np.asarray(~np.isnan(grid).any(axis=1))
    out = known.copy()
    for i in np.flatnonzero(known):
        others = grid[known]
        out[i] = not ((others >= grid[i]).all(axis=1) & (others > grid[i]).any(axis=1)).any()
    return out
