"""The best approximation of a matrix by a product of two thin ones (Eckart-Young), by rank or by kept energy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Factors(NamedTuple):
    """`up` [m, r] @ `down` [r, n] in float32, of equal norms; `kept`: the share of the squared norm that r components
    hold, before any rounding.
    """

    up: torch.Tensor
    down: torch.Tensor
    kept: float


def low_rank(matrix: torch.Tensor, rank: int | None = None, energy: float | None = None) -> Factors:
    """The truncated singular value decomposition of a matrix [m, n], as two factors.

    `rank`: components at most; `energy`: as few as hold that share (0..1) of the squared norm; neither: all. Worked out
    in float64 from the eigenvectors U of the smaller Gram matrix: up = U, down = Uᵀ M, so that at full rank the product
    is M to float32's precision and no small singular value is ever divided by. Components below 1e-15 of the largest
    energy are rounding and left out. A zero matrix gives one component of zeros.
    """
    import torch

    wide = matrix.double()
    turned = wide.shape[0] > wide.shape[1]
    if turned:
        wide = wide.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
    total = float(values.sum())
    if total == 0.0:
        zeros = torch.zeros(matrix.shape[0], 1), torch.zeros(1, matrix.shape[1])
        return Factors(*zeros, 1.0)
    count = max(1, int((values > values[0] * 1e-15).sum()))
    if rank is not None:
        count = min(count, rank)
    if energy is not None:
        running = torch.cumsum(values, 0) / total
        count = min(count, int((running < energy - 1e-12).sum()) + 1)
    basis = vectors[:, :count]
    balance = values[:count].pow(0.25)
    up, down = basis * balance, (basis.T @ wide) / balance[:, None]
    kept = min(1.0, float(values[:count].sum()) / total)
    if turned:
        up, down = down.T, up.T
    return Factors(up.float().contiguous(), down.float().contiguous(), kept)
