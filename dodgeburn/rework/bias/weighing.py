"""How much training pictures count by the value that they show, so that what is drawn has the target's shares.

    importance   q(a) / p(a), p the shares of the pictures that there are
    followed     what is read while training moves the weights: each check multiplies them by (q(a) / p_read(a))^power

The second is needed because balanced pictures do not end as balanced drawings: guidance mixes what a prompt says with
what no prompt says, and short training goes only a part of the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

MOST_WEIGHT = 10.0  # importance weights above are cut: one picture is not to rule a batch
LEAST_SHARE = 0.005  # a share that is read below counts as this


def importance(
    values: Sequence[str], classes: Sequence[str], target: Sequence[float], highest: float = MOST_WEIGHT
) -> np.ndarray:
    """Weight of each picture by its value: q(a) / p(a), at most `highest`, float32 [n]; a value that is none of the
    classes counts 0."""
    q = dict(zip(classes, target, strict=True))
    known = [v for v in values if v in q]
    p = {v: known.count(v) / max(1, len(known)) for v in q}
    return np.array([min(highest, q[v] / p[v]) if v in q else 0.0 for v in values], np.float32)


def followed(
    weights: Tensor, values: Sequence[str], classes: Sequence[str], target: Sequence[float],
    read: Sequence[Mapping[str, float]], power: float, highest: float = MOST_WEIGHT,
) -> Tensor:  # fmt: skip
    """The pictures' weights [n] after checks that read these shares: times the product of (q(a) / p_read(a))^power by
    their value a.

    The product stays within 1 / highest..highest. Pictures of other things (value "") keep their weights, and the
    concept's keep their sum.
    """
    if not read or not power:
        return weights
    q = dict(zip(classes, target, strict=True))
    factor = dict.fromkeys(q, 1.0)
    for shares in read:
        for a in q:
            share = max(round(shares.get(a, 0.0), 4), LEAST_SHARE)  # rounded as logs have it
            factor[a] *= (q[a] / share) ** power if q[a] > 0 else 1.0
    by_row = torch.tensor([min(max(factor[v], 1 / highest), highest) if v in q else 1.0 for v in values])
    inside = torch.tensor([v in q for v in values])
    out = weights * by_row
    total = out[inside].sum()
    return torch.where(inside, out * (weights[inside].sum() / total), weights) if total > 0 else weights
