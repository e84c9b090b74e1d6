"""Task vectors (model minus base) thinned out and combined: TIES, DARE, DELLA.

All end as (1 - alpha) A + alpha M, where M = base + strength x (the combined task vectors of all models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    import torch


def ties(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    density: float,
    strength: float,
) -> None:
    """TIES (Yadav et al. 2023, algorithm 1): trim each task vector to its `density` share of largest values,
    elect each place's sign by the sum of values (not by counting signs), mean over the values of that sign.

    Values equal to the smallest kept one are kept too. A place without any value, or with sum 0, is 0.
    """
    _finish(models, alpha, out, base, strength, _elect([trim(m - base, density) for m in models]))


def dare(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    generator: torch.Generator,
    density: float,
    strength: float,
) -> None:
    """DARE (Yu et al. 2024): keep each value of a task vector with probability `density`, divide what is kept
    by it, take the mean over the models. The expectation is the mean of the task vectors.
    """
    import torch

    total = torch.zeros_like(out)
    for model in models:
        mask = torch.rand(out.shape, generator=generator, dtype=torch.float32) < density
        total.add_((model - base).mul_(mask.to(out.device)))
    _finish(models, alpha, out, base, strength, total.div_(density * len(models)))


def della(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    generator: torch.Generator,
    density: float,
    window: float,
    strength: float,
) -> None:
    """DELLA (Deep et al. 2024): keep values with a probability that grows with the rank of their size, evenly
    from density - window/2 (smallest) to density + window/2 (largest), divide each by its probability; then
    sign election and mean as TIES. Raises UserError if the probabilities leave (0, 1].
    """
    import torch

    if not (density - window / 2 > 0 and density + window / 2 <= 1):
        raise UserError(
            f"density {density} and window {window} give probabilities {density - window / 2:g} to "
            f"{density + window / 2:g}: expected above 0 and at most 1; take a smaller window"
        )
    kept = []
    for model in models:
        delta = model - base
        probability = keep_probabilities(delta, density, window)
        mask = torch.rand(out.shape, generator=generator, dtype=torch.float32).to(out.device) < probability
        kept.append(delta.div_(probability).mul_(mask))
    _finish(models, alpha, out, base, strength, _elect(kept))


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but the round(density x values), at least one, largest by size; works in place."""
    count = delta.numel()
    keep = min(count, max(1, round(density * count)))
    if keep < count:
        sizes = delta.abs()
        smallest = sizes.flatten().kthvalue(count - keep + 1).values
        delta.mul_(sizes >= smallest)
    return delta


def keep_probabilities(delta: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """DELLA's probability of each value to be kept, by the rank of its size (equal ones in order of place)."""
    import torch

    sizes = delta.abs().flatten()
    order = torch.argsort(sizes, stable=True)
    steps = torch.linspace(density - window / 2, density + window / 2, len(sizes), dtype=delta.dtype)
    if len(sizes) == 1:
        steps = steps.new_full((1,), density)
    probability = torch.empty_like(sizes)
    probability[order] = steps.to(delta.device)
    return probability.reshape(delta.shape)


def _elect(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total.add_(delta)
    sign = total.sign()
    total.zero_()
    count = torch.zeros_like(total)
    for delta in deltas:
        agrees = (delta * sign) > 0
        total.add_(delta.mul_(agrees))
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def _finish(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    base: torch.Tensor,
    strength: float,
    combined: torch.Tensor,
) -> None:
    import torch

    combined.mul_(strength).add_(base)
    torch.lerp(models[0], combined, alpha, out=out)
