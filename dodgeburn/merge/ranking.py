"""From pictures to a ranked table: fidelity, resemblance to both parents, intervals, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dodgeburn.measure.distances import pixel_distance
from dodgeburn.measure.intervals import Interval, bootstrap_mean
from dodgeburn.measure.pareto import pareto_front
from dodgeburn.merge.gauges import Gauge


@dataclass
class Measured:
    """Figures of one variant's pictures, each float64 [prompts, seeds]; None where there is no reader.

    What they are is for `gauges` to say; pixel resemblance is 1 - RMS difference (measure/distances.py).
    """

    fidelity: np.ndarray | None
    resemblance_a: np.ndarray | None
    resemblance_b: np.ndarray | None
    pixel_resemblance_a: np.ndarray
    pixel_resemblance_b: np.ndarray
    unreadable: np.ndarray | None
    fidelity_judge: np.ndarray | None = None  # as `fidelity`, read by a second reader that decides nothing


@dataclass
class Row:
    """One line of the table: a variant, or a parent ("A", "B": no method, no preset, no base, no rank)."""

    name: str
    preset: str | None
    base: float | None
    measured: Measured
    method: str | None = None  # with its numbers, as variants.MethodChoice writes it
    shares: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    pareto: bool = False
    same_as: str | None = None  # an earlier variant (or parent) with the very same tensors
    versus_a: Interval | None = None  # fidelity minus A's, prompt by prompt and seed by seed
    versus_b: Interval | None = None

    def interval(self, key: str) -> Interval | None:
        """Mean and 95 % interval over prompts and seeds of one of `Measured`'s figures; None where there is
        none.
        """
        values = getattr(self.measured, key)
        if values is None or np.isnan(values).all():
            return None
        return bootstrap_mean(values, shares=key.startswith("fidelity"))

    def mean(self, key: str) -> float | None:
        """The mean alone."""
        values = getattr(self.measured, key)
        return None if values is None or np.isnan(values).all() else float(np.nanmean(values))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every figure with its `_ci` ([low, high], or None)."""
        out: dict[str, Any] = {"rank": self.rank, "name": self.name, "preset": self.preset, "base": self.base}
        for key in (*FIGURES, "fidelity_judge"):
            found = self.interval(key)
            out[key] = _rounded(found.mean) if found else None
            out[f"{key}_ci"] = [_rounded(end) for end in found.ends] if found and found.ends else None
        for key, difference in (("fidelity_vs_a", self.versus_a), ("fidelity_vs_b", self.versus_b)):
            out[key] = _rounded(difference.mean) if difference else None
            ends = difference.ends if difference else None
            out[f"{key}_ci"] = [_rounded(end) for end in ends] if ends else None
        unreadable = self.measured.unreadable
        out["unreadable"] = None if unreadable is None else _rounded(float(unreadable.mean()))
        out["method"] = self.method
        out["pareto"] = self.pareto
        out["same_as"] = self.same_as
        return out


FIGURES = ("fidelity", "resemblance_a", "resemblance_b", "pixel_resemblance_a", "pixel_resemblance_b")


def _rounded(value: float) -> float:
    return round(float(value), 5)


def measure(
    pictures: np.ndarray, prompts: Sequence[str], a: np.ndarray, b: np.ndarray, gauge: Gauge | None = None,
    seen: Sequence[Any] = (), judge: Gauge | None = None, judged: Any = None,
) -> Measured:  # fmt: skip
    """Figures of `pictures` (uint8 [prompts, seeds, h, w, 3]) against the parents' pictures a and b.

    seen: what the gauge sees in the pictures, in A's and in B's, in order, prompt by prompt; judged: what the judge,
    who decides nothing, sees in the pictures.
    """
    shape = pictures.shape[:2]

    def flat(grid: np.ndarray) -> np.ndarray:
        return grid.reshape(-1, *grid.shape[2:])

    pixel_a, pixel_b = (1 - pixel_distance(flat(pictures), flat(p)).reshape(shape) for p in (a, b))
    if gauge is None:
        return Measured(None, None, None, pixel_a, pixel_b, None)
    own, of_a, of_b = seen
    asked = [prompt for prompt in prompts for _ in range(shape[1])]
    followed = gauge.fidelity(asked, own).reshape(shape)
    lost = gauge.unreadable(own)
    return Measured(
        fidelity=None if np.isnan(followed).all() else followed,
        resemblance_a=gauge.resemblance(own, of_a).reshape(shape),
        resemblance_b=gauge.resemblance(own, of_b).reshape(shape),
        pixel_resemblance_a=pixel_a,
        pixel_resemblance_b=pixel_b,
        unreadable=None if lost is None else lost.astype(np.float64).reshape(shape),
        fidelity_judge=None if judge is None else judge.fidelity(asked, judged).reshape(shape),
    )


def closeness(row: Row) -> float:
    """How close a variant is to both parents: its resemblance to the one it resembles less.

    By readings where there are any, else by pixels.
    """
    means = [row.mean("resemblance_a"), row.mean("resemblance_b")]
    if any(m is None for m in means):
        means = [row.mean("pixel_resemblance_a"), row.mean("pixel_resemblance_b")]
    return min(m for m in means if m is not None)


def rank(rows: Sequence[Row], parents: Sequence[Row]) -> tuple[list[Row], dict[str, Any] | None]:
    """The rows, best first, with `rank`, `pareto` and the differences to the parents filled in (the
    parents' too).

    By fidelity, ties by `closeness`; without a fidelity by closeness alone. On the Pareto front (fidelity,
    resemblance to A, resemblance to B) are the variants that no other beats in all three. Also returns
    `held_out` (or None).
    """
    for row in [*rows, *parents]:
        if row.measured.fidelity is not None:
            differences = [
                bootstrap_mean(row.measured.fidelity - p.measured.fidelity)
                if p.measured.fidelity is not None and p is not row else None
                for p in parents
            ]  # fmt: skip
            row.versus_a, row.versus_b = differences
    # Differences below the last digit shown are no differences: rounding decides no rank.
    ordered = sorted(rows, key=lambda r: (-round(r.mean("fidelity") or 0.0, 9), -round(closeness(r), 9)))
    keys = FIGURES[:3] if any(r.measured.fidelity is not None for r in rows) else FIGURES[1:3]
    if any(r.measured.resemblance_a is None for r in rows):
        keys = FIGURES[3:]
    points = [[_or_nan(row.mean(key)) for key in keys] for row in ordered]
    front = pareto_front(np.array(points).reshape(len(ordered), len(keys)))
    for i, row in enumerate(ordered):
        row.rank, row.pareto = i + 1, bool(front[i])
    return ordered, held_out(rows, parents)  # in the order given: ties must not be broken by the whole table


def held_out(rows: Sequence[Row], parents: Sequence[Row]) -> dict[str, Any] | None:
    """What choosing the best is worth on a prompt that had no say in the choice.

    The best of many on some pictures looks better on those pictures than it is. So each prompt in turn is
    left out, the variant with the best fidelity on the others is chosen, and its fidelity on the one left
    out is taken: the judge's, where a judge read the pictures too. Returns the mean
    of that, with its interval and its difference to each parent; None with fewer than two usable prompts.
    """
    if not rows or any(row.measured.fidelity is None for row in [*rows, *parents]):
        return None
    grids = np.stack([row.measured.fidelity for row in rows if row.measured.fidelity is not None])  # [rows, P, S]
    usable = np.flatnonzero(~np.isnan(grids[0]).any(axis=1))
    if len(usable) < 2:
        return None
    by_prompt = grids[:, usable].mean(axis=2)  # [rows, prompts]
    chosen = [int(np.argmax(np.delete(by_prompt, i, axis=1).mean(axis=1).round(9))) for i in range(len(usable))]
    scores = [row.measured.fidelity_judge for row in rows]
    final = grids if any(s is None for s in scores) else np.stack([s for s in scores if s is not None])
    kept = np.stack([final[row, prompt] for row, prompt in zip(chosen, usable, strict=True)])  # [prompts, S]
    found = bootstrap_mean(kept, shares=True)
    out: dict[str, Any] = {
        "fidelity": _rounded(found.mean),
        "fidelity_ci": found.ends and [_rounded(end) for end in found.ends],
        "chosen": sorted({rows[i].name for i in chosen}),
    }
    for key, parent in zip(("vs_a", "vs_b"), parents, strict=True):
        theirs = parent.measured.fidelity if final is grids else parent.measured.fidelity_judge
        assert theirs is not None
        difference = bootstrap_mean(kept - theirs[usable])
        out[key] = _rounded(difference.mean)
        out[f"{key}_ci"] = difference.ends and [_rounded(end) for end in difference.ends]
    return out


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
