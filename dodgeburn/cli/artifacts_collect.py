"""dodgeburn artifacts collect: denoising trajectories with labels, from a zoo of generators or from ratings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.options import as_option, given, parse
from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.foresee.collect import Labeller
    from dodgeburn.foresee.zoo import Zoo
    from dodgeburn.models.model import Model

HELP = "trajectories as they happen, with labels: from a zoo of imperfect generators, or of rated pictures"
EXAMPLE = "dodgeburn artifacts collect trajectories --trajectories 512 --json"


@dataclass
class Collect:
    """Draw pictures and keep what is to be seen on the way, in shards; go on where it was interrupted.

    Without --ratings a zoo of generators is made of the model (few steps, odd guidance, samplers, merges, a slider too
    far, damaged weights), and the pocket's pictures are labelled by pixel oracles. With --ratings, rated pictures get
    their true trajectory where seed and settings bring it back, and noise added where not. Formats: docs/foresee.md.
    """

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the shards go."""
    model: str = "pocket"
    """A packaged model, a .safetensors file, a diffusers folder or a hub id."""
    trajectories: int = 2048
    """How many; rounded up to whole shards."""
    prompts: str = ""
    """A text file with one prompt a line, or `development` or `gate` (the pocket's own); none: development."""
    generators: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Members of the zoo; none: all but the one that is held out."""
    hold_out: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Which member is kept for evaluation; none: `pruned`."""
    seeds_per_prompt: int = 8
    """Pictures of each prompt from one generator: ranking within a prompt needs several."""
    moments: int = 8
    """Samples kept of each trajectory."""
    steps: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Denoising steps, for all generators; none: each one's own."""
    fresh_noise: bool = False
    """New noise at each step: of stochastic samplers, and at each noise level of noised pictures."""
    look_ahead: Annotated[int | None, tyro.conf.arg(metavar="CALLS")] = None
    """Model calls of a look ahead at a quarter and half of the steps, read by a critic; none: 3 for the pocket, which
    has a critic, 0 (no look) for others."""
    label: str = "auto"
    """Who says how bad a picture is: reader, judge (evaluations only), none; auto: the reader, for the pocket."""
    split: str = "train"
    """What the trajectories are marked as: train or test."""
    pictures: bool = True
    """Keep the finished pictures."""
    ratings: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Rated pictures: DiffusionDB's metadata and AI-Horde's ratings, ImageReward, Pick-a-Pic, HPD, RichHF, or plain
    parquet or JSON lines; told apart by their columns."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the rated pictures lie; none: beside the first file of ratings."""
    replay: bool = True
    """Draw rated pictures again where seed and settings are known, to have their true trajectory."""
    part: Annotated[tuple[int, int], tyro.conf.arg(metavar="I N")] = (0, 1)
    """Make every Nth shard only, from the Ith on: for several processes on one folder."""
    seed: int = 0
    """What generators, settings and pictures' seeds are drawn from."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """fp32, fp16 or bf16; none: what suits the device."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn artifacts collect`; raises UserError for bad input."""
    options = parse(Collect, args, "artifacts collect", EXAMPLE)
    _check(options)
    with said_at_once():
        found = _rated(options) if options.ratings else _zoo(options)
    if options.json:
        print(json.dumps(found))
    return 0


def _check(options: Collect) -> None:
    if options.folder is None:
        raise UserError(f"which folder? For example: {EXAMPLE}")
    if options.trajectories < 1:
        raise UserError(f"--trajectories {options.trajectories}: expected at least 1")
    if options.split not in ("train", "test"):
        raise UserError(f"--split {options.split}: expected train or test")
    if options.label not in ("auto", "reader", "judge", "none"):
        raise UserError(f"--label {options.label}: expected auto, reader, judge or none")
    i, n = options.part
    if not 0 <= i < n:
        raise UserError(f"--part {i} {n}: expected I from 0 to N - 1")
    if options.images is not None and not options.ratings:
        raise UserError("--images has no effect without --ratings")
    of_zoo = ("trajectories", "generators", "hold_out", "seeds_per_prompt", "steps", "prompts", "label", "look_ahead")
    said = given(options)
    if options.ratings and (idle := [name for name in of_zoo if name in said]):
        raise UserError(f"{', '.join(map(as_option, idle))}: no effect with --ratings, which say what was rated")
    if not options.ratings and "replay" in said:
        raise UserError("--no-replay has no effect without --ratings")


def _load(options: Collect) -> Model:
    from dodgeburn.models.loading import load_model

    return load_model(options.model, options.device, options.dtype, options.tokenizer)


def _zoo(options: Collect) -> dict[str, Any]:
    from dodgeburn.foresee.ahead import CALLS, pocket_critic
    from dodgeburn.foresee.collect import CollectSettings, collect
    from dodgeburn.foresee.zoo import HELD_OUT, plain_zoo, pocket_zoo
    from dodgeburn.merge.compare_measure import speaks_pocket

    model = _load(options)
    of_pocket = speaks_pocket(model)
    zoo = pocket_zoo(model) if of_pocket else plain_zoo(model)
    label, labels = _labeller(options, of_pocket)
    held_out, *given = _known(zoo, (options.hold_out or HELD_OUT, *options.generators))
    members = tuple(given) or tuple(m.name for m in zoo.members if m.name != held_out)
    per_shard = 4 * options.seeds_per_prompt
    settings = CollectSettings(
        prompts=_prompts(options.prompts, of_pocket),
        members=members,
        shards=-(-options.trajectories // max(1, per_shard)),
        seeds_per_prompt=options.seeds_per_prompt,
        moments=options.moments,
        steps=options.steps,
        split=options.split,
        fresh_noise=options.fresh_noise,
        pictures=options.pictures,
        seed=options.seed,
        ahead=(CALLS if of_pocket else 0) if options.look_ahead is None else options.look_ahead,
    )
    if settings.ahead and not of_pocket:
        raise UserError(f"--look-ahead {settings.ahead}: {options.model} is no model of the pocket world, and there is "
                        "no critic of others' pictures")  # fmt: skip
    critic = pocket_critic() if settings.ahead else None
    assert options.folder is not None
    with _bar(settings.trajectories, "trajectories") as progress:
        counts = collect(zoo, settings, options.folder, label, labels, options.part, progress, critic)
    return {**_summary(options.folder), **counts, "labels": labels, "held_out": held_out}


def _known(zoo: Zoo, names: tuple[str, ...]) -> tuple[str, ...]:
    from dodgeburn.sampling.spelling import resolve

    known = [m.name for m in zoo.members]
    return tuple(resolve("generator", name, known) for name in names)


def _labeller(options: Collect, of_pocket: bool) -> tuple[Labeller, str]:
    from dodgeburn.foresee.collect import oracle, unlabelled

    name = ("reader" if of_pocket else "none") if options.label == "auto" else options.label
    if name == "none":
        if options.label == "auto":
            print(f"{options.model} is no model of the pocket world: the pictures stay without labels, until people "
                  "rate them (dodgeburn artifacts label)", file=sys.stderr)  # fmt: skip
        return unlabelled, "none"
    if not of_pocket:
        raise UserError(f"{options.model} is no model of the pocket world: the {name} can't label its pictures")
    return oracle(name), name


def _prompts(given: str, of_pocket: bool) -> tuple[str, ...]:
    from dodgeburn.prompt_file import read_prompts
    from dodgeburn.training.pocket import development_prompts, gate_prompts

    if given in ("", "development") and of_pocket:
        return tuple(dict.fromkeys(row["prompt"] for row in development_prompts(512)))
    if given == "gate" and of_pocket:
        return tuple(dict.fromkeys(row["prompt"] for row in gate_prompts()))
    if not given:
        raise UserError("which prompts? Give --prompts FILE with one a line")
    return tuple(dict.fromkeys(read_prompts(given)))


def _rated(options: Collect) -> dict[str, Any]:
    from dodgeburn.foresee.rated import RatedSettings, collect_rated
    from dodgeburn.foresee.ratings import read_ratings

    images = options.images or options.ratings[0].parent
    rated = read_ratings(options.ratings, images)
    for line in rated.said:
        print(line, file=sys.stderr)
    settings = RatedSettings(
        moments=options.moments, fresh_noise=options.fresh_noise, replay=options.replay, split=options.split,
        pictures=options.pictures, seed=options.seed,
    )  # fmt: skip
    model = _load(options)
    assert options.folder is not None
    with _bar(len(rated.rows), "rated pictures") as progress:
        counts = collect_rated(model, rated, settings, options.folder, options.part, progress)
    return {**_summary(options.folder), **counts, "formats": rated.formats}


class _bar:
    """A progress bar on a terminal; calling it says how far the work is."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit=f" {unit}", disable=None)

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)


def _summary(folder: Path) -> dict[str, Any]:
    """What the folder holds now; also printed."""
    from dodgeburn.foresee.shards import Store

    store = Store(folder)
    labels = [r.label for r in store.records if r.label is not None]
    bad = sum(label.bad for label in labels)
    by = Counter(r.generator for r in store.records)
    provenance = Counter(r.provenance for r in store.records)
    line = f"{folder}: {len(store)} trajectories in {len(store.paths)} shards"
    if labels:
        line += f", {bad} of {len(labels)} labelled ones bad ({bad / len(labels):.0%})"
    print(line)
    for name, n in sorted(by.items()):
        own = [r.label for r in store.records if r.generator == name and r.label is not None]
        share = f", {sum(x.bad for x in own) / len(own):.0%} bad" if own else ""
        print(f"  {name}: {n}{share}")
    return {
        "folder": str(folder), "trajectories": len(store), "shards": len(store.paths), "broken": sorted(store.broken),
        "labelled": len(labels), "bad": bad, "generators": dict(by), "provenance": dict(provenance),
    }  # fmt: skip
