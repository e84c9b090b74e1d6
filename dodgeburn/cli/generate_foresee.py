"""`dodgeburn generate --best-of N --foresee`: the options, and what they print and draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dodgeburn.cli.generate_options import Generate
    from dodgeburn.foresee.acting import Foreseen
    from dodgeburn.models.model import Model
    from dodgeburn.sampling.loop import Applied, Generated, GenerateSettings, Step, Tuned

PACKAGED = "packaged"


@dataclass
class Foresee:
    """Several seeds for each picture, the best one kept."""

    best_of: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Make each picture as good as the best of N seeds, by the estimator."""
    foresee: Annotated[str | None, tyro.conf.arg(metavar="[ESTIMATOR]")] = None
    """Stop seeds early that are likely to go wrong; a file of `artifacts train`, none: the pocket's."""
    look_ahead: bool = False
    """Read where seeds are heading at a quarter and half of the steps: three further U-Net calls each, more bad ones
    found early."""
    restarts: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Begin pictures anew, up to N times, with seeds not used so far while none of theirs is good."""


def spelled_out(args: list[str]) -> list[str]:
    """`--foresee` without a file, as the option parser wants it."""
    out = []
    for i, arg in enumerate(args):
        out.append(arg)
        if arg == "--foresee":
            following = args[i + 1] if i + 1 < len(args) else "-"
            if following.startswith("-") or not following.endswith(".safetensors"):
                out.append(PACKAGED)
    return out


def check(options: Foresee, source: Path | None, rule: Path | None) -> None:
    """UserError for options that contradict each other."""
    if options.best_of < 1 or options.restarts < 0:
        raise UserError(f"--best-of is {options.best_of}, --restarts {options.restarts}: give at least 1 and 0")
    if options.restarts and not options.foresee:
        raise UserError("--restarts does nothing without --foresee: nothing is given up")
    if options.look_ahead and not options.foresee:
        raise UserError("--look-ahead does nothing without --foresee: nothing is given up")
    if source is not None and asked(options):
        raise UserError("--best-of and --foresee choose among seeds, --from makes one picture again: leave one out")
    if rule is not None and asked(options):
        raise UserError(
            "--best-of and --foresee choose among one prompt's seeds, --rule gives each its own: leave one out"
        )


def asked(options: Foresee) -> bool:
    """Whether seeds are to be chosen among at all."""
    return options.best_of > 1 or options.foresee is not None


def estimator_path(options: Foresee) -> Path:
    """The estimator's file."""
    from dodgeburn.foresee.estimator import PACKAGED as SHIPPED

    return SHIPPED if options.foresee in (None, PACKAGED) else Path(str(options.foresee))


def run(
    model: Model, prompt: str, first_seed: int, settings: GenerateSettings, options: Generate,
    adapters: Sequence[Applied], tuned: Tuned | None, progress: Callable[[Step], object],
) -> tuple[list[Generated], dict[str, Any]]:  # fmt: skip
    """The chosen pictures, and what the JSON says of all seeds."""
    from dodgeburn.foresee.acting import Candidates, foresee
    from dodgeburn.foresee.estimator import Estimator

    chosen = options.seeds
    candidates = Candidates(chosen.best_of, chosen.restarts, chosen.foresee is not None, chosen.look_ahead)
    found = foresee(
        model, prompt, options.n, first_seed, settings, Estimator.load(estimator_path(chosen)), candidates,
        options.batch_size, adapters, tuned=tuned, progress=progress,
    )  # fmt: skip
    path = _free(options.out, prompt)
    draw_chart(found, path, prompt if len(prompt) <= 70 else prompt[:67] + "...")
    # Seeds begun in other batches have the same places there; here each picture has its own.
    pictures = [replace(picture, index=i) for i, picture in enumerate(found.pictures)]
    return pictures, {**record(found, chosen, path), "summary": summary(found, chosen.best_of)}


def _free(folder: Path, prompt: str) -> Path:
    """A name for the chart that is not taken."""
    from dodgeburn.cli.picture_files import slug

    number = 1
    while (path := folder / f"{slug(prompt)}-risk{'' if number == 1 else f'-{number}'}.png").exists():
        number += 1
    return path


def record(found: Foreseen, options: Foresee, chart: Path | None) -> dict[str, Any]:
    """What the JSON says of it."""
    return {
        "estimator": str(estimator_path(options)), "best_of": options.best_of,
        "stops_early": options.foresee is not None, "search": None if found.search is None else found.search.as_dict(),
        "evaluations": found.evaluations, "full_best_of": found.full,
        "saved": round(1 - found.evaluations / found.full, 4), "good": found.good,
        "fates": [fate.as_dict() for fate in found.fates], "chart": None if chart is None else str(chart),
    }  # fmt: skip


def summary(found: Foreseen, best_of: int) -> str:
    """One line."""
    fates = [fate.fate for fate in found.fates]
    parts = ", ".join(f"{fates.count(name)} {name}" for name in dict.fromkeys(fates))
    share = 1 - found.evaluations / found.full
    saved = f"{share:.0%} less" if share >= 0 else f"{-share:.0%} more"
    how = "" if found.search is None else ", tried one after another"
    return (
        f"{len(fates)} seeds{how} ({parts}): {found.evaluations:,} U-Net evaluations, {saved} than {found.full:,} for "
        f"the best of {best_of} made in full; {found.good} of {len(found.pictures)} pictures good by estimate"
    )


def draw_chart(found: Foreseen, path: Path, title: str) -> None:
    """Estimated risk over steps, a line a seed, as PNG."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from dodgeburn.checkpoint.tensorfile import write_atomic
    from dodgeburn.foresee.acting import BEHIND, FINISHED, KEPT, REJECTED
    from dodgeburn.measure.report import LIGHT

    accents = LIGHT.accents
    colours = {KEPT: accents[2], FINISHED: LIGHT.muted, REJECTED: accents[1], BEHIND: accents[3]}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    order = (FINISHED, BEHIND, REJECTED, KEPT)
    for fate in sorted(found.fates, key=lambda f: order.index(f.fate)):
        width = 2.0 if fate.fate == KEPT else 1.1
        axes.plot(fate.looks, fate.risk, color=colours[fate.fate], linewidth=width, alpha=0.85)
        if fate.step is not None:
            axes.plot(fate.step, fate.risk[-1], "x", color=colours[fate.fate], markersize=6)
    for name in order[::-1]:
        n = sum(f.fate == name for f in found.fates)
        if n:
            axes.plot([], [], color=colours[name], label=f"{name} ({n})")
    axes.set(xlabel="denoising step", ylabel="estimated P(bad)", ylim=(-0.03, 1.03), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=LIGHT.grid)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
