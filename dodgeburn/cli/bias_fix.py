"""dodgeburn bias fix and bias uce: take a tie away."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.options import as_option, parse
from dodgeburn.errors import UserError, did_you_mean
from dodgeburn.given_settings import first_problem

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.rework.bias.before_after import Measured
    from dodgeburn.rework.bias.classify import Classifier
    from dodgeburn.rework.bias.concept import Concept
    from dodgeburn.rework.bias.fix import Fixed
    from dodgeburn.rework.bias.remedies import Job, RemedySettings

HELP = "take one tie away: by a named method, or by the cheapest that reaches the target"
EXAMPLE = 'dodgeburn bias fix pocket --prompt "a firefighter" --attribute hair_colour --method auto -o fair.safetensors'
EXAMPLE_UCE = 'dodgeburn bias uce pocket --prompt "a firefighter" --attribute hair_colour -o fair.safetensors'


@dataclass
class FixOptions:
    """Dissolve the tie between prompts and an attribute, and measure what it cost.

    Methods, from the cheapest; `auto` keeps the first that meets the target with all else kept:
    - random-prompt: a rule that says a class in the prompt, more often what is drawn less often than asked; no weights
    - uce: cross-attention solved for, no training
    - reweight: trained on pictures as tied as the model, rare classes counted more
    - balanced: trained on pictures of all classes alike
    - taught: as balanced, on what the model itself answers to a prompt with the class in it (style stays)
    - self: as taught, on the model's own pictures
    - negation: the tie trained in further, then subtracted
    - shrink-perturb: weights shrunk and given noise, then as balanced
    - dpo: pictures of other classes as winners over the majority's

    The pocket's data are drawn by its world; any other model brings its own (--data) or takes a method that needs none.
    Pictures are read by the reader, or by CLIP (--clip, --attributes).
    """

    model: Annotated[str, tyro.conf.Positional] = "pocket"
    """A packaged model, a .safetensors file, a diffusers folder or a hub id."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """Neutral prompts of the concept: they leave the attribute open."""
    attribute: str = ""
    """What is tied to them: hair_colour, glasses, ...; with --clip one of the file's."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Only these classes; none: all of the attribute's."""
    target: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARE ...")] = ()
    """Their shares; none: equal."""
    method: str = "auto"
    """auto or one of the methods."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """The new model (.safetensors), or with random-prompt the rule (.json)."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """For report.html, fix.json and checkpoints; none: beside the output, named after it."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Pictures of the concept with captions (imagefolder); a column of the attribute's name is believed."""
    skip_bad: bool = False
    """With --data: leave out pictures and lines that cannot be used, instead of stopping."""
    clip: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP model's local folder, as classifier (a proxy)."""
    attributes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --clip: attributes, their classes and texts (YAML)."""
    others: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompts of other things, one a line, which are to stay; the pocket has its own."""
    tv: float = 0.10
    """The target: total variation, unreadable pictures counted as the majority."""
    slack: float = 0.01
    """By how much fidelity and readability may fall."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 192
    """Neutral pictures before and after."""
    steps: int = 150
    """Gradient steps of the methods that train."""
    batch: int = 32
    """Pictures a gradient step."""
    lr: float | None = None
    """Learning rate. Unless said: 3e-4; for taught and self 5e-5 for each class, at most 3e-4."""
    pictures: int = 256
    """Pictures of the concept to train on."""
    sampling_steps: int = 12
    """Denoising steps of every picture drawn on the way."""
    seed: int = 0
    """Of training and data."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str], method: str | None = None) -> int:
    """Run `dodgeburn bias fix`; raises UserError for bad input."""
    verb = "uce" if method else "fix"
    options = parse(FixOptions, args, f"bias {verb}", EXAMPLE_UCE if method else EXAMPLE)
    if method is not None:
        if options.method not in ("auto", method):
            raise UserError(f"bias {verb} is bias fix --method {method}: leave --method out")
        options.method = method
    from dodgeburn.rework.bias.fix import methods_for

    methods = methods_for(options.method)
    _check(options)
    found, model = _run(options, methods)
    return _finish(options, found, model)


def _check(options: FixOptions) -> None:
    if not options.prompt or not options.attribute:
        raise UserError(f"name the prompt and the attribute, as in: {EXAMPLE}")
    if options.skip_bad and options.data is None:
        raise UserError("--skip-bad has no effect without --data FOLDER: leave it out")
    if (options.clip is None) != (options.attributes is None):
        raise UserError("--clip and --attributes belong together: a CLIP folder, and what to tell apart with it")
    if options.out is None:
        raise UserError("no output file: say where to write with -o NAME.safetensors")
    wanted = ".json" if options.method == "random-prompt" else ".safetensors"
    if options.out.suffix != wanted:
        raise UserError(f"{options.out}: expected a name that ends in {wanted}")
    if options.out.is_dir():
        raise UserError(f"{options.out} is a folder: expected the name of a file to write")
    for name in ("tv", "slack"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name} is {getattr(options, name):g}: expected a share from 0 to 1")
    if options.n < 16:
        raise UserError(f"-n {options.n}: expected at least 16 pictures, or chance decides")
    if Path(options.model).expanduser().exists() and options.out.exists() and (
        Path(options.model).expanduser().resolve() == options.out.resolve()
    ):  # fmt: skip
        raise UserError(f"{options.out} is the model itself: an output is never an input")


def _run(options: FixOptions, methods: tuple[str, ...]) -> tuple[Fixed, Model]:
    from dodgeburn.checkpoint.atomic import check_output
    from dodgeburn.jobs import PartStore
    from dodgeburn.rework.bias.fix import fix

    job, sources, digest = _job(options, _settings(options))
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
            if k not in ("json", "out", "report", "device")}  # fmt: skip
    told |= {"sha256": job.model.sha256, "pictures_sha256": digest, **job.classifier.job}
    if options.others is not None:
        told["other_prompts"] = job.concept.others
    parts = PartStore(_folder(options), told).folder
    job.folder = parts / "checkpoints"
    assert options.out is not None
    check_output(options.out)  # before minutes of work
    found = fix(job, methods, options.tv, options.slack, weights=options.method != "random-prompt", sources=sources,
                keep=parts)  # fmt: skip
    return found, job.model


def _settings(options: FixOptions) -> RemedySettings:
    from pydantic import ValidationError

    from dodgeburn.rework.bias.remedies import RemedySettings

    said = {name: getattr(options, name) for name in ("steps", "batch", "lr", "pictures", "seed")}
    try:
        return RemedySettings(**said)
    except ValidationError as error:
        raise UserError(first_problem(error, RemedySettings, as_option)) from None


def _folder(options: FixOptions) -> Path:
    assert options.out is not None
    return options.report or options.out.with_name(f"{options.out.stem}-fix")


def _job(options: FixOptions, settings: Any) -> tuple[Job, Any, str]:
    """The job, where its pictures come from once the bias is known, and the digest of pictures of the user's."""
    from dodgeburn.models.loading import load_model
    from dodgeburn.rework.bias.before_after import Meter, make_plan
    from dodgeburn.rework.bias.remedies import Job, folder_source, world_sources
    from dodgeburn.sampling.settings import GenerateSettings

    model = load_model(options.model, options.device, "fp32", options.tokenizer)
    concept, classifier, reader = _concept(options, model)
    real = None
    if reader is not None:
        from dodgeburn.rework.bias.before_after import real_features

        real = real_features(reader, model.native_size, min(500, 2 * options.n))
    meter = Meter(concept, make_plan(concept, options.n, options.n // 2, options.n // 4), classifier,
                  reader, real)  # fmt: skip
    sampling = GenerateSettings(steps=options.sampling_steps)
    job = Job(model, concept, classifier, meter, sampling, Path("."), settings)
    if options.data is not None:
        from dodgeburn.training.image_folder import read_image_folder

        size = (model.native_size, model.native_size)
        pictures, faults = read_image_folder(options.data, size, options.skip_bad)
        if faults:
            more = "; …" if len(faults) > 3 else ""
            print(f"left out {len(faults)} of {options.data}: {'; '.join(faults[:3])}{more}")
        job.fair = job.tied = folder_source(pictures, concept)
        return job, None, pictures.sha256
    if reader is None:
        return job, None, ""

    def sources(before: Measured) -> tuple[Any, Any]:
        return world_sources(concept, model.native_size, before.bias.shares)

    return job, sources, ""


def _concept(options: FixOptions, model: Model) -> tuple[Concept, Classifier, Any]:
    from dodgeburn.merge.compare_measure import speaks_pocket
    from dodgeburn.prompt_file import read_prompts
    from dodgeburn.rework.bias.classify import ClipClassifier, PocketClassifier, read_attributes
    from dodgeburn.rework.bias.concept import make_concept

    target = options.target or None
    others = read_prompts(options.others) if options.others is not None else ()
    if options.clip is not None and options.attributes is not None:
        from dodgeburn.measure.clip import ClipScore

        texts = read_attributes(options.attributes)
        if options.attribute not in texts:
            raise UserError(
                f"{options.attributes} has no attribute {options.attribute!r}: "
                f"{did_you_mean(options.attribute, texts)}it has {', '.join(texts)}"
            )
        known = texts[options.attribute]
        for name in options.classes:
            if name not in known:
                raise UserError(f"{options.attribute} has no class {name!r}: expected some of {', '.join(known)}")
        concept = make_concept(options.prompt, options.attribute, options.classes or tuple(known), None, target,
                               others=others)  # fmt: skip
        return concept, ClipClassifier(ClipScore(options.clip, str(model.device)), texts), None
    if not speaks_pocket(model):
        raise UserError(f"{model.name} is no model of the pocket world, and nothing reads its pictures: give a "
                        "classifier with --clip FOLDER --attributes FILE")  # fmt: skip
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.rework.bias.pocket_concept import pocket_concept

    reader = Reader.load("reader")
    concept = pocket_concept(options.prompt, options.attribute, options.classes, target)
    return replace(concept, others=others or concept.others), PocketClassifier(reader), reader


def _finish(options: FixOptions, found: Fixed, model: Model) -> int:
    from dodgeburn.checkpoint.tensorfile import write_atomic
    from dodgeburn.rework.bias.fix import fix_report, save_fixed

    assert options.out is not None
    folder = _folder(options)
    result: dict[str, Any] = {"model": model.name, **found.as_json()}
    if found.chosen is not None:
        kept = {"steps": options.steps, "batch": options.batch, "lr": found.chosen.done.rate,
                "pictures": options.pictures, "seed": options.seed}  # fmt: skip
        save_fixed(model, found, options.out, kept)
        result["written"] = str(options.out)
        misses = found.chosen.misses
        said = "does not meet" if misses else "meets"
        print(f"{found.chosen.done.method} {said} the target (TV {options.tv:g}, slack {options.slack:g}): "
              f"{'; '.join(misses)}{': ' if misses else ''}{options.out}")  # fmt: skip
        cheaper = [t.done.method for t in found.tried if t.meets and not t.done.weights]
        if cheaper and found.chosen.done.weights:
            print(f"cheaper still, without new weights: {cheaper[0]}")
    write_atomic(folder / "fix.json", (json.dumps(result, indent=1) + "\n").encode())
    result["report"] = str(fix_report(found, model.name).save(folder / "report.html"))
    print(f"report: {result['report']}")
    if options.json:
        print(json.dumps(result))
    return 0
