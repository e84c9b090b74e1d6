"""An edit judged: swept over held-out prompts and seeds, read by the judge, every figure with its interval.

`measures.py` has the definitions. Whatever is an `Edit` goes through `evaluate`: sliders, baselines, controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.measure.intervals import Interval, bootstrap_mean, bootstrap_statistics
from dodgeburn.slide import measures
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.measures import DISPLACEMENTS, Leak, Natural, natural_spread
from dodgeburn.slide.readings import RMSE, ReadsPictures, SweepReadings, attribute_of, read_sweep
from dodgeburn.slide.splits import Split

UNCALIBRATED = (-2.0, 2.0)  # scales swept where a file says no safe range


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one edit."""

    name: str
    target: str
    reader: str
    split: Split
    sweep: SweepReadings
    natural: Natural
    figures: dict[str, Interval]  # by name, see `figures_of`, `per_sweep` and slide/off_class.py
    leaks: dict[str, Leak]  # row of the leakage matrix at 1 sigma
    displacements: dict[str, dict[str, Any]]  # by displacement: scales, selectivity, leakage, identity
    curve: list[tuple[float, float]]  # (scale, mean move in sigma)

    def mean(self, name: str) -> float | None:
        """A figure's value; None where it could not be measured."""
        found = self.figures.get(name)
        return None if found is None or np.isnan(found.mean) else found.mean

    def ends(self, name: str) -> list[float] | None:
        """Its 95 % interval; None without one."""
        found = self.figures.get(name)
        return None if found is None else found.ends


def even_scales(safe_range: tuple[float, float] | None, count: int = 9) -> list[float]:
    """`count` scales (odd, at least 3): 0, and half of the others evenly out to either end of the safe range."""
    if count < 3 or count % 2 == 0:
        raise UserError(f"{count} scales: expected an odd number, 3 at least, so that 0 is in the middle")
    low, high = safe_range or UNCALIBRATED
    half = count // 2
    left = [low * i / half for i in range(half, 0, -1)] if low < 0 else []
    right = [high * i / half for i in range(1, half + 1)] if high > 0 else []
    return [*left, 0.0, *right]


def per_sweep(sweep: SweepReadings, natural: Natural, target: str) -> dict[str, np.ndarray]:
    """Figures that are means over sweeps: [prompts, seeds] each, shares and numbers."""
    return {
        "monotone": measures.monotone(sweep, natural, target).astype(float),
        "monotone_drawdown": measures.monotone(sweep, natural, target, drawdown=True).astype(float),
        "spearman": measures.spearman(sweep, target),
        "range_sigma": measures.end_to_end(sweep, natural, target),
        "identity": measures.identity_kept(sweep, natural, target),
        "unreadable": sweep.unreadable.mean(2),
    }


SHARES = ("monotone", "monotone_drawdown", "identity", "unreadable")


def figures_of(sweep: SweepReadings, natural: Natural, target: str, others: Sequence[str] | None = None,
               unit: float | None = None) -> dict[str, float]:  # fmt: skip
    """Figures that are no means over sweeps, flat; NaN for what cannot be measured.

    others: the attributes that `selectivity_among` looks at (the targets of the sliders evaluated together). unit: what
    the file declares its 1.0 to move the target by, for the calibration errors; None: the sweep's own spread.
    """
    off = partial(measures.calibration_error, sweep, natural, target, sigma=unit)
    own = measures.leak(sweep, natural, target, target)
    leaks = measures.leakage(sweep, natural, target)
    out = {
        "selectivity": measures.selectivity(own, leaks.values()),
        "selectivity_picture": measures.selectivity(own, leaks.values(), strict=True),
        "linearity": measures.linearity(sweep, target),
        "calibration_error": off(),
        "calibration_error_unit": off(up_to=1.0),
        "calibration_error_picture": off(per_picture=True),
        "symmetry": measures.symmetry(sweep, target),
        "parse_loss": measures.parse_loss(sweep),
        **{f"leakage.{name}": found.absolute for name, found in leaks.items()},
    }
    if others:
        among = [measures.leak(sweep, natural, target, o) for o in others if attribute_of(o) != attribute_of(target)]
        out["selectivity_among"] = measures.selectivity(own, among) if among else float("nan")
    return out


def judge_sweep(
    sweep: SweepReadings, target: str, split: Split, reader: str = "judge", name: str = "",
    others: Sequence[str] | None = None, resamples: int = 200, unit: float | None = None,
) -> Evaluation:  # fmt: skip
    """All figures of a sweep that was read, with intervals over its prompts and seeds.

    Spreads, against which everything is measured, are those of the sweep's own unedited pictures; they stay fixed
    while prompts and seeds are resampled. unit: as in `figures_of`.
    """
    natural = natural_spread(sweep, RMSE.get(reader, {}), [target, *(others or ())])
    figures = {
        key: bootstrap_mean(values, shares=key in SHARES) for key, values in per_sweep(sweep, natural, target).items()
    }
    figures |= bootstrap_statistics(
        lambda prompts, seeds: figures_of(sweep.take(prompts, seeds), natural, target, others, unit), sweep.shape,
        resamples=resamples,
    )  # fmt: skip
    curve = measures.response(sweep, natural, target)
    return Evaluation(
        name=name, target=target, reader=reader, split=split, sweep=sweep, natural=natural, figures=figures,
        leaks=measures.leakage(sweep, natural, target),
        displacements={f"{d:g}": at_displacement(sweep, natural, target, d) for d in DISPLACEMENTS},
        curve=[(float(s), float(m)) for s, m in zip(sweep.scales, curve, strict=True)],
    )  # fmt: skip


def evaluate(
    edit: Edit, target: str, split: Split, scales: Sequence[float], reader: ReadsPictures, reader_name: str = "judge",
    name: str = "", others: Sequence[str] | None = None, resamples: int = 200, unit: float | None = None,
) -> Evaluation:  # fmt: skip
    """Sweep an edit over every prompt and seed of the split, read the pictures, measure.

    scales: the safe range and what lies between (`even_scales`). unit: as in `figures_of`. Raises
    UserError for a target that is no attribute.
    """
    attribute_of(target)
    sweep = read_sweep(edit, reader, split.prompts, split.seeds, scales)
    return judge_sweep(sweep, target, split, reader_name, name, others, resamples, unit)


def at_displacement(sweep: SweepReadings, natural: Natural, target: str, displacement: float) -> dict[str, Any]:
    """Figures where the target has moved by so many sigma; values are None where it has not."""
    own = measures.leak(sweep, natural, target, target, displacement)
    leaks = measures.leakage(sweep, natural, target, displacement)
    identity = measures.identity_kept(sweep, natural, target, displacement)
    return {
        "scale_up": measures.scale_at(sweep, natural, target, displacement),
        "scale_down": measures.scale_at(sweep, natural, target, -displacement),
        "selectivity": number(measures.selectivity(own, leaks.values())),
        "identity": None if np.isnan(identity).all() else number(float(np.nanmean(identity))),
        "leakage": {key: number(found.absolute) for key, found in leaks.items()},
    }


def number(value: float | None) -> float | None:
    """As JSON: NaN is null, others have 4 decimals."""
    return None if value is None or np.isnan(value) else round(float(value), 4)


REPORTED = (
    "monotone", "monotone_drawdown", "spearman", "selectivity", "selectivity_picture", "selectivity_among",
    "calibration_error", "calibration_error_unit", "calibration_error_picture", "range_sigma", "symmetry", "parse_loss",
    "linearity", "identity", "unreadable", "off_class_effect",
)  # fmt: skip


def as_json(found: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON values: figures by name, `intervals` by the same names, the leakage row."""
    leaks = found.leaks
    return {
        "name": found.name,
        "attribute": found.target,
        "reader": found.reader,
        "prompts": len(found.split.prompts),
        "seeds": len(found.split.seeds),
        "prompts_sha256": found.split.sha256,
        **{key: number(found.mean(key)) for key in REPORTED},
        "leakage": {key: number(leak.absolute) for key, leak in leaks.items()},
        "leakage_signed": {key: number(leak.signed) for key, leak in leaks.items()},
        "leakage_picture": {key: number(leak.strict) for key, leak in leaks.items()},
        "leakage_floor": {key: number(leak.floor) for key, leak in leaks.items()},
        "sigma": {key: number(value) for key, value in found.natural.sigma.items()},
        "curve": [[number(scale), number(move)] for scale, move in found.curve],
        "displacements": found.displacements,
        "intervals": {
            key: [number(end) for end in ends] for key in found.figures if (ends := found.ends(key)) is not None
        },
    }


def leakage_matrix(found: Sequence[Evaluation]) -> dict[str, dict[str, float | None]]:
    """Signed moves of the evaluated sliders' targets where each slider's own has moved by 1 sigma: row = slider."""
    targets = [one.target for one in found]
    return {
        one.name or one.target: {
            target: number(measures.leak(one.sweep, one.natural, one.target, target).signed)
            for target in targets
        }
        for one in found
    }  # fmt: skip


def summary(found: Mapping[str, Any]) -> str:
    """A few lines for the terminal, from `as_json`."""
    ends = found["intervals"]

    def said(key: str, pattern: str) -> str:
        value = found.get(key)
        if value is None:
            return "-"
        between = ends.get(key)
        return f"{value:{pattern}}" + (f" [{between[0]:{pattern}}, {between[1]:{pattern}}]" if between else "")

    lines = [
        f"{found['name'] or 'slider'}: {found['attribute']}, {found['prompts']} prompts x {found['seeds']} seeds, read "
        f"by the {found['reader']}",
        f"  monotone {said('monotone', '.1%')}, Spearman {said('spearman', '.3f')}",
        f"  selectivity {said('selectivity', '.2f')}, identity kept {said('identity', '.1%')}",
        f"  calibration error {said('calibration_error', '.2f')} sigma at 0.5, 1 and 2, "
        f"{said('calibration_error_unit', '.2f')} up to 1.0; range {said('range_sigma', '.1f')} sigma, "
        f"symmetry {said('symmetry', '.2f')}, parse loss {said('parse_loss', '.1%')}",
    ]
    if found["off_class_effect"] is not None:
        lines.append(f"  off-class effect {said('off_class_effect', '.2f')}")
    leaks = sorted(((k, v) for k, v in found["leakage"].items() if v is not None), key=lambda item: -item[1])
    if leaks:
        lines.append("  leakage at 1 sigma: " + ", ".join(f"{k} {v:.2f}" for k, v in leaks[:6]))
    return "\n".join(lines)
