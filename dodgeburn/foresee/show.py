"""One early rejection shown: the noisy previews, the estimated risk, and what the picture would have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dodgeburn.foresee.acting import REJECTED, Candidates, Fate, Foreseen, foresee
from dodgeburn.foresee.collect import moments
from dodgeburn.foresee.estimator import Estimator
from dodgeburn.foresee.observe import space_of
from dodgeburn.measure.report import Report, Theme
from dodgeburn.models.latents import decode_pictures
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import GenerateSettings, Step, generate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADING = "One picture given up early"
GOOD = 0.5  # estimated P(bad) up to which the one that is kept does not need an excuse


def show_rejection(
    report: Report, model: Model, prompts: Sequence[str], settings: GenerateSettings, best_of: int = 4
) -> Fate | None:
    """Add a section with a candidate that was taken out, where a picture is to be as good as the best of `best_of`: of
    the first prompt of which one is and the one kept looks good in the end, else of the first of which one is.

    Returns its fate; None if the packaged estimator is of another kind of model (no section then) or nothing was taken
    out (said there).
    """
    estimator = Estimator.load()
    if space_of(model) != estimator.space:
        return None
    looks: dict[int, list[np.ndarray]] = {}  # by the number of the fate
    rounds = [0, 0]  # fates of the rounds before the running one, and of this one too

    def keep(step: Step) -> None:
        if step.i == 0:  # one picture is asked for: a round is one batch
            rounds[:] = [rounds[1], rounds[1] + len(step.indices)]
        if step.i in moments(step.total, estimator.looks):
            for index, picture in zip(step.indices, decode_pictures(model.vae, step.latents).numpy(), strict=True):
                looks.setdefault(rounds[0] + index, []).append(picture)

    report.heading(HEADING)
    seeds = 0
    shown: tuple[str, Foreseen, dict[int, list[np.ndarray]], float] | None = None
    for prompt in prompts:
        looks, rounds = {}, [0, 0]
        found = foresee(model, prompt, 1, 0, settings, estimator, Candidates(best_of), progress=keep)
        seeds += len(found.fates)
        if all(fate.step is None for fate in found.fates):
            continue
        risk = next(fate.risk[-1] for fate in found.fates if fate.seed == found.pictures[0].seed)
        if shown is None or risk <= GOOD:
            shown = prompt, found, looks, risk
        if risk <= GOOD:
            break
    if shown is None:
        report.text(f"Of {seeds} seeds none was given up: none looked bad or fell behind early.")
        return None
    prompt, found, looks, risk = shown
    kept = found.pictures[0]
    out = [(i, fate) for i, fate in enumerate(found.fates) if fate.step is not None]
    index, fate = max(out, key=lambda item: item[1].risk[-1])
    become = generate(model, [prompt], [fate.seed], settings)[0]
    left = len(found.fates) - len(out)
    why = "the only one that was finished" if left == 1 else f"the best of {left} finished ones, by the last estimate"
    was = "1 was" if len(out) == 1 else f"{len(out)} were"
    own = f", and its own risk is {risk:.2f}: one has to be shown, however bad all look" if risk > GOOD else ""
    end = "was rejected" if fate.fate == REJECTED else fate.fate
    report.text(
        f"{prompt!r}: {len(found.fates)} seeds were begun, and {was} given up on the way. Seed {fate.seed} "
        f"{end} after step {fate.step} of {settings.steps}; the strip shows it until then. "
        f"{found.evaluations} U-Net evaluations were made instead of {found.full} for the best of {best_of} in full. "
        f"Guidance is {settings.guidance:g} here; the one kept is {why}{own}. "
        f"Prompts were tried until one is given up and the one kept looks good: {seeds} seeds in all."
    )
    pictures = [*looks[index], np.asarray(become.image), np.asarray(kept.image)]
    columns = [f"step {i}" for i in fate.looks] + ["would have become", f"kept: seed {kept.seed}"]
    report.sheet([pictures], [f"seed {fate.seed}"], columns)
    report.figure(lambda theme: _curves(theme, found.fates, fate), "estimated P(bad) over the steps, a line a seed")
    report.code(f'dodgeburn generate "{prompt}" --best-of {best_of} --foresee --guidance {settings.guidance:g}')
    return fate


def _curves(theme: Theme, fates: list[Fate], shown: Fate) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3) if theme.narrow else (7, 3), layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    for fate in fates:
        colour = theme.accents[1] if fate is shown else theme.accents[2] if fate.fate == "kept" else theme.muted
        axes.plot(fate.looks, fate.risk, color=colour, linewidth=2 if colour != theme.muted else 1)
        if fate.step is not None:
            axes.plot(fate.step, fate.risk[-1], "x", color=colour)
    axes.plot([], [], color=theme.accents[1], label=f"seed {shown.seed}, {shown.fate}")
    axes.plot([], [], color=theme.accents[2], label="kept")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("denoising step", color=theme.ink)
    axes.set_ylabel("estimated P(bad)", color=theme.ink)
    axes.set_ylim(-0.03, 1.03)
    axes.tick_params(colors=theme.muted)
    axes.grid(color=theme.grid)
    for side in axes.spines.values():
        side.set_color(theme.grid)
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure
