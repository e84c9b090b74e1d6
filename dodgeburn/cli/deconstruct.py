"""dodgeburn deconstruct: constructive deconstruction, as a whole or a stage at a time."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.cli.verbs import Part, run_verb
from dodgeburn.errors import DodgeburnWarning, UserError

if TYPE_CHECKING:
    from dodgeburn.models.model import Model
    from dodgeburn.rework.deconstruct.meters import Reading
    from dodgeburn.rework.deconstruct.run import Deconstructed
    from dodgeburn.rework.deconstruct.spec import DeconstructSpec
    from dodgeburn.rework.deconstruct.stage_log import State

HELP = "take a bias apart: overtrain, nightshade, merge back in buckets, retrain; with a report"
EXAMPLE = "dodgeburn deconstruct run examples/deconstruct/profession.yaml -o profession"
VERBS = {
    "run": "all stages of the YAML file, from the audit to the outcome",
    "overtrain": "stage 1 alone: train on the majority until the model fails in a measured way",
    "nightshade": "stage 2 alone: pictures of what is under-represented under the concept's name",
    "bucket": "stage 3 alone: merge noise states back, block by block (--overtrained, --nightshaded)",
    "retrain": "stage 4 alone: retrain on balanced pictures, then fine-tune (--begin)",
}
_GIVEN = {"overtrained": "overtrain", "nightshaded": "nightshade", "nightshaded_base": "nightshade-base",
          "begin": "bucket"}  # fmt: skip


@dataclass
class Deconstruct:
    """Constructive deconstruction of your own copy of a model.

    The folder gets the meters (JSON lines), a strip of pictures for every check, report.html, the model and its card.
    Interrupted or killed, the same command goes on and ends with the same weights. Nothing poisoned is written unless
    --export-poison says where; then every picture is marked poisoned=true.
    """

    spec: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC.yaml")]
    """The YAML file (examples/deconstruct/)."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """The run's folder; a new one, or that of the same run."""
    model: str | None = None
    """Instead of the file's: a packaged name, a single file, a diffusers folder or a hub id."""
    overtrained: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights instead of stage 1: a stage's file, or a model."""
    nightshaded: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights instead of stage 2."""
    nightshaded_base: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """bislerp: what stage 2 makes of the untouched model."""
    begin: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """retrain: weights to begin with instead of stage 3's; the model itself if there are none."""
    export_poison: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write the poisoned pictures here, each marked poisoned=true; never needed."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of the numbers in the written model; the run is in fp32."""
    json: bool = False
    """Print one JSON object as the last line."""


def _example(verb: str) -> str:
    if verb in ("run", "overtrain", "nightshade"):
        return EXAMPLE.replace("run", verb, 1)
    begun = {
        "bucket": "--overtrained a/overtrain.safetensors --nightshaded b/nightshade.safetensors",
        "retrain": "--begin merged.safetensors",
    }
    return f"dodgeburn deconstruct {verb} SPEC.yaml -o FOLDER {begun[verb]}"


def _stage(verb: str, args: list[str]) -> int:
    about = f"{verb}: {VERBS[verb]}.\n\n{inspect.cleandoc(Deconstruct.__doc__ or '')}"
    options = parse(Deconstruct, args, f"deconstruct {verb}", _example(verb), about=about)
    if options.out is None:
        raise UserError(f"no output: say where to write with -o FOLDER: {_example(verb)}")
    return _run(verb, options, options.out)


def main(args: list[str]) -> int:
    """Run `dodgeburn deconstruct VERB ...`; raises UserError for bad input."""
    verbs = {verb: Part(text, _example(verb), partial(_stage, verb)) for verb, text in VERBS.items()}
    return run_verb("deconstruct", verbs, args)


def _run(verb: str, options: Deconstruct, out: Path) -> int:
    from dodgeburn.cli.warned import print_warnings
    from dodgeburn.jobs import check_folder
    from dodgeburn.models.loading import load_model
    from dodgeburn.rework.deconstruct.report import deconstruct_report
    from dodgeburn.rework.deconstruct.run import deconstruct, write_model

    spec = _spec(verb, options)
    check_folder(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DodgeburnWarning)
        name = spec.model if options.model is None else options.model
        model = load_model(name, options.device, "fp32", options.tokenizer)
        found = deconstruct(model, spec, out, given=_given(options, model), tell=_tell, start=_start)
        page = deconstruct_report(found, model.name).save(out / "report.html")
        result = {**found.as_json(), "report": str(page)}
        if found.biased:
            path = out / f"{spec.name}.safetensors"
            write_model(model, found, path, options.dtype)
            result["out"] = str(path)
    print_warnings(caught)
    _print(found)
    print(f"report: {page}")
    if "out" in result:
        print(f"wrote {result['out']} and its card")
    if options.json:
        print(json.dumps(result))
    return 0


def _spec(verb: str, options: Deconstruct) -> DeconstructSpec:
    from dodgeburn.rework.deconstruct.spec import load_spec

    spec = load_spec(options.spec)
    if verb != "run":
        spec = spec.model_copy(update={"stages": (verb,)})
    if options.export_poison is not None:
        if "nightshade" not in spec.stages:
            raise UserError("--export-poison has no effect: no stage here makes poison")
        spec = spec.model_copy(
            update={"nightshade": spec.nightshade.model_copy(update={"export": options.export_poison})}
        )
    useless = {"overtrained": "overtrain", "nightshaded": "nightshade", "nightshaded_base": "nightshade"}
    for option, stage in useless.items():
        if getattr(options, option) is not None and stage in spec.stages:
            raise UserError(f"--{option.replace('_', '-')} has no effect: stage {stage} takes place")
    if options.begin is not None and spec.stages != ("retrain",):
        raise UserError("--begin is for retrain alone")
    return spec


def _given(options: Deconstruct, model: Model) -> dict[str, State]:
    from dodgeburn.rework.deconstruct.run import read_state

    paths = {stage: getattr(options, option) for option, stage in _GIVEN.items()}
    return {stage: read_state(path, model) for stage, path in paths.items() if path is not None}


def _start(stage: str) -> None:
    print(f"stage {stage}", file=sys.stderr, flush=True)


def _tell(stage: str, step: int, reading: Reading) -> None:
    said = [f"L {reading.loss:.2f}", f"TV {reading.tv:.3f}"] + (
        [f"explicit {reading.fidelity:.0%}"] if reading.fidelity == reading.fidelity else []
    )
    print(f"\r  {stage} {step}: {', '.join(said)}", file=sys.stderr, flush=True)


def _print(found: Deconstructed) -> None:
    b, a = found.before, found.after
    if not found.biased:
        pictures = found.panel.neutral
        print(f"nothing to do: total variation {b.tv:.3f} is no more than chance shows in {pictures} pictures")
        return
    for stage in found.stages:
        print(f"{stage.stage}: {stage.decision} ({stage.steps} gradient steps, {stage.seconds:.0f} s)")
    print(
        f"total variation {b.tv:.3f} -> {a.tv:.3f}, explicit prompts {b.fidelity:.1%} -> {a.fidelity:.1%}, "
        f"other prompts {b.others:.1%} -> {a.others:.1%}, held-out loss {a.loss:.3f} x"
    )
