"""dodgeburn slider calibrate: 1.0 becomes one natural standard deviation of the attribute, in any program."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.slider_model import OnModel, drawing, of_pocket
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.slide.calibrate import Scorer
    from dodgeburn.slide.slider_file import Slider

HELP = "give a slider's 1.0 a meaning: one natural standard deviation of its attribute"
EXAMPLE = "dodgeburn slider calibrate found.safetensors --attribute smile -o smile.safetensors"
EXAMPLE_CLIP = (
    "dodgeburn slider calibrate smile.safetensors --model photo.safetensors --clip clip-vit-l -o unit.safetensors"
)


@dataclass
class Calibrate(OnModel):
    """Measure what a slider or LoRA does to its attribute, and write it again with scale 1.0 = one natural standard
    deviation of that attribute. The factor goes into the alphas, so every program has it.

    On the pocket the reader sees the attribute. On any other model a proxy does, and the file says so: CLIP (--clip),
    how much nearer a picture is to the positive prompt than to the negative one, or a function of yours (--score).
    The card gets the safe range (the attribute still moves on, and no more than 2 % of the pictures are lost) and the
    response curve.
    """

    file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = None
    """The slider or LoRA."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="OUT")] = None
    """The .safetensors file to write."""
    attribute: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What it moves: smile, or hat=crown; none: as the file says."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Any model: calibrate by the CLIP model of this local folder (a proxy)."""
    positive: str | None = None
    """With --clip: what 1.0 is to bring nearer; none: the slider's positive prompt."""
    negative: str | None = None
    """With --clip: what it is to bring further away; none: the slider's negative prompt."""
    score: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    """Any model: calibrate by this function, called with pictures (uint8 [n, h, w, 3]) and prompts (all empty), which
    answers with a number each, NaN where it can't (a proxy)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """With --clip or --score: what is drawn; none: the slider's own subject."""
    start: float | None = None
    """Time step above which it is off; none: as the file says, or 1000."""
    prompts: int = 8
    """Calibration prompts on the pocket (none of the evaluation's)."""
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
    options = parse(Calibrate, args, "slider calibrate", EXAMPLE, EXAMPLE_CLIP)
    if options.file is None or options.out is None:
        raise UserError(f"name a slider, and where to write with -o OUT.safetensors, as in {EXAMPLE}")
    if not 0.05 <= options.step <= options.furthest <= 100:
        raise UserError(f"--step {options.step:g}, --furthest {options.furthest:g}: expected 0.05 <= step <= furthest")
    if options.clip is not None and options.score is not None:
        raise UserError("--clip and --score: one measure decides what 1.0 means, leave out the other")
    if options.clip is None and (options.positive is not None or options.negative is not None):
        raise UserError("--positive and --negative have no effect without --clip FOLDER: leave them out")
    proxy = options.clip is not None or options.score is not None
    if options.prompt and not proxy:
        raise UserError("--prompt has no effect without --clip or --score: the pocket's prompts are known")
    if options.attribute is not None and proxy:
        raise UserError("--attribute is what the pocket's reader sees: leave it out with --clip or --score")
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
    from dodgeburn.slide.calibrate import CalibrationSettings, calibrate
    from dodgeburn.slide.edits import AdapterEdit
    from dodgeburn.slide.slider_file import calibrated_card, open_slider, save_slider
    from dodgeburn.slide.splits import FIRST_CALIBRATION_SEED

    check_weights_output(out, (file,))  # before minutes of work
    proxy = _proxy(options)  # likewise
    model = options.load()
    if proxy is None:
        of_pocket(model, "slider calibrate")
    with drawing(model, options, "calibrate") as unedited:
        slider = open_slider(file, model)
        scorer, prompts, sigma = _by_reader(options, slider, model) if proxy is None else (*proxy(slider), None)
        card = slider.card.model_copy(update={"start": options.start}) if options.start is not None else slider.card
        start = slider.start if options.start is None else options.start
        seeds = [FIRST_CALIBRATION_SEED + i for i in range(options.seeds)]
        further = options.spread_seeds if sigma is None else 0
        more = [FIRST_CALIBRATION_SEED + i for i in range(options.seeds, options.seeds + further)]
        edit = AdapterEdit(model, slider.adapter, start, unedited=unedited)
        settings = CalibrationSettings(step=options.step, furthest=options.furthest)
        found = calibrate(edit, scorer, prompts, seeds, more, settings, sigma)
    save_slider(found.applied(slider.adapter), calibrated_card(card, found), out, model.layout.name, file)
    return {
        "out": str(out), "attribute": scorer.attribute, "by": scorer.by, "factor": found.factor, "sigma": found.sigma,
        "safe_range": list(found.safe_range), "curve": found.curve, "readable": found.readable,
        "prompts": len(prompts), "seeds": len(seeds), "pictures": found.pictures,
    }  # fmt: skip


def _by_reader(options: Calibrate, slider: Slider, model: Model) -> tuple[Scorer, list[str], float | None]:
    """What measures, on which prompts, and the natural deviation where it is known."""
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide.calibrate import reader_scorer
    from dodgeburn.slide.natural import known_sigma
    from dodgeburn.slide.splits import calibration_split

    target = slider.target(options.attribute)
    split = calibration_split([target], options.prompts, options.seeds)
    return reader_scorer(target, Reader.load("reader")), list(split.prompts), known_sigma(model, target)


Proxy = Callable[["Slider"], tuple["Scorer", list[str]]]


def _proxy(options: Calibrate) -> Proxy | None:
    """From a slider to what measures it by proxy, and its prompts; None where no proxy is asked for."""
    if options.clip is None and options.score is None:
        return None
    from dodgeburn.measure.clip import ClipScore
    from dodgeburn.models.model import choose_device
    from dodgeburn.slide.proxies import clip_scorer, own_proxy

    own = None if options.score is None else own_proxy(options.score)
    clip = None if options.clip is None else ClipScore(options.clip, str(choose_device(options.device)))

    def found(slider: Slider) -> tuple[Scorer, list[str]]:
        card = slider.card
        prompts = list(options.prompt) or [text for text in (card.target or card.positive,) if text]
        if not prompts:
            raise UserError(f"{slider.path.name} does not say what it is about: name what to draw with --prompt TEXT")
        if own is not None:
            return own, prompts
        positive, negative = options.positive or card.positive, options.negative or card.negative
        if not positive or not negative:
            raise UserError(f"{slider.path.name} does not say its prompts: give --positive TEXT and --negative TEXT")
        assert clip is not None
        return clip_scorer(clip, positive, negative), prompts

    return found
