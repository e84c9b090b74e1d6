"""dodgeburn slider calibrate: 1.0 becomes one natural standard deviation of the attribute, in any program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.slider_model import OnModel, drawing, of_pocket
from dodgeburn.errors import UserError

HELP = "give a slider's 1.0 a meaning: one natural standard deviation of its attribute"
EXAMPLE = "dodgeburn slider calibrate found.safetensors --attribute smile -o smile.safetensors"


@dataclass
class Calibrate(OnModel):
    """Measure what a slider or LoRA does to its attribute, and write it again with scale 1.0 = one natural standard
    deviation of that attribute, as the reader sees it. The factor goes into the alphas, so every program has it.

    The card gets the safe range (the attribute still moves on, and no more than 2 % of the pictures are lost) and the
    response curve. Sliders of the pocket world only.
    """

    file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = None
    """The slider or LoRA."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write."""
    attribute: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What it moves: smile, or hat=crown; none: as the file says."""
    start: float | None = None
    """Time step above which it is off; none: as the file says, or 1000."""
    prompts: int = 8
    """Calibration prompts (none of the evaluation's)."""
    seeds: int = 4
    """Seeds for the response; every prompt is drawn with each at every scale."""
    spread_seeds: int = 12
    """Further seeds for the natural deviation, unedited; not needed for the packaged model, whose is known."""
    step: float = 0.5
    """Of the scales at which the safe range is measured."""
    furthest: float = 4.0
    """Largest scale that is tried."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider calibrate`; raises UserError for bad input."""
    options = parse(Calibrate, args, "slider calibrate", EXAMPLE)
    if options.file is None or options.out is None:
        raise UserError(f"name a slider, and where to write with -o OUT.safetensors, as in {EXAMPLE}")
    if not 0.05 <= options.step <= options.furthest <= 100:
        raise UserError(f"--step {options.step:g}, --furthest {options.furthest:g}: expected 0.05 <= step <= furthest")
    if options.start is not None and not 0 <= options.start <= 1000:
        raise UserError(f"--start {options.start:g}: expected a time step from 0 to 1000")
    found = _run(options, options.file, options.out)
    low, high = found["safe_range"]
    print(f"1.0 was {found['factor']:.4g} of {options.file}; safe from {low:g} to {high:g}")
    print("scale: movement in deviations: " + ", ".join(f"{s:g}: {m:+.2f}" for s, m in found["curve"]))
    print(f"wrote {options.out}")
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Calibrate, file: str, out: Path) -> dict[str, Any]:
    from dodgeburn.checkpoint.tensorfile import check_weights_output
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.calibrate import CalibrationSettings, calibrate, reader_scorer
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.natural import known_sigma
    from dodgeburn.slide.slider_file import calibrated_card, open_slider, save_slider
    from dodgeburn.slide.splits import FIRST_CALIBRATION_SEED, calibration_split

    check_weights_output(out, (file,))  # before minutes of work
    model = options.load()
    of_pocket(model, "slider calibrate")
    with drawing(model, options, "calibrate") as unedited:
        slider = open_slider(file, model)
        target = slider.target(options.attribute)
        card = slider.card.model_copy(update={"start": options.start}) if options.start is not None else slider.card
        start = slider.start if options.start is None else options.start
        split = calibration_split([target], options.prompts, options.seeds)
        sigma = known_sigma(model, target)
        further = options.spread_seeds if sigma is None else 0
        more = [FIRST_CALIBRATION_SEED + i for i in range(options.seeds, options.seeds + further)]
        edit = AdapterEdit(model, slider.adapter, start, unedited=unedited)
        settings = CalibrationSettings(step=options.step, furthest=options.furthest)
        scorer = reader_scorer(target, Reader.load("reader"))
        found = calibrate(edit, scorer, split.prompts, split.seeds, more, settings, sigma)
    save_slider(found.applied(slider.adapter), calibrated_card(card, found), out, model.layout.name, file)
    return {
        "out": str(out), "attribute": target, "factor": found.factor, "sigma": found.sigma,
        "safe_range": list(found.safe_range), "curve": found.curve, "readable": found.readable,
        "prompts": len(split.prompts), "seeds": len(split.seeds), "pictures": found.pictures,
    }  # fmt: skip
