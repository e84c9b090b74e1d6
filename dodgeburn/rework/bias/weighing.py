"""How much training pictures count by the value that they show, so that what is drawn has the target's shares.

    importance   q(a) / p(a), p the shares of the pictures that there are
    followed     what is read while training moves the weights: each check multiplies them by (q(a) / p_read(a))^power

    held         the same for all other attributes, whose target is how the untouched model draws them

The second is needed because balanced pictures do not end as balanced drawings: guidance mixes what a prompt says with
what no prompt says, and short training goes only a part of the way. The third, because real pictures bring shares of
their own in everything else, and a drift that guidance overstates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

MOST_WEIGHT = 10.0  # importance weights above are cut: one picture is not to rule a batch
HELD_WITHIN = 3.0
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


def held(
    weights: Tensor, values: Sequence[str], shown: Mapping[str, Sequence[str]],
    before: Mapping[str, Mapping[str, float]], read: Sequence[Mapping[str, Mapping[str, float]]], power: float,
    highest: float = MOST_WEIGHT,
) -> Tensor:  # fmt: skip
    """The pictures' weights [n] after checks that read these shares of other attributes.

    values: of each picture the concept's value, "" for pictures of other things, which keep their weights. shown: by
    attribute the value of each picture. before, read: shares by attribute and value, none 0, of the untouched model
    and of each check; attributes that `read` lacks are left alone. Values of the concept keep their sums, so that one
    target does not undo another; before that no weight changes more than `HELD_WITHIN`-fold, all attributes together,
    so that a few pictures are not learned by heart.
    """
    out = weights
    for name, shares in before.items():
        of_name = [r[name] for r in read if name in r]
        own = [v if c else "" for v, c in zip(shown[name], values, strict=True)]
        out = followed(out, own, list(shares), list(shares.values()), of_name, power, highest)
    there = weights > 0
    factor = torch.where(there, out / torch.where(there, weights, 1), 1).clamp(1 / HELD_WITHIN, HELD_WITHIN)
    out = weights * factor
    for value in set(values) - {""}:
        at = torch.tensor([v == value for v in values])
        if (total := out[at].sum()) > 0:
            out = torch.where(at, out * (weights[at].sum() / total), out)
    return out
