"""Centres of several models: model stock and geometric median, ending as (1 - alpha) A + alpha M."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STEPS, _CLOSE = 100, 1e-7


def model_stock(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, base: torch.Tensor) -> None:
    """Model Stock (Jang et al. 2024, eq. 2 and its extension to N): M = t mean + (1 - t) base with
    t = N c / (1 + (N - 1) c), c the mean cosine between the models' differences from the base.

    Taken for each tensor as a whole. A difference of zero has cosine 0 with all others; c below 0 counts as
    0 (t would leave 0..1), so unrelated models give the base.
    """
    import torch

    count = len(models)
    c = stock_cosine([model - base for model in models])
    t = count * c / (1 + (count - 1) * c)
    mean = torch.zeros_like(out)
    for model in models:
        mean.add_(model - base)
    mean.mul_(t / count).add_(base)
    torch.lerp(models[0], mean, alpha, out=out)


def stock_cosine(deltas: Sequence[torch.Tensor]) -> float:
    """Mean cosine over all pairs, 0 at least."""
    import torch

    flat = [delta.flatten() for delta in deltas]
    norms = [float(torch.linalg.vector_norm(delta)) for delta in flat]
    cosines = []
    for i, j in combinations(range(len(flat)), 2):
        size = norms[i] * norms[j]
        cosines.append(min(1.0, float(flat[i] @ flat[j]) / size) if size > 0 else 0.0)
    return max(0.0, sum(cosines) / len(cosines))


def geometric_median(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """M = the point with the least sum of distances to the models, each tensor a point (Weiszfeld 1937).

    At most 100 steps from the mean, until the centre moves less than 1e-7 of the models' spread. Two models
    have no single median: the mean is taken. A centre that lies on a model stays there (distances are at
    least 1e-7 of the spread). All computed as differences from A: exactly A where all agree.
    """
    import torch

    a = models[0]
    deltas = [model - a for model in models[1:]]
    spread = max(float(torch.linalg.vector_norm(delta)) for delta in deltas)
    if spread == 0.0:
        out.copy_(a)
        return
    deltas.insert(0, torch.zeros_like(a))
    centre = torch.zeros_like(a)
    for delta in deltas:
        centre.add_(delta, alpha=1 / len(deltas))
    for _ in range(_STEPS if len(deltas) > 2 else 0):
        distances = [float(torch.linalg.vector_norm(delta - centre)) for delta in deltas]
        weights = [1 / max(distance, _CLOSE * spread) for distance in distances]
        torch.mul(deltas[0], weights[0] / sum(weights), out=out)
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            out.add_(delta, alpha=weight / sum(weights))
        moved = float(torch.linalg.vector_norm(out - centre))
        centre.copy_(out)
        if moved <= _CLOSE * spread:
            break
    torch.add(a, centre, alpha=alpha, out=out)
