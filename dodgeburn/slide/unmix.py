"""Unmixing: sliders that move each other's attributes, replaced by combinations that don't, without training.

R [i, j]: what slider i does to attribute j at scale 1, in natural standard deviations, measured on calibration prompts
by the reader. As far as effects add (small scales, low ranks), the combination sum_i W[k, i] slider_i does W R; with
W = R^-1 the k-th combination moves attribute k alone. Measured leaks are noisy and effects don't quite add, so the
inverse is drawn towards "leave them as they are": W minimises |W R - I|^2 + ridge |W - I|^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dodgeburn.errors import UserError
from dodgeburn.models.adapters import Adapter
from dodgeburn.slide.compose import concatenated, recompressed
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.measures import mean_known, natural_spread
from dodgeburn.slide.readings import ReadsPictures, SweepReadings, attribute_of, read_sweep
from dodgeburn.slide.splits import Split

LEAST_WEIGHT = 0.02  # a smaller part of another slider isn't worth its ranks


@dataclass(frozen=True)
class Mixing:
    """What N sliders do to each other's attributes at scale 1."""

    targets: list[str]
    matrix: np.ndarray  # float64 [slider, attribute], in sigma of the attribute
    error: np.ndarray  # standard errors, over prompts
    prompts: int
    seeds: int


def check_targets(targets: Sequence[str]) -> None:
    """UserError for less than two targets, or for two that are the same attribute."""
    names = [attribute_of(target) for target in targets]
    if len(names) < 2:
        raise UserError("unmixing needs at least two sliders")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two sliders move {twice[0]}: unmixing needs a different attribute for each")


def mixing_of(sweeps: Sequence[SweepReadings], targets: Sequence[str]) -> Mixing:
    """The matrix from each slider's sweep over -s, 0 and s: half the distance of the mean moves, divided by s.

    Unreadable pictures are left out. Sigmas are those of the first sweep's unedited pictures, which all share.
    """
    natural = natural_spread(sweeps[0], targets=list(targets))
    prompts, seeds = sweeps[0].shape
    rows, errors = [], []
    for sweep in sweeps:
        step = float(sweep.scales[-1])
        by_prompt = np.stack([
            mean_known((sweep.of(t)[:, :, -1] - sweep.of(t)[:, :, 0]) / (2 * step * natural.sigma[t]), 1)
            for t in targets
        ])  # fmt: skip
        mean = mean_known(by_prompt, 1)
        known = (~np.isnan(by_prompt)).sum(1)
        squares = mean_known((by_prompt - mean[:, None]) ** 2, 1)
        rows.append(mean)
        errors.append(np.sqrt(squares / np.maximum(known - 1, 1)))  # of the mean: sqrt(sum / (n - 1) / n)
    return Mixing(list(targets), np.stack(rows), np.stack(errors), prompts, seeds)


def measure_mixing(
    edits: Sequence[Edit], targets: Sequence[str], split: Split, reader: ReadsPictures, scale: float = 1.0
) -> Mixing:
    """Draw and read all sliders at -scale, 0 and scale."""
    check_targets(targets)
    sweeps = [read_sweep(edit, reader, split.prompts, split.seeds, [-scale, 0.0, scale]) for edit in edits]
    return mixing_of(sweeps, targets)


def unmixing(mixing: Mixing, ridge: float = 0.02) -> np.ndarray:
    """Weights W [new slider, old slider].

    Leaks within two standard errors of 0 are taken for 0, so that noise is not "corrected". Rows are scaled so that
    each new slider moves its own attribute by 1 sigma at scale 1, as far as effects add. Raises UserError for a slider
    that does not move its own attribute forwards.
    """
    if ridge < 0:
        raise UserError(f"ridge {ridge:g}: expected 0 or more")
    own = np.diag(mixing.matrix)
    for target, moved in zip(mixing.targets, own, strict=True):
        if np.isnan(moved):
            raise UserError(f"no picture of the slider for {target} can be read at this scale: take a smaller one")
        if not moved > 0.1:
            raise UserError(
                f"the slider for {target} moves it by {moved:.2f} natural standard deviations at scale 1: calibrate it "
                "first"
            )
    n = len(own)
    sure = (np.abs(mixing.matrix) >= 2 * mixing.error) | np.eye(n, dtype=bool)
    r = np.where(sure, mixing.matrix, 0.0)
    w = (r.T + ridge * np.eye(n)) @ np.linalg.inv(r @ r.T + ridge * np.eye(n))
    reached = np.diag(w @ r)
    if not (reached > 0.1).all():
        raise UserError("the sliders are too much alike to be told apart: raise --ridge, or leave one out")
    w = w / reached[:, None]
    return np.where((np.abs(w) >= LEAST_WEIGHT) | np.eye(n, dtype=bool), w, 0.0)


def unmixed(adapters: Sequence[Adapter], weights: np.ndarray, rank: int | None = None) -> list[Adapter]:
    """The combinations, named after the sliders whose place they take; recompressed to `rank` if given."""
    made = []
    for k, adapter in enumerate(adapters):
        used = [int(i) for i in np.flatnonzero(weights[k])]
        one = concatenated([adapters[i] for i in used], [float(weights[k, i]) for i in used], adapter.name)
        made.append(recompressed(one, rank)[0] if rank is not None else one)
    return made
