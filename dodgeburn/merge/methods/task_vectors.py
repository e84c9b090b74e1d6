"""Task vectors (model minus base) thinned out and combined: TIES, DARE, DELLA.

All end as (1 - alpha) A + alpha M, where M = base + strength x (the combined task vectors of all models).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dodgeburn.errors import UserError
from dodgeburn.merge.methods.draws import Draws
from dodgeburn.merge.methods.order import in_order
from dodgeburn.merge.methods.pieces import BASE, PIECE, Pieces, kth_of_pieces, kth_smallest, spare, whole

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
    if base.numel() == pieces.count:  # all of it
        found = [kth_smallest(sample.flatten(), rank) for sample in samples]
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


def della_mean(pieces: Pieces, *, draws: Draws, density: float, window: float) -> torch.Tensor:
    """What della adds to the base: the elected mean of the thinned task vectors, flat, for every place.

    The models are gone through twice, for the signs and then for the means, so that one ranking is in memory at a
    time, of however many models. Raises UserError if the probabilities leave (0, 1].
    """
    import torch

    if not (density - window / 2 > 0 and density + window / 2 <= 1):
        raise UserError(
            f"density {density} and window {window} give probabilities {density - window / 2:g} to "
            f"{density + window / 2:g}: expected above 0 and at most 1; take a smaller window"
        )

    def kept(number: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """A model's thinned task vector by pieces, and where they belong."""
        sizes = whole(pieces, number, BASE, of=lambda model, base: torch.sub(model, base, out=spare(base, 0)).abs_())
        probability = rank_probabilities(sizes, density, window)
        for at, (model, base) in _placed(pieces, number):
            delta = torch.sub(model, base, out=spare(base, 0))
            mask = draws.at(at.start).uniform(number, delta) < probability[at].to(delta.device)
            yield at, delta.div_(probability[at].to(delta.device)).mul_(mask)

    total = None
    for number in range(pieces.models):
        for at, delta in kept(number):
            if total is None:
                total = torch.zeros(pieces.count, dtype=delta.dtype, device=delta.device)
            total[at] += delta
    if total is None:
        return torch.empty(0)
    sign = total.sign().to(torch.int8)
    count = torch.zeros_like(sign)
    total.zero_()
    for number in range(pieces.models):
        for at, delta in kept(number):
            total[at] += delta.mul_(sign[at]).relu_()
            count[at] += delta.sign_().to(torch.int8)
    for start in range(0, pieces.count, PIECE):
        at = slice(start, start + PIECE)
        total[at] = total[at].div_(count[at].clamp_(min=1)).mul_(sign[at])
    return total


def _placed(pieces: Pieces, number: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Pieces of a model and of the base, with their places."""
    start = 0
    for parts in pieces(number, BASE):
        yield slice(start, start := start + parts[0].numel()), parts


def della(
    models: Sequence[torch.Tensor],
    alpha: float,
    out: torch.Tensor,
    *,
    base: torch.Tensor,
    found: torch.Tensor,
    density: float,
    window: float,
    strength: float,
) -> None:
    """DELLA (Deep et al. 2024): keep values with a probability that grows with the rank of their size, evenly
    from density - window/2 (smallest) to density + window/2 (largest), divide each by its probability; then
    sign election and mean as TIES. `found` is what della_mean found.
    """
    _finish(models, alpha, out, base, strength, spare(out, 0).copy_(found))


def rank_probabilities(sizes: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """DELLA's probability of each value to be kept, by the rank of its size (equal ones in order of place).

    `sizes` are flat, at least 0, on the CPU, and are overwritten by the result.
    """
    import torch

    count = sizes.numel()
    if count < 2:
        return sizes.fill_(density)
    for rank, places in in_order(sizes.numpy()):
        ranks = torch.arange(rank, rank + len(places), dtype=sizes.dtype)
        # Negative: below all sizes that are still to be ranked.
        sizes[torch.from_numpy(places)] = ranks.div_(count - 1).sub_(0.5).mul_(window).add_(density).neg_()
    return sizes.neg_()


def keep_probabilities(delta: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """DELLA's probability of each value of a task vector to be kept, of its shape."""
    return rank_probabilities(delta.abs().flatten().cpu(), density, window).to(delta.device).reshape(delta.shape)


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
    if alpha == 1.0:  # what lerp gives then
        torch.add(combined, base, out=out)
        return
    torch.add(combined, base, out=combined)
    torch.lerp(models[0], combined, alpha, out=out)
