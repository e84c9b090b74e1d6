"""dodgeburn slider unmix: sliders that move each other's attributes, replaced by combinations that don't."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.slider_model import OnModel, drawing, need_files, of_pocket
from dodgeburn.errors import UserError

HELP = "take out of each slider what it does to the others' attributes, without training"
EXAMPLE = "dodgeburn slider unmix smile.safetensors age.safetensors beard.safetensors -o unmixed"


@dataclass
class Unmix(OnModel):
    """Measure what each of several sliders does to the others' attributes, and write for each the combination of all
    that moves its own attribute alone. Effects add only roughly, so measure the result with `slider evaluate`.

    The folder gets a file of the same name for each slider. They are as large as their parents together; --rank
    compresses them. Calibrate the sliders first. Sliders of the pocket world only.
    """

    files: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = field(default_factory=list)
    """Two slider files or more, each for another attribute."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """The folder to write to."""
    prompts: int = 8
    """Calibration prompts (none of the evaluation's)."""
    seeds: int = 4
    """Seeds; every prompt is drawn with each."""
    scale: float = 1.0
    """The effects are measured between minus this scale and this scale."""
    ridge: float = 0.02
    """0 inverts fully; more leaves the sliders more as they are."""
    rank: int | None = None
    """Compress every layer to this rank; none: all ranks side by side."""
    calibrate: bool = True
    """Calibrate the results again: unit, safe range and curve."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider unmix`; raises UserError for bad input."""
    options = parse(Unmix, args, "slider unmix", EXAMPLE)
    need_files(options.files, EXAMPLE)
    if options.out is None:
        raise UserError("no output folder: say where to write with -o DIR")
    if not 0 < options.scale <= 100:
        raise UserError(f"--scale {options.scale:g}: expected more than 0, 100 at most")
    from dodgeburn.cli.picture_files import new_folder

    with new_folder(options.out):
        found = _run(options, options.out)
    for name, lines in (("before, slider by attribute", "matrix"), ("weights, new by old slider", "weights")):
        print(f"{name}:")
        for target, row in zip(found["targets"], found[lines], strict=True):
            print(f"  {target:<14}" + "".join(f"{value:+8.2f}" for value in row))
    print("wrote " + ", ".join(found["written"]))
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Unmix, out: Path) -> dict[str, Any]:
    from dodgeburn.checkpoint.slider_card import SliderParent
    from dodgeburn.checkpoint.tensorfile import check_weights_output
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.calibrate import calibrate, reader_scorer
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.natural import known_sigma
    from dodgeburn.slide.slider_file import calibrated_card, open_sliders, save_slider
    from dodgeburn.slide.splits import FIRST_CALIBRATION_SEED, calibration_split
    from dodgeburn.slide.unmix import check_targets, measure_mixing, unmixed, unmixing

    names = [f"{Path(file).stem}.safetensors" for file in options.files]
    if len(set(names)) < len(names):
        raise UserError("two files have the same name, and so would what is made of them: rename one")
    for name in names:
        check_weights_output(out / name, options.files)
    model = options.load()
    of_pocket(model, "slider unmix")
    reader = Reader.load("reader")
    with drawing(model, options, "unmix") as unedited:
        sliders = open_sliders(options.files, model)
        targets = [slider.target() for slider in sliders]
        check_targets(targets)
        starts = sorted({slider.start for slider in sliders})
        if len(starts) > 1:
            raise UserError(f"the sliders start at time steps {starts[0]:g} to {starts[-1]:g}: a combination has one")
        split = calibration_split(targets, options.prompts, options.seeds)
        more = [FIRST_CALIBRATION_SEED + options.seeds + i for i in range(12)]  # for the natural deviation alone
        edits = [AdapterEdit(model, slider.adapter, slider.start, unedited=unedited) for slider in sliders]
        mixing = measure_mixing(edits, targets, split, reader, options.scale)
        weights = unmixing(mixing, options.ridge)
        made = unmixed([slider.adapter for slider in sliders], weights, options.rank)
        written = []
        for k, (slider, adapter) in enumerate(zip(sliders, made, strict=True)):
            parents = [
                SliderParent(file=s.path.name, sha256=s.adapter.origin.sha256, scale=float(w), name=s.name)
                for s, w in zip(sliders, weights[k], strict=True)
                if w and s.adapter.origin is not None
            ]
            # What was found out about the slider is not true of what is made of it.
            gone: dict[str, Any] = {"certificate": None, "training": None, "safe_range": None, "curve": []}
            gone |= {"unit": "", "sigma": None, "method": "unmixed"}
            card = slider.card.model_copy(update={**gone, "parents": parents})
            if options.calibrate:
                edit = AdapterEdit(model, adapter, slider.start, unedited=unedited)
                sigma = known_sigma(model, targets[k])
                scorer = reader_scorer(targets[k], reader)
                further = more if sigma is None else []
                found = calibrate(edit, scorer, split.prompts, split.seeds, further, sigma=sigma)
                adapter, card = found.applied(adapter), calibrated_card(card, found)
            save_slider(adapter, card, out / names[k], model.layout.name, slider.path)
            written.append(str(out / names[k]))
    return {
        "targets": targets, "matrix": mixing.matrix.round(4).tolist(), "error": mixing.error.round(4).tolist(),
        "weights": weights.round(4).tolist(), "written": written, "prompts": len(split.prompts),
        "seeds": len(split.seeds), "scale": options.scale, "ridge": options.ridge,
    }  # fmt: skip
