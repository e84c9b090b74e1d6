"""Which values come from which model: rows, ranks, frequencies, and the bounds of A and B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dodgeburn.merge.methods.pieces import PIECE, kth_smallest

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
    a, b, result = (t.reshape(1) if t.ndim == 0 else t for t in (*models, out))
    start, end, outside = region(alpha, beta, a.shape[0])
    result.copy_(b if outside else a)
    result[start:end] = (a if outside else b)[start:end]


def top_k_sum(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, beta: float) -> None:
    """A's values in the order of B's, for the share alpha of them by size from the share beta on (meh's "top-k
    tensor sum"): the value of rank r goes where B has its value of rank r, if its size is in the region.

    Alpha 1 and beta 0: A's distribution with B's ranks, not B.
    """
    import torch

    a, b, result = (t.reshape(-1) for t in (*models, out))
    count = a.numel()
    start, end, outside = region(alpha, beta, count)
    order = torch.argsort(b, stable=True)  # of places, by B's values; B itself is not needed again

    def size_of(k: int) -> float:
        return kth_smallest(torch.abs(a, out=result), min(k, count)) if k > 0 else -1.0

    least, most = size_of(start), size_of(end)
    values = b.copy_(a)
    if values.device.type == "cpu":
        values.numpy().sort()
    else:
        values = values.sort().values
    for at in range(0, count, PIECE):
        places, wanted = order[at : at + PIECE], values[at : at + PIECE]
        inside = (wanted.abs() > least) & (wanted.abs() <= most)
        result[places] = torch.where(~inside if outside else inside, wanted, a[places])


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
    start, order = base.reshape(-1), torch.argsort(base.reshape(-1), stable=True)
    change = b.sub_(a).reshape(-1)
    frequencies = torch.fft.rfft(torch.index_select(change, 0, order, out=start))
    centre = (1 - alpha) * (1 + tilt) - tilt / 2
    for at in range(0, len(frequencies), PIECE):
        part = frequencies[at : at + PIECE]
        u = torch.arange(at, at + len(part), dtype=a.dtype, device=a.device) / max(1, len(frequencies) - 1)
        part.mul_(((u - centre) / tilt + 0.5).clamp_(0, 1) if tilt > 0 else (u >= centre).to(a.dtype))
    change[order] = torch.fft.irfft(frequencies, n=a.numel())
    torch.add(a, change.reshape(a.shape), out=out)


def clip_between(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Bring each value of `out` between A's and B's (meh's weight clipping), in place."""
    import torch

    torch.clamp(out, torch.minimum(a, b), torch.maximum(a, b), out=out)
