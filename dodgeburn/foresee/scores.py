"""How good estimates are: figures of merit, within prompts, with intervals over prompts.

A figure over all pictures mixes two things: telling hard prompts from easy ones, and telling good pictures of one
prompt from bad ones. Only the second lets a sampler drop pictures, so the rank correlation here is within prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from dodgeburn.measure.intervals import Interval


def auroc(score: np.ndarray, bad: np.ndarray) -> float:
    """Chance that a bad picture scores above a good one (ties count half); NaN where one kind is missing."""
    bad = np.asarray(bad, bool)
    n1, n0 = int(bad.sum()), int((~bad).sum())
    if not n1 or not n0:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[bad].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def within_prompt_auroc(score: np.ndarray, bad: np.ndarray, groups: np.ndarray) -> float:
    """`auroc` over pairs of pictures of one prompt only."""
    won = pairs = 0.0
    for rows in rows_by_group(groups):
        y, s = np.asarray(bad, bool)[rows], np.asarray(score)[rows]
        n = int(y.sum()) * int((~y).sum())
        if n:
            won += auroc(s, y) * n
            pairs += n
    return won / pairs if pairs else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; 0 where either does not vary."""
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def within_prompt_spearman(score: np.ndarray, severity: np.ndarray, groups: np.ndarray) -> float:
    """Mean over prompts of the rank correlation; prompts whose pictures are all equally bad, or fewer than 3, say
    nothing and are left out. NaN if no prompt is left."""
    found = [
        spearman(np.asarray(score)[rows], np.asarray(severity)[rows])
        for rows in rows_by_group(groups)
        if len(rows) >= 3 and np.ptp(np.asarray(severity)[rows]) > 0
    ]
    return float(np.mean(found)) if found else float("nan")


def calibration_error(p: np.ndarray, bad: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over `bins` bins of equal mass."""
    order = np.argsort(p, kind="stable")
    error = 0.0
    for part in np.array_split(order, bins):
        if len(part):
            error += len(part) / len(order) * abs(float(np.mean(p[part])) - float(np.mean(np.asarray(bad)[part])))
    return error


def calibration_floor(p: np.ndarray, bins: int = 10, draws: int = 400, seed: int = 0) -> float:
    """What `calibration_error` would be on average if the probabilities were exactly right: with so many pictures
    chance alone makes it more than 0."""
    rng = np.random.default_rng(seed)
    return float(np.mean([calibration_error(p, rng.random(len(p)) < p, bins) for _ in range(draws)]))


def brier(p: np.ndarray, bad: np.ndarray) -> float:
    """Mean squared error of probabilities."""
    return float(np.mean((np.asarray(p) - np.asarray(bad)) ** 2))


def spread_ratio(predicted: np.ndarray, severity: np.ndarray) -> float:
    """SD(predictions) / SD(labels). A calibrated estimate of weak signals has a small one by right: its own
    correlation."""
    return float(np.std(predicted) / max(float(np.std(severity)), 1e-9))


def rows_by_group(groups: np.ndarray) -> list[np.ndarray]:
    """Indices of each group's members."""
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def over_prompts(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    resamples: int = 300,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic of rows with its interval when prompts, with all their pictures, are drawn again with replacement.

    statistic: of row indices. A prompt drawn twice counts as two prompts only where the statistic doesn't group by
    prompt itself; for those that do, use `over_prompt_values`.
    """
    members = rows_by_group(groups)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = rng.integers(len(members), size=len(members))
        found.append(statistic(np.concatenate([members[i] for i in drawn])))
    known = np.asarray(found)[~np.isnan(found)]
    estimate = statistic(np.concatenate(members))
    if len(known) < resamples / 2:
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def over_prompt_values(values: np.ndarray, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of one value a prompt, NaN left out, with its interval over prompts."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Interval(float(known.mean()) if len(known) else float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = known[rng.integers(len(known), size=(resamples, len(known)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(known.mean()), float(low), float(high))


def spearman_by_prompt(score: np.ndarray, severity: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each prompt's rank correlation; NaN where its pictures are all equally bad, or fewer than 3."""
    score, severity = np.asarray(score), np.asarray(severity)
    return np.array([
        spearman(score[rows], severity[rows]) if len(rows) >= 3 and np.ptp(severity[rows]) > 0 else np.nan
        for rows in rows_by_group(groups)
    ])  # fmt: skip
