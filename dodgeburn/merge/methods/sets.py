"""Which values come from which model: rows, ranks, frequencies, and the bounds of A and B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def region(alpha: float, beta: float, count: int) -> tuple[int, int, bool]:
    """First and last + 1 of `count` places of the share alpha from offset beta on, and whether what lies
    outside them is meant (the share wraps around the end). Truncated as supermerger's and meh's tensor sums do; meh's
    top-k sum (@003017e8) rounds, so that its share may be one value wider than ours.
    """
    if alpha + beta <= 1:
        return int(count * beta), int(count * (alpha + beta)), False
    return int(count * (alpha + beta - 1)), int(count * beta), True


def tensor_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, beta: float) -> None:
    """A share alpha of A's rows (axis 0), from the share beta on, is B's (supermerger's "tensor").

    Rows floor(n beta) to floor(n (alpha + beta)), going on at the first row after the last. A tensor without
    axes counts as one row.
    """
    import torch

    a, b = models
    rows = a.shape[0] if a.ndim else 1
    start, end, outside = region(alpha, beta, rows)
    inside = torch.zeros(rows, dtype=torch.bool, device=a.device)
    inside[start:end] = True
    from_b = ~inside if outside else inside
    torch.where(from_b.reshape(-1, *[1] * (a.ndim - 1)) if a.ndim else from_b[0], b, a, out=out)


def top_k_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, beta: float) -> None:
    """A's values in the order of B's, for the share alpha of them by size from the share beta on (meh's "top-k
    tensor sum"): the value of rank r goes where B has its value of rank r, if its size is in the region.

    Alpha 1 and beta 0: A's distribution with B's ranks, not B.
    """
    import torch

    a, b = models
    count = a.numel()
    start, end, outside = region(alpha, beta, count)
    flat = a.flatten()
    values = flat.sort(stable=True).values
    ranks = torch.argsort(torch.argsort(b.flatten(), stable=True))
    sizes = values.abs()

    def size_of(k: int) -> torch.Tensor | float:
        return sizes.kthvalue(min(k, count)).values if k > 0 else -1.0

    inside = (sizes > size_of(start)) & (sizes <= size_of(end))
    chosen = ~inside if outside else inside
    out.copy_(torch.where(chosen[ranks], values[ranks], flat).reshape(out.shape))


def distribution_crossover(
    models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, base: torch.Tensor, tilt: float
) -> None:
    """High frequencies from B, low ones from A, of the values in the order of the base's sizes (after meh's
    "distribution crossover"): A + unsort(irfft(w rfft(sort(B - A)))).

    w(u) rises from 0 to 1 over a width `tilt` of the frequencies u in 0..1, a step for 0, around
    (1 - alpha)(1 + tilt) - tilt/2: alpha 0 is A and alpha 1 is B for every tilt.
    """
    import torch

    a, b = models
    if alpha in (0.0, 1.0):
        out.copy_(b if alpha else a)
        return
    order = torch.argsort(base.flatten(), stable=True)
    frequencies = torch.fft.rfft((b - a).flatten()[order])
    u = torch.linspace(0, 1, len(frequencies), dtype=a.dtype, device=a.device)
    centre = (1 - alpha) * (1 + tilt) - tilt / 2
    weight = ((u - centre) / tilt + 0.5).clamp_(0, 1) if tilt > 0 else (u >= centre).to(a.dtype)
    change = torch.empty(a.numel(), dtype=a.dtype, device=a.device)
    change[order] = torch.fft.irfft(frequencies * weight, n=a.numel())
    torch.add(a, change.reshape(a.shape), out=out)


def clip_between(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Bring each value of `out` between A's and B's (meh's weight clipping), in place."""
    import torch

    torch.clamp(out, torch.minimum(a, b), torch.maximum(a, b), out=out)
