"""Centres of several models: model stock and geometric median, ending as (1 - alpha) A + alpha M."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from dodgeburn.merge.methods.pieces import BASE, HeldPieces, Pieces, gram

if TYPE_CHECKING:
    import torch

_STEPS, _CLOSE = 100, 1e-7


def stock_share(pieces: Pieces) -> float:
    """Model Stock's t = N c / (1 + (N - 1) c): the mean's share, with c the mean cosine of all pairs of differences
    from the base. A difference of zero has cosine 0 with all others; c below 0 counts as 0 (t would leave 0..1).
    """
    count = pieces.models
    products = gram(pieces, BASE).tolist()
    cosines = []
    for i, j in combinations(range(count), 2):
        size = (products[i][i] * products[j][j]) ** 0.5
        cosines.append(min(1.0, products[i][j] / size) if size > 0 else 0.0)
    c = max(0.0, sum(cosines) / len(cosines))
    return count * c / (1 + (count - 1) * c)


def stock_cosine(deltas: Sequence[torch.Tensor]) -> float:
    """Mean cosine over all pairs of differences from the base, 0 at least."""
    import torch

    count = len(deltas)
    t = stock_share(HeldPieces(deltas, torch.zeros_like(deltas[0])))
    return t / (count - (count - 1) * t)


def model_stock(
    models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, base: torch.Tensor, found: float
) -> None:
    """Model Stock (Jang et al. 2024, eq. 2 and its extension to N): M = t mean + (1 - t) base, t by stock_share for
    each tensor as a whole. Unrelated models give the base.
    """
    import torch

    mean = torch.zeros_like(out)
    for model in models:
        mean.add_(model - base)
    mean.mul_(found / len(models)).add_(base)
    torch.lerp(models[0], mean, alpha, out=out)


def median_weights(pieces: Pieces) -> list[float]:
    """Weights of the models, of sum 1, whose mean is their geometric median, each tensor a point (Weiszfeld 1937).

    At most 100 steps from the mean, until the centre moves less than 1e-7 of the models' spread. Two models
    have no single median: the mean is taken. A centre that lies on a model stays there (distances are at
    least 1e-7 of the spread). The centre always is a mean of the models, so scalar products are all it takes.
    """
    import torch

    products = gram(pieces, 0)
    count = pieces.models
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    spread = float(products.diagonal().max()) ** 0.5
    for _ in range(_STEPS if count > 2 and spread > 0 else 0):
        along = products @ weights
        squares = products.diagonal() - 2 * along + weights @ along
        new = 1 / squares.clamp(min=0).sqrt().clamp(min=_CLOSE * spread)
        new /= new.sum()
        step = new - weights
        weights = new
        if float(step @ products @ step) <= (_CLOSE * spread) ** 2:
            break
    return [float(weight) for weight in weights]


def geometric_median(
    models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, found: Sequence[float]
) -> None:
    """M = the point with the least sum of distances to the models, by the weights that median_weights found.

    Computed as differences from A: exactly A where all agree.
    """
    out.zero_()
    for model, weight in zip(models[1:], found[1:], strict=True):
        out.add_(model - models[0], alpha=alpha * weight)
    out.add_(models[0])
