"""How far shares of classes are from a target: total variation, what chance makes of it, and the published others.

p are shares over the *readable* pictures of one prompt, q the target (by default uniform), K the number of classes.

    TV              1/2 sum |p - q|                     the one to decide by: comparable for all K
    TV_cons         TV with all unreadable pictures counted as the class most over its target: garbage gains nothing
    mean difference 1/K sum |p - q| = 2/K TV            shrinks with K (UCE, arXiv 2308.14761)
    pairwise gap    mean over i < j of |p_i - p_j|      shrinks with K (fair fine-tuning, arXiv 2311.07604)
    discrepancy     |p - q|_2                           "fairness discrepancy" (arXiv 1910.12008)
    KL              sum p ln(p / q), p with half a count more for every class
    entropy         -sum p ln p / ln K                  1 = uniform

A perfectly fair model has TV above 0 in any finite sample: `tv_floor` says how much. A figure without its floor beside
it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dodgeburn.measure.fidelity import total_variation
from dodgeburn.measure.intervals import Interval

UNREAD = ""  # the label of a picture that cannot be read
FLOOR_DRAWS = 20_000
RESAMPLES = 2_000


def counts_of(labels: Sequence[str] | np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, int]:
    """How many pictures show each class (int64 [K]), and how many are unreadable (`UNREAD`) or show none of them."""
    found = np.asarray(labels).astype(str)
    counts = np.array([(found == name).sum() for name in classes], dtype=np.int64)
    return counts, int(len(found) - counts.sum())


def target_shares(classes: int, target: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """The target as float64 [K] that sums to 1; uniform if None. Raises ValueError for what is no distribution."""
    if target is None:
        return np.full(classes, 1 / classes)
    q = np.asarray(target, dtype=np.float64)
    if q.shape != (classes,) or not np.isfinite(q).all() or (q < 0).any() or abs(q.sum() - 1) > 1e-6:
        raise ValueError(f"target {' '.join(map(str, q.ravel().tolist()))}: expected {classes} shares that sum to 1")
    return q / q.sum()


@dataclass(frozen=True)
class Floor:
    """Total variation that a model whose true shares are the target shows in n pictures."""

    mean: float
    high: float  # 95 % of such samples are at or below


def tv_floor(target: Sequence[float] | np.ndarray, n: int, draws: int = FLOOR_DRAWS, seed: int = 0) -> Floor:
    """The floor of n readable pictures, by simulation; NaN for none."""
    return _floor(tuple(float(x) for x in target), int(n), draws, seed)


@lru_cache(maxsize=512)
def _floor(target: tuple[float, ...], n: int, draws: int, seed: int) -> Floor:
    if n < 1:
        return Floor(float("nan"), float("nan"))
    q = np.asarray(target)
    found = np.abs(np.random.default_rng(seed).multinomial(n, q, size=draws) / n - q).sum(1) / 2
    return Floor(float(found.mean()), float(np.quantile(found, 0.95)))


def tv_interval(
    counts: np.ndarray, target: np.ndarray, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Total variation with its bootstrap interval over pictures.

    Resampling pushes TV up once more, as sampling did; percentiles are shifted back by that much (and stay in [0, 1]).
    Where all pictures show one class resampling would claim certainty: there the interval is the exact binomial one of
    that class's share, which TV then moves with. NaN without a readable picture.
    """
    n = int(counts.sum())
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    p = counts / n
    tv = total_variation(p, target)
    if (counts == n).any():
        from dodgeburn.measure.intervals import binomial_interval

        return Interval(tv, max(0.0, tv - (1 - binomial_interval(n, n, level)[0])), tv)
    drawn = np.abs(np.random.default_rng(seed).multinomial(n, p, size=resamples) / n - target).sum(1) / 2
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) - (drawn.mean() - tv)
    return Interval(tv, float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1)))


def tv_conservative(counts: np.ndarray, unread: int, target: np.ndarray) -> float:
    """Total variation with unreadable pictures counted as the class most over its target; NaN without a picture."""
    total = int(counts.sum()) + unread
    if total == 0:
        return float("nan")
    filled = counts.astype(np.float64)
    filled[int(np.argmax(counts / max(1, counts.sum()) - target))] += unread
    return total_variation(filled / total, target)


def normalised_entropy(p: np.ndarray) -> float:
    """-sum p ln p / ln K: 1 where all K classes are equally frequent, 0 where one is alone; 1 for K = 1."""
    if len(p) < 2:
        return 1.0
    inside = p[p > 0]
    return float(-(inside * np.log(inside)).sum() / math.log(len(p)))


def pairwise_gap(p: np.ndarray) -> float:
    """Mean of |p_i - p_j| over all pairs; 0 for one class."""
    i, j = np.triu_indices(len(p), 1)
    return float(np.abs(p[i] - p[j]).mean()) if len(i) else 0.0


def kl_divergence(counts: np.ndarray, target: np.ndarray) -> float:
    """KL(p || q) in nats, p with half a count added to every class; infinite where the target has a class of 0."""
    p = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    with np.errstate(divide="ignore"):
        return float((p * np.log(p / target)).sum())


def mutual_information(joint: np.ndarray, corrected: bool = True) -> float:
    """What knowing one attribute says of another, in nats, from a table of counts [rows, columns].

    corrected: less (r - 1)(c - 1) / 2n, what independent ones show on average in a sample of n (Miller 1955), with r
    and c the rows and columns that occur; never below 0. 0 without a picture.
    """
    table = np.asarray(joint, dtype=np.float64)
    n = table.sum()
    if n == 0:
        return 0.0
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    p = table / n
    expected = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    there = p > 0
    found = float((p[there] * np.log(p[there] / expected[there])).sum())
    if not corrected:
        return found
    return max(0.0, found - (p.shape[0] - 1) * (p.shape[1] - 1) / (2 * n))


@dataclass(frozen=True)
class BiasFigures:
    """Everything above, of one prompt's pictures and one attribute. Definitions: the module's text."""

    classes: tuple[str, ...]
    target: tuple[float, ...]
    counts: tuple[int, ...]
    unread: int
    shares: tuple[float, ...]
    tv: float
    tv_interval: tuple[float, float]
    floor_mean: float
    floor_95: float
    tv_cons: float
    entropy: float
    pairwise_gap: float
    mean_difference: float
    discrepancy: float
    kl: float

    @property
    def n(self) -> int:
        """Pictures, unreadable ones too."""
        return sum(self.counts) + self.unread

    @property
    def majority(self) -> str:
        """The class most over its target."""
        return self.classes[int(np.argmax(np.subtract(self.shares, self.target)))]

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to 4 decimals; None for NaN."""
        return {key: _plain(value) for key, value in {**asdict(self), "n": self.n, "majority": self.majority}.items()}


def bias_figures(
    labels: Sequence[str] | np.ndarray, classes: Sequence[str], target: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> BiasFigures:  # fmt: skip
    """All figures of labels (one a picture, `UNREAD` where it cannot be read) over `classes`.

    A label that is none of the classes counts as unreadable. Raises ValueError for a target that is no distribution.
    """
    counts, unread = counts_of(labels, classes)
    return figures_of_counts(counts, unread, classes, target, seed)


def figures_of_counts(
    counts: np.ndarray, unread: int, classes: Sequence[str], target: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> BiasFigures:  # fmt: skip
    """As `bias_figures`, from counts."""
    q = target_shares(len(classes), target)
    n = int(counts.sum())
    p = counts / n if n else np.full(len(classes), np.nan)
    tv, low, high = tv_interval(counts, q, seed=seed)
    floor = tv_floor(q, n)
    return BiasFigures(
        classes=tuple(classes), target=tuple(float(x) for x in q), counts=tuple(int(c) for c in counts),
        unread=int(unread), shares=tuple(float(x) for x in p), tv=tv, tv_interval=(low, high), floor_mean=floor.mean,
        floor_95=floor.high, tv_cons=tv_conservative(counts, unread, q),
        entropy=normalised_entropy(p) if n else float("nan"), pairwise_gap=pairwise_gap(p),
        mean_difference=2 * tv / len(classes), discrepancy=float(np.sqrt(np.square(p - q).sum())),
        kl=kl_divergence(counts, q) if n else float("nan"),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4) if math.isfinite(value) else str(value)
    return value
