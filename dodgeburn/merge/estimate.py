"""What share of each parent a merged model has, block by block: least squares on the tensors themselves.

For a merged model C and parents A, B, D, ... the model is C - A = sum_i alpha_i (P_i - A) + noise, with one alpha for
each parent but A and each part of the model; A's share is the rest, 1 - sum_i alpha_i. The fit is ordinary least
squares over all values of the part, so a weighted sum gives its alphas back up to rounding, and A + alpha (B - O) gives
alpha for B and -alpha for O.

The error of a share has two parts, added as squares. The standard error is White's (1980, "HC0"), because rounding
noise grows with the values it is made on. But rounding is no mere noise: where parents lie on one grid of float16
values, a small share of a small difference is rounded away. So the fitted merge is rounded to C's type on a sample of
the values, and the shift that this makes in the shares is the second part.

Everything is read once, side by side, in memory that does not depend on the models' size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dodgeburn.checkpoint.header import FLOAT_DTYPES, torch_dtype
from dodgeburn.checkpoint.layout import VAE, Layout
from dodgeburn.checkpoint.side_by_side import SideBySide
from dodgeburn.checkpoint.sources import Tensors
from dodgeburn.errors import UserError
from dodgeburn.merge.diff import common_layout, shown_name
from dodgeburn.merge.rules import COMPONENTS
from dodgeburn.models.as_single_file import open_as_single_file

if TYPE_CHECKING:
    import torch

Matrix = np.ndarray[Any, np.dtype[np.float64]]
SAMPLE = 1024  # values of a tensor that standard errors are worked out from
MAX_PARENTS = 8
# Keys that tools put into different blocks are parts of their own, so that an estimate shows which rule it was.
OUTSIDE = {"time_embed": "time_embed.", "label_emb": "label_emb.", "out": "out."}
TEXT_OTHER = "text_other"  # of the text encoders, what is called neither weight nor bias
_TITLES = {theirs: ours for ours, theirs in COMPONENTS.items()}
_DEPENDENT = 1e-10  # smallest eigenvalue of the differences' correlations below which they count as dependent


@dataclass
class Part:
    """One part's fit. `shares` and `errors` (one standard error, see above) are those of the parents after A, in their
    order, None where nothing can be said; `why` says why, if so.

    `weight` is the squared norm of the first difference, B - A. `residual` is |C - fit| over the largest norm of a
    parent's difference from A, and `explained` the share of |C - A|² that the fit explains; None where they have none.
    """

    name: str
    tensors: int = 0
    values: int = 0
    shares: list[float | None] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    weight: float = 0.0
    residual: float | None = None
    explained: float | None = None
    why: str = ""

    @property
    def share(self) -> float | None:
        """B's."""
        return self.shares[0]

    @property
    def error(self) -> float | None:
        """B's standard error."""
        return self.errors[0]

    def row(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tensors": self.tensors, "values": self.values, "shares": self.shares, "errors": self.errors,
            "residual": self.residual, "explained": self.explained, "why": self.why,
        }  # fmt: skip


@dataclass
class Estimate:
    """The shares of a model by part (blocks, keys outside them, text encoders, VAE) and by component.

    `names` are C's, A's, B's and further parents'. `simplex`: whether shares were held at 0 or above with a sum of 1.
    `left` has the tensors that could not be used, by reason.
    """

    names: list[str]
    layout: Layout
    simplex: bool
    parts: dict[str, Part] = field(default_factory=dict)
    components: dict[str, Part] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        merged, a, *parents = self.names
        return {
            "merged": merged,
            "a": a,
            "parents": parents,
            "layout": self.layout.name,
            "fit": "least squares, shares at least 0 and of sum 1" if self.simplex else "least squares, unconstrained",
            "parts": {name: part.row() for name, part in self.parts.items()},
            "components": {name: part.row() for name, part in self.components.items()},
            "left_out": self.left,
            "seconds": round(self.seconds, 3),
        }


def estimate(
    merged: str | Path, a: str | Path, b: str | Path, more: Sequence[str | Path] = (), simplex: bool = False
) -> Estimate:
    """Estimate the shares of parents A, B and `more` in the model `merged`, by part and by component.

    Models are those that `merge` reads. `simplex` holds all shares, A's too, at 0 or above; by default they are free,
    which also fits added differences. Raises UserError for adapters, models of several architectures, more than
    MAX_PARENTS parents, and models without a common tensor.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    names = [merged, a, b, *more]
    if len(names) - 1 > MAX_PARENTS:
        raise UserError(f"{len(names) - 1} parents: at most {MAX_PARENTS} can be told apart at once")
    sources: list[Tensors] = []
    try:
        for name in names:
            sources.append(open_as_single_file(name))
        shown = [shown_name(name, source) for name, source in zip(names, sources, strict=True)]
        layout = common_layout(sources, shown)
        if layout is None:
            raise UserError(f"{shown[0]} is no SD1.5 or SDXL checkpoint: shares are estimated for whole checkpoints")
        found = Estimate(shown, layout, simplex)
        usable = _usable(sources, found)
        sums: dict[tuple[str, str], _Sums] = {}
        beside = SideBySide(sources)
        total = sum(source.info(name).nbytes for name in usable for source in sources)
        with tqdm(total=total, unit="B", unit_scale=True, desc="estimate", disable=None) as bar:
            for name in usable:
                place = part_of(name, layout), _TITLES.get(layout.component(name), "")
                new = _sums_of(name, beside)
                if new is None:
                    found.left.setdefault("with NaN or infinite values", []).append(name)
                else:
                    sums.setdefault(place, _Sums(len(names) - 2)).add(new)
                bar.update(sum(source.info(name).nbytes for source in sources))
        for source in sources:
            source.check_unchanged()
    finally:
        for source in sources:
            source.close()
    for part in part_names(layout):
        _solve([s for (name, _), s in sums.items() if name == part], part, found.parts, simplex)
    for component in COMPONENTS:
        _solve([s for (_, name), s in sums.items() if name == component], component, found.components, simplex)
    found.seconds = time.perf_counter() - started
    return found


def part_of(key: str, layout: Layout) -> str:
    """The part that a tensor's share is estimated with: its block, or what it is where tools disagree on the block."""
    if layout.is_unet(key):
        rest = key[len(layout.unet_prefix) :]
        for name, prefix in OUTSIDE.items():
            if rest.startswith(prefix):
                return name
    elif layout.is_text(key):
        return _TITLES[layout.component(key)] if "weight" in key or "bias" in key else TEXT_OTHER
    return layout.block(key) or ""


def part_names(layout: Layout) -> list[str]:
    """All parts in order."""
    return [*layout.blocks, *OUTSIDE, "clip_l", "clip_g", TEXT_OTHER, VAE]


def _usable(sources: Sequence[Tensors], found: Estimate) -> list[str]:
    usable = []
    merged, *parents = sources
    for name, info in merged.header.tensors.items():
        reason = ""
        if found.layout.block(name) is None:
            reason = "outside the model"
        elif any(name not in parent.header.tensors for parent in parents):
            reason = "not in every parent"
        elif any(parent.info(name).shape != info.shape for parent in parents):
            reason = "of another shape in a parent"
        elif any(source.info(name).dtype not in FLOAT_DTYPES for source in sources):
            reason = "of integers or packed types"
        if reason:
            found.left.setdefault(reason, []).append(name)
        else:
            usable.append(name)
    only = [
        name for name in parents[0].header.tensors if found.layout.block(name) and name not in merged.header.tensors
    ]
    if only:
        found.left["only in A"] = only
    if not usable:
        raise UserError(f"{found.names[0]} has no tensor in common with all parents: nothing to estimate")
    return usable


@dataclass(frozen=True)
class _Sample:
    """Some values of a tensor: [C - A, P1 - A, P2 - A, ..., A], how many each stands for, and the type of C."""

    values: torch.Tensor
    weight: float
    dtype: torch.dtype


class _Sums:
    """Products of the differences from A, [C, P1, P2, ...] times itself, over some values; and a sample of these."""

    def __init__(self, parents: int) -> None:
        self.gram: Matrix = np.zeros((parents + 1, parents + 1))
        self.tensors = 0
        self.values = 0
        self.sample: list[_Sample] = []

    def add(self, other: _Sums) -> None:
        self.gram += other.gram
        self.tensors += other.tensors
        self.values += other.values
        self.sample += other.sample


def _sums_of(name: str, beside: SideBySide) -> _Sums | None:
    """One tensor's sums; None if a value is not finite."""
    import torch

    total = beside.sources[0].info(name).numel
    out = _Sums(len(beside.sources) - 2)
    out.tensors = 1
    stride = max(1, total // SAMPLE)
    # Taken whole beforehand: small pieces kept between large ones that come and go would hold the memory of all.
    sampled = torch.empty(len(beside.sources), -(-total // stride))
    start = filled = 0
    for merged, a, *parents in beside.tiles(name):
        differences = torch.stack([merged, *parents]).sub_(a)
        gram = differences @ differences.T
        # Infinite values, if their squares sum to one; finite weights are far from that.
        if not bool(gram.isfinite().all()):
            return None
        out.gram += gram.numpy()
        chosen = slice(-start % stride, None, stride)
        size = a[chosen].numel()
        sampled[:-1, filled : filled + size] = differences[:, chosen]
        sampled[-1, filled : filled + size] = a[chosen]
        start, filled = start + a.numel(), filled + size
    out.values = total
    if total:
        out.sample.append(_Sample(sampled, total / filled, torch_dtype(beside.sources[0].info(name).dtype)))
    return out


def _solve(sums: Iterable[_Sums], name: str, found: dict[str, Part], simplex: bool) -> None:
    """The part's fit from its sums; a part without tensors is left out."""
    of_part = list(sums)
    if not of_part:
        return
    parents = len(of_part[0].gram) - 1
    whole = _Sums(parents)
    for one in of_part:
        whole.add(one)
    change, with_c, gram = float(whole.gram[0, 0]), whole.gram[0, 1:], whole.gram[1:, 1:]
    part = Part(name, whole.tensors, whole.values, [None] * parents, [None] * parents, float(gram[0, 0]))
    found[name] = part
    known = [i for i in range(parents) if gram[i, i] > 0]
    if not known:
        same = "and C is that too" if change == 0 else "but C is not the same"
        part.why = f"undetermined: all parents are equal here, {same}"
        return
    if len(known) < parents:
        part.why = "undetermined where a parent is equal to A"
    scale = np.sqrt(np.diag(gram)[known])
    correlations = gram[np.ix_(known, known)] / np.outer(scale, scale)
    if np.linalg.eigvalsh(correlations)[0] < _DEPENDENT:
        part.why = "undetermined: the parents' differences from A depend on each other"
        return
    inverse = np.linalg.inv(correlations) / np.outer(scale, scale)
    target = with_c[known]
    shares = _on_simplex(gram[np.ix_(known, known)], target) if simplex else inverse @ target
    rest = change - 2 * shares @ target + shares @ gram[np.ix_(known, known)] @ shares
    part.residual = math.sqrt(max(0.0, float(rest))) / float(scale.max())
    part.explained = 1 - max(0.0, float(rest)) / change if change else None
    variances = np.diag(inverse @ _meat(whole, known, shares) @ inverse) + _shift(whole, known, shares, inverse) ** 2
    for place, i in enumerate(known):
        part.shares[i], part.errors[i] = float(shares[place]), math.sqrt(max(0.0, float(variances[place])))


def _meat(sums: _Sums, known: Sequence[int], shares: Matrix) -> Matrix:
    """The middle of White's sandwich, d d^T e² summed over all values, from the sample."""
    out = np.zeros((len(known), len(known)))
    for one in sums.sample:
        values = one.values.double().numpy()
        differences = values[1:-1][known]
        scores = differences * (values[0] - shares @ differences)
        out += one.weight * (scores @ scores.T)
    return out


def _shift(sums: _Sums, known: Sequence[int], shares: Matrix, inverse: Matrix) -> Matrix:
    """How far rounding to C's type moves the shares of a merge like this one, from the sample.

    It jumps where a share passes a threshold of the grid, so the shares that would have been moved to these are tried
    as well; the largest movement of each counts.
    """
    largest = np.zeros(len(known))
    tried = shares
    for _ in range(3):
        moved = inverse @ _rounded(sums, known, tried)
        largest = np.maximum(largest, np.abs(moved))
        tried = shares - moved
    return largest


def _rounded(sums: _Sums, known: Sequence[int], shares: Matrix) -> Matrix:
    """d times the rounding of A + shares d to C's type, summed over all values."""
    import torch

    out = np.zeros(len(known))
    for one in sums.sample:
        values = one.values.double()
        differences, a = values[1:-1][known], values[-1]
        fitted = torch.from_numpy(shares) @ differences
        rounded = (a + fitted).float().to(one.dtype).double() - a  # as a merge does: from float32
        out += one.weight * (differences @ (rounded - fitted)).numpy()
    return out


def _on_simplex(gram: Matrix, target: Matrix) -> Matrix:
    """The shares with the least squared error among those >= 0 of sum <= 1 (A has the rest).

    Every set of shares that may be above 0, with A's above 0 or not, is solved exactly; the best feasible one is the
    minimum of the convex problem.
    """
    count = len(target)
    best: tuple[float, Matrix] = 0.0, np.zeros(count)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            inner = gram[np.ix_(chosen, chosen)]
            ones = np.ones(size)
            free = np.linalg.solve(inner, target[list(chosen)])
            # With A at 0 the shares' sum is 1: a Lagrange multiplier.
            pull = np.linalg.solve(inner, ones)
            bound = free + pull * (1 - free.sum()) / pull.sum()
            for shares in (free, bound):
                if shares.min() < 0 or shares.sum() > 1 + 1e-12:
                    continue
                error = float(shares @ inner @ shares - 2 * shares @ target[list(chosen)])
                if error < best[0]:
                    whole = np.zeros(count)
                    whole[list(chosen)] = shares
                    best = error, whole
    return best[1]
