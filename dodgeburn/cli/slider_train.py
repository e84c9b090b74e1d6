"""dodgeburn slider train: Concept Sliders from prompts in a YAML file, or from pictures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.warned import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.slide.spec import SliderSpec
    from dodgeburn.slide.train import Made, SliderMaker

HELP = "train sliders from prompts, or from pictures before and after"
EXAMPLE = "dodgeburn slider train examples/sliders/smile.yaml -o smile.safetensors"
EXAMPLE_PAIRS = "dodgeburn slider train --pairs my_pairs --attribute eye_size -o eyes.safetensors"


@dataclass
class Train:
    """Train the sliders of a YAML file, from a negative to a positive prompt, at all scales from -1 to 1 and beyond.

    A file with one slider needs name, target, positive and negative. One with `sliders: [...]` trains them all on one
    cache. On the pocket, a slider with an attribute is calibrated: 1.0 of the written file is one natural standard
    deviation, in every program. Interrupted, the same command goes on;
    of several sliders it leaves those that are finished.
    """

    spec: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC.yaml")] = None
    """The YAML file (examples/sliders/). Beside --pairs: the settings of that training (rank, steps, layers …)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; a folder where the YAML file names several sliders."""
    model: str = "pocket"
    """The model to train on: a packaged name, a single file, a diffusers folder or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    closed_form: bool = False
    """Solve for cross-attention's keys and values by least squares: seconds, no training, no call of the U-Net."""
    pairs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Learn from a folder of pictures before and after (before/ and after/ with the same names, folders -1/ and 1/, or
    names that end in _-1 and _+1), not from prompts."""
    prompt: str = ""
    """What the pairs show, without what differs; may be empty."""
    attribute: str | None = None
    """What the pairs change, by the pocket's reader: calibrates the slider."""
    strips: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Every N steps, save a strip of pictures of what the slider does so far, beside the output; 0: none."""
    calibrate: bool = True
    """Fold the unit into the file, where there is an attribute and a reader for it."""
    seed: int | None = None
    """Instead of the file's seed."""
    lora: Literal["kohya", "sgm", "peft"] = "kohya"
    """Spelling of the keys."""
    dtype: Literal["fp32", "fp16"] = "fp16"
    """Type of the numbers written; the trained numbers are fp32 until then."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider train`; raises UserError for bad input."""
    settings = parse(Train, args, "slider train", EXAMPLE, EXAMPLE_PAIRS)
    if settings.out is None:
        raise UserError("no output: say where to write with -o OUT.safetensors (or a folder for several sliders)")
    if settings.spec is None and settings.pairs is None:
        raise UserError(f"give a YAML file or --pairs FOLDER: {EXAMPLE}; {EXAMPLE_PAIRS}")
    if settings.pairs is None and (settings.prompt or settings.attribute):
        raise UserError("--prompt and --attribute are for --pairs: a YAML file says its own")
    if settings.pairs is not None and (settings.closed_form or settings.strips):
        raise UserError("--closed-form and --strips have no effect on pairs: leave them out")
    if settings.closed_form and settings.strips:
        raise UserError("--strips has no effect with --closed-form, which has no steps: leave it out")
    if settings.strips < 0 or (settings.seed or 0) < 0:
        raise UserError(f"--strips is {settings.strips}, --seed {settings.seed}: expected 0 or more")
    made = _from_pairs(settings, settings.pairs, settings.out) if settings.pairs else _from_text(settings)
    if settings.json:
        print(json.dumps({"sliders": [_row(one) for one in made]}))
    return 0


def _from_text(settings: Train) -> list[Made]:
    from dodgeburn.checkpoint.tensorfile import check_weights_output
    from dodgeburn.cli.picture_files import new_folder
    from dodgeburn.slide.spec import load_specs
    from dodgeburn.slide.strips import StripSaver

    assert settings.spec is not None and settings.out is not None
    specs = load_specs(settings.spec)
    if settings.seed is not None:
        specs = [spec.model_copy(update={"seed": settings.seed}) for spec in specs]
    paths = _paths(specs, settings.out)
    found = []
    alone = settings.out.suffix == ".safetensors"
    with nullcontext() if alone else new_folder(settings.out), _maker(settings, [settings.spec]) as maker:
        for path in paths.values():
            check_weights_output(path, [settings.spec])
        made: Iterable[Made]
        if settings.closed_form:
            made = (maker.closed_form(spec, paths[spec.name]) for spec in specs)
        else:
            if len(specs) > 1:  # of a run that was cut off, or has got one more
                there = [spec for spec in specs if maker.is_there(spec, paths[spec.name])]
                if there:
                    print(f"there already: {', '.join(spec.name for spec in there)}")
                specs = [spec for spec in specs if spec not in there]
            strips = StripSaver(maker.model, paths, settings.strips) if settings.strips else None
            made = maker.text(specs, lambda spec: paths[spec.name], strips)
        for one in made:
            found.append(one)
            _say(one)
    return found


def _from_pairs(settings: Train, pictures: Path, out: Path) -> list[Made]:
    from dodgeburn.checkpoint.tensorfile import check_weights_output
    from dodgeburn.given_settings import read_yaml
    from dodgeburn.slide.pairs import make_pair_spec

    inputs = [settings.spec] if settings.spec is not None else []
    check_weights_output(out, inputs)
    said = {"name": out.stem}
    for path in inputs:
        said |= read_yaml(path, "a YAML file of settings for --pairs", "say rank, steps or layers")
    here = {"prompt": settings.prompt or None, "attribute": settings.attribute, "seed": settings.seed}
    spec = make_pair_spec(said | {k: v for k, v in here.items() if v is not None}, str(settings.spec or "--pairs"))
    with _maker(settings, inputs) as maker:
        made = maker.pairs(spec, pictures, out)
    _say(made)
    return [made]


def _paths(specs: list[SliderSpec], out: Path) -> dict[str, Path]:
    if len(specs) == 1 and out.suffix == ".safetensors":
        return {specs[0].name: out}
    if out.suffix == ".safetensors":
        raise UserError(f"output {out}: the YAML file names {len(specs)} sliders, give a folder for them")
    if out.suffix and not out.is_dir():
        raise UserError(f"output {out}: sliders are written as .safetensors, name it so, or give a folder")
    return {spec.name: out / f"{spec.name}.safetensors" for spec in specs}


@contextmanager
def _maker(settings: Train, inputs: list[Path]) -> Iterator[SliderMaker]:
    """What makes sliders on the model that was asked for; warnings are counted at the end."""
    from dodgeburn.merge.compare_measure import speaks_pocket
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.calibrate import Scorer, reader_scorer
    from dodgeburn.slide.natural import known_sigma
    from dodgeburn.slide.splits import calibration_rows
    from dodgeburn.slide.train import SliderMaker

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        model = load_model(settings.model, device=settings.device, tokenizer=settings.tokenizer)

        def scorer(attribute: str) -> Scorer:
            return reader_scorer(attribute, Reader.load("reader"))

        readable = settings.calibrate and speaks_pocket(model)
        yield SliderMaker(
            model, scorer if readable else None, lambda attribute: known_sigma(model, attribute),
            spelling=settings.lora, dtype=settings.dtype, inputs=inputs, rows=calibration_rows,
        )  # fmt: skip
    print_warnings(caught)


def _say(one: Made) -> None:
    from dodgeburn.slide.readings import FINGERS

    card = one.card
    print(f"wrote {one.path}: slider {one.spec.name}, {one.seconds:.1f} s")
    print(
        f"  {one.shared + one.training + one.calibration:,} samples through the U-Net: {one.shared:,} shared by its "
        f"class, {one.training:,} trained, {one.calibration:,} calibrated"
    )
    if card.unit:
        low, high = card.safe_range or (0.0, 0.0)
        print(f"  1.0 = {card.unit} ({card.sigma:.3f}); safe from {low:g} to {high:g}")
        if card.start is not None:
            print(f"  off above time step {card.start:g}")
        if one.better_eta is not None:
            print(
                f"  1.0 is {one.raw:.1f} times the slider as it was trained, beyond its reach: a stronger target "
                f"(eta: {one.better_eta:g} in its specification) would train what is used"
            )
    elif card.attribute == FINGERS:
        print("  not calibrated: fingers are right or wrong and have no natural deviation; 1.0 is as trained")
    else:
        print("  not calibrated: 1.0 is what training made of it (see slider calibrate, by --clip on any model)")


def _row(one: Made) -> dict[str, object]:
    return {
        "name": one.spec.name, "out": str(one.path), "seconds": round(one.seconds, 2), "shared": one.shared,
        "forwards": one.training, "calibration": one.calibration, "sigma": one.card.sigma,
        "safe_range": one.card.safe_range, "curve": one.card.curve, "unit": one.card.unit,
        "better_eta": one.better_eta,
    }  # fmt: skip
