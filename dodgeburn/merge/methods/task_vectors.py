"""Task vectors (model minus base) thinned out and combined: TIES, DARE, DELLA.

All end as (1 - alpha) A + alpha M, where M = base + strength x (the combined task vectors of all models).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError
from dodgeburn.merge.methods.draws import Draws
from dodgeburn.merge.methods.pieces import BASE, PIECE, Pieces, kth_of_pieces, kth_smallest, spare

if TYPE_CHECKING:
    import torch

_SIGN, _COUNT = 100, 101  # numbers of spare memory, after those of the models


def trim_limits(pieces: Pieces, *, density: float) -> list[float]:
    """For each model the size that a value of its task vector must exceed to be kept: all but the round(density x
    values), at least one, largest are trimmed. Values equal to the smallest kept one are kept too.
    """
    import torch

    keep = min(pieces.count, max(1, round(density * pieces.count)))
    if keep == pieces.count:
        return [-1.0] * pieces.models
    which = (*range(pieces.models), BASE)

    def sizes() -> Iterator[list[torch.Tensor]]:
        for *models, base in pieces(*which):
            yield [torch.sub(model, base, out=spare(model, i)).abs_() for i, model in enumerate(models)]

    *models, base = pieces.sample(*which)
    samples = [(model - base).abs_() for model in models]
    rank = pieces.count - keep + 1
    if len(base) == pieces.count:  # all of it
        found = [kth_smallest(sample, rank) for sample in samples]
    else:
        found = kth_of_pieces(samples, sizes, rank, pieces.count)
    limits = []
    for smallest in found:
        exact = torch.tensor(smallest, dtype=base.dtype)
        limits.append(float(torch.nextafter(exact, torch.zeros_like(exact))) if smallest > 0 else -1.0)
    return limits


def ties(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    found: Sequence[float],
    density: float,
    strength: float,
) -> None:
    """TIES (Yadav et al. 2023, algorithm 1): trim each task vector to its `density` share of largest values,
    elect each place's sign by the sum of values (not by counting signs), mean over the values of that sign.

    `found` is what trim_limits found. A place without any value, or with sum 0, is 0.
    """
    import torch

    deltas = []
    for number, (model, limit) in enumerate(zip(models, found, strict=True)):
        delta = torch.sub(model, base, out=spare(model, number))
        deltas.append(trim(delta, limit))
    _finish(models, alpha, out, base, strength, _elect(deltas))


def trim(delta: torch.Tensor, limit: float) -> torch.Tensor:
    """Zero what is not larger than the limit (see trim_limits), in place."""
    import torch

    return torch.hardshrink(delta, limit, out=delta)


def dare(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    draws: Draws,
    density: float,
    strength: float,
) -> None:
    """DARE (Yu et al. 2024): keep each value of a task vector with probability `density`, divide what is kept
    by it, take the mean over the models. The expectation is the mean of the task vectors.
    """
    import torch

    total = spare(out, 0).zero_()
    for number, model in enumerate(models):
        delta = torch.sub(model, base, out=spare(out, 1))
        total.add_(delta.mul_(draws.uniform(number, out) < density))
    _finish(models, alpha, out, base, strength, total.div_(density * len(models)))


def della(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    draws: Draws,
    density: float,
    window: float,
    strength: float,
) -> None:
    """DELLA (Deep et al. 2024): keep values with a probability that grows with the rank of their size, evenly
    from density - window/2 (smallest) to density + window/2 (largest), divide each by its probability; then
    sign election and mean as TIES. Raises UserError if the probabilities leave (0, 1].
    """
    if not (density - window / 2 > 0 and density + window / 2 <= 1):
        raise UserError(
            f"density {density} and window {window} give probabilities {density - window / 2:g} to "
            f"{density + window / 2:g}: expected above 0 and at most 1; take a smaller window"
        )
    kept = []
    for number, model in enumerate(models):
        delta = model - base
        probability = keep_probabilities(delta, density, window)
        mask = draws.uniform(number, out) < probability
        kept.append(delta.div_(probability).mul_(mask))
        del probability, mask
    _finish(models, alpha, out, base, strength, _elect(kept))


def keep_probabilities(delta: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """DELLA's probability of each value to be kept, by the rank of its size (equal ones in order of place)."""
    import torch

    count = delta.numel()
    order = torch.argsort(delta.abs().flatten(), stable=True)
    probability = torch.full((count,), density, dtype=delta.dtype, device=delta.device)
    for start in range(0, count if count > 1 else 0, PIECE):
        ranks = torch.arange(start, min(count, start + PIECE), dtype=delta.dtype, device=delta.device)
        probability[order[start : start + PIECE]] = ranks.div_(count - 1).sub_(0.5).mul_(window).add_(density)
    return probability.reshape(delta.shape)


def _elect(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the values that have the sign of their sum; `deltas` are used up."""
    import torch

    first, *rest = deltas
    sign = torch.add(first, rest[0], out=spare(first, _SIGN))
    for delta in rest[1:]:
        sign.add_(delta)
    sign.sign_()
    total = first.mul_(sign).relu_()  # sizes of what agrees
    count = torch.sign(total, out=spare(first, _COUNT))
    for delta in rest:
        total.add_(delta.mul_(sign).relu_())
        count.add_(delta.sign_())
    return total.div_(count.clamp_(min=1)).mul_(sign)


def _finish(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    base: torch.Tensor,
    strength: float,
    combined: torch.Tensor,
) -> None:
    import torch

    if not math.isclose(strength, 1.0, rel_tol=0):
        combined.mul_(strength)
    torch.add(combined, base, out=combined)
    torch.lerp(models[0], combined, alpha, out=out)
