"""Weighted means of the models' values. weighted_sum, sum_twice and triple_sum are supermerger's "Weight", "Twice" and
"Triple sum" (mergers.py @b9229d75) and meh's (@003017e8), computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weighted_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """(1 - alpha) A + alpha B, for alpha in 0..1: torch.lerp, the form that other tools use too.

    It computes A + alpha (B - A) below one half and B - (1 - alpha) (B - A) from there on: exact at both
    ends, exactly A where A and B agree, the same under exchange of A and B up to rounding.
    """
    import torch

    a, b = models
    torch.lerp(a, b, alpha, out=out)


def sum_twice(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, beta: float) -> None:
    """(1 - beta) ((1 - alpha) A + alpha B) + beta C (supermerger's "sum twice"); beta 0 is weighted_sum."""
    import torch

    a, b, c = models
    torch.lerp(a, b, alpha, out=out)
    torch.lerp(out, c, beta, out=out)


def triple_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, beta: float) -> None:
    """(1 - alpha - beta) A + alpha B + beta C (supermerger's "triple sum"), as A + alpha (B - A) + beta (C - A).

    alpha + beta may pass 1: then A counts negatively.
    """
    import torch

    a, b, c = models
    torch.sub(b, a, out=out)
    out.mul_(alpha)
    out.add_(c - a, alpha=beta)
    out.add_(a)


def average(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """(1 - alpha) A + alpha mean(A, B, C, ...): the plain mean of all models at alpha 1 ("model soup",
    Wortsman et al. 2022, uniform soup). Summed as differences from A, so exactly A where all agree.
    """
    a = models[0]
    out.zero_()
    for other in models[1:]:
        out.add_(other - a)
    out.mul_(alpha / len(models)).add_(a)
