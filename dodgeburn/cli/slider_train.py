"""dodgeburn slider train: Concept Sliders from a YAML file."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dodgeburn.cli.bake import print_warnings
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.slide.spec import SliderSpec
    from dodgeburn.slide.train import Made

HELP = "train sliders from prompts"
EXAMPLE = "dodgeburn slider train examples/sliders/smile.yaml -o smile.safetensors"


@dataclass
class Train:
    """Train the sliders of a YAML file, from a negative to a positive prompt, at all scales from -1 to 1 and beyond.

    A file with one slider needs name, target, positive and negative. One with `sliders: [...]` trains them all on one
    cache. On the pocket, a slider with an attribute is calibrated: 1.0 of the written file is one natural standard
    deviation, in every program. Interrupted, the same command goes on.
    """

    spec: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC.yaml")] = None
    """The YAML file (examples/sliders/)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write; a folder where the YAML file names several sliders."""
    model: str = "pocket"
    """The model to train on: a packaged name, a single file, a diffusers folder or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    strips: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Every N steps, save a strip of pictures of what the slider does so far, beside the output; 0: none."""
    calibrate: bool = True
    """Fold the unit into the file, where there is an attribute and a reader for it."""
    seed: int | None = None
    """Instead of the file's seed."""
    lora: Literal["kohya", "sgm", "peft"] = "kohya"
    """Spelling of the keys."""
    dtype: Literal["fp32", "fp16"] = "fp16"
    """Type of the numbers written; training is in fp32."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider train`; raises UserError for bad input."""
    settings = tyro.cli(
        Train,
        args=args,
        prog="dodgeburn slider train",
        description=f"{inspect.cleandoc(Train.__doc__ or '')}\n\nexample: {EXAMPLE}",
    )
    if settings.spec is None:
        raise UserError(f"no slider to train: name a YAML file, as in {EXAMPLE}")
    if settings.out is None:
        raise UserError("no output: say where to write with -o OUT.safetensors (or a folder for several sliders)")
    from dodgeburn.slide.spec import load_specs

    specs = load_specs(settings.spec)
    if settings.seed is not None:
        specs = [spec.model_copy(update={"seed": settings.seed}) for spec in specs]
    paths = _paths(specs, settings.out)
    made = _train(settings, specs, paths)
    if settings.json:
        print(json.dumps({"sliders": [_row(one) for one in made]}))
    return 0


def _paths(specs: list[SliderSpec], out: Path) -> dict[str, Path]:
    if len(specs) == 1 and out.suffix == ".safetensors":
        return {specs[0].name: out}
    if out.suffix == ".safetensors":
        raise UserError(f"output {out}: the YAML file names {len(specs)} sliders, give a folder for them")
    out.mkdir(parents=True, exist_ok=True)
    return {spec.name: out / f"{spec.name}.safetensors" for spec in specs}


def _train(settings: Train, specs: list[SliderSpec], paths: dict[str, Path]) -> list[Made]:
    from dodgeburn.checkpoint.tensorfile import check_output
    from dodgeburn.merge.compare_measure import speaks_pocket
    from dodgeburn.models.loading import load_model
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.calibrate import Scorer, reader_scorer
    from dodgeburn.slide.natural import known_sigma
    from dodgeburn.slide.strips import StripSaver
    from dodgeburn.slide.train import train_sliders

    for path in paths.values():
        check_output(path, [settings.spec] if settings.spec else [])
    model = load_model(settings.model, device=settings.device)

    def scorer(attribute: str) -> Scorer:
        return reader_scorer(attribute, Reader.load("reader"))

    readable = settings.calibrate and speaks_pocket(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        found = []
        for one in train_sliders(
            model, specs, lambda spec: paths[spec.name], scorer if readable else None,
            lambda attribute: known_sigma(model, attribute), spelling=settings.lora, dtype=settings.dtype,
            inputs=[settings.spec] if settings.spec else [],
            progress=StripSaver(model, paths, settings.strips) if settings.strips else None,
        ):  # fmt: skip
            found.append(one)
            _say(one)
    print_warnings(caught)
    return found


def _say(one: Made) -> None:
    card = one.card
    print(f"wrote {one.path}: slider {one.spec.name}, {one.seconds:.1f} s")
    print(
        f"  {one.shared + one.training + one.calibration:,} samples through the U-Net: {one.shared:,} shared by its "
        f"class, {one.training:,} trained, {one.calibration:,} calibrated"
    )
    if card.unit:
        low, high = card.safe_range or (0.0, 0.0)
        print(f"  1.0 = {card.unit} ({card.sigma:.3f}); safe from {low:g} to {high:g}")
        print(f"  off above time step {card.start:g}")
    else:
        print("  not calibrated: 1.0 is what training made of it")


def _row(one: Made) -> dict[str, object]:
    return {
        "name": one.spec.name, "out": str(one.path), "seconds": round(one.seconds, 2), "shared": one.shared,
        "forwards": one.training, "calibration": one.calibration, "sigma": one.card.sigma,
        "safe_range": one.card.safe_range, "curve": one.card.curve, "unit": one.card.unit,
    }  # fmt: skip
