"""dodgeburn dpo pairs: preference pairs made by a program, or from a person's choices."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.options import parse
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.rework.dpo.make_pairs import Chosen, Drawn

HELP = "make preference pairs: sample pictures, rate them by a program or a person, keep the best and the worst"
EXAMPLE = "dodgeburn dpo pairs --model pocket --by faithful -n 256 --best-of 8 -o my_pairs"
EXAMPLE_PERSON = "dodgeburn dpo pairs --pictures my_pairs --by my_pairs/choices.json -o my_choices"
SHEET_PROMPTS = 8  # prompts a contact sheet
PLAIN = ("pocket", "pocket-dpo")  # models that draw the world as it is; a fine-tune's own look is no artifact


@dataclass
class Pairs:
    """Draw pictures of every prompt, rate them, and write the best and the worst of each prompt as a pair.

    Ties, near ties and pictures that can't be rated are dropped and counted. Interrupted, the same command goes on.
    `--by none` draws only, with contact sheets and a choices.json to fill in.
    """

    model: str = "pocket"
    """What draws: a packaged model, a .safetensors file, a diffusers folder or a hub id."""
    by: str = "faithful"
    """looks (contrast and centring), faithful (readable, prompt followed, five fingers, by the pocket's reader),
    wishes (the prompt alone), hands (five fingers alone),
    artifacts (the less severe the better, by the pocket's pixel oracles),
    FILE.py:FUNCTION (called with pictures uint8 [n, h, w, 3] and their prompts, answers n numbers, more is better),
    a JSON file of choices, or none."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A text file with one prompt a line; none: captions of the pocket world."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"], metavar="COUNT")] = None
    """How many prompts; none: all of the file, or 256 of the pocket world."""
    missed: bool = False
    """Captions of the pocket world that name what the pocket gets wrong more often than the rest."""
    best_of: Annotated[int, tyro.conf.arg(metavar="COUNT")] = 8
    """Pictures a prompt."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """The folder to write: pictures/, pairs.jsonl, scores.json, about.json."""
    pictures: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Rate the pictures that this folder holds already; none: draw."""
    pairs_per_prompt: Annotated[int, tyro.conf.arg(metavar="COUNT")] = 1
    """2: also the second best with the second worst, and so on."""
    near_tie: Annotated[float, tyro.conf.arg(metavar="NUMBER")] = 0.5
    """Pairs whose scores are less than this many standard deviations apart are dropped."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 60_000
    """Of the first picture; the next ones count up."""
    steps: int = 10
    """Denoising steps."""
    guidance: tuple[float, ...] = (4.0,)
    """Classifier-free guidance scale. Several: every seed is drawn at each, so that pictures of a prompt differ in what
    guidance does to them; --best-of counts them all."""
    sampler: str = "dpmpp_2m"
    """Any that `generate` has."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """fp32, fp16 or bf16; none: what suits the device."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A CLIP tokenizer's folder, for single files of real Stable Diffusion."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(args: list[str]) -> int:
    """Run `dodgeburn dpo pairs`; raises UserError for bad input."""
    options = parse(Pairs, args, "dpo pairs", EXAMPLE, EXAMPLE_PERSON)
    if options.out is None:
        raise UserError(f"no output folder: say where to write with -o FOLDER, as in {EXAMPLE}")
    person = options.by.endswith(".json")
    if person and options.pictures is None:
        raise UserError("choices are of pictures that are there: name their folder with --pictures FOLDER")
    if person and not Path(options.by).is_file():
        raise UserError(f"{options.by}: no such file")
    drawn = _pictures(options)
    if options.by == "none":
        about = _for_a_person(drawn, options.out)
    else:
        from dodgeburn.rework.dpo.make_pairs import write_chosen

        about = write_chosen(drawn, _chosen(options, drawn, person), options.out)
        dropped = ", ".join(f"{count} {reason}" for reason, count in about["dropped"].items() if count)
        print(f"wrote {about['pairs']} pairs to {options.out}" + (f"; dropped: {dropped}" if dropped else ""))
    if options.json:
        print(json.dumps({"out": str(options.out), **about}))
    return 0


def _pictures(options: Pairs) -> Drawn:
    from dodgeburn.rework.dpo.make_pairs import draw_all, open_drawn

    if options.pictures is not None:
        given = [name for name in ("model", "prompts", "n", "missed", "best_of", "first_seed", "steps", "guidance",
                                   "sampler")
                 if getattr(options, name) != getattr(Pairs(), name)]  # fmt: skip
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} has no effect with --pictures: those are drawn already")
        return open_drawn(options.pictures)
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model

    settings = _settings(options)
    from dodgeburn.rework.dpo.ratings import READ, rating

    if options.by not in ("none", "looks", "artifacts") and not options.by.endswith(".json"):
        rating(options.by)  # a wrong name is refused before minutes of work
    model = load_model(options.model, options.device, options.dtype, options.tokenizer)
    if options.by in (*READ, "artifacts"):
        from dodgeburn.cli.slider_model import of_pocket

        of_pocket(model, f"dpo pairs --by {options.by}")
    assert options.out is not None
    total = len(settings.rows)
    with tqdm(total=total, unit="picture", desc="pictures", disable=None, file=sys.stderr, leave=False) as bar:
        return draw_all(model, settings, options.out, lambda n: None if bar.update(n) else None)


def _settings(options: Pairs) -> Any:
    from dodgeburn.prompt_file import read_prompts
    from dodgeburn.rework.dpo.make_pairs import DrawSettings, pocket_prompts
    from dodgeburn.sampling.settings import GenerateSettings

    if options.n is not None and not 1 <= options.n <= 100_000:
        raise UserError(f"-n is {options.n}: give a number of prompts from 1 to 100000")
    if options.prompts is None:
        prompts = pocket_prompts(256 if options.n is None else options.n, options.missed)
    else:
        prompts = read_prompts(options.prompts)
        if options.n is not None and options.n > len(prompts):
            raise UserError(f"-n is {options.n}, but {options.prompts} has {len(prompts)} prompts")
        prompts = tuple(prompts[: options.n])
    if not options.guidance:
        raise UserError("--guidance stands there without a number: give one, or several")
    first, *more = options.guidance
    generate = GenerateSettings(steps=options.steps, guidance=first, sampler=options.sampler)
    return DrawSettings(
        prompts=prompts, best_of=options.best_of, guidances=options.guidance if more else (),
        first_seed=options.first_seed, generate=generate,
    )  # fmt: skip


def _chosen(options: Pairs, drawn: Drawn, person: bool) -> Chosen:
    from dodgeburn.rework.dpo.make_pairs import choose_by, choose_from
    from dodgeburn.rework.dpo.ratings import rating

    if person:
        return choose_from(drawn, options.by)
    if options.by == "artifacts":
        return _by_artifacts(options, drawn)
    return choose_by(drawn, rating(options.by), options.near_tie, options.pairs_per_prompt)


def _by_artifacts(options: Pairs, drawn: Drawn) -> Chosen:
    """The oracles take some hundredths of a second a picture, so a bar says how far they are."""
    from tqdm import tqdm

    from dodgeburn.foresee.preference import artifact_rating
    from dodgeburn.pocket.world import LOOKS
    from dodgeburn.rework.dpo.make_pairs import choose_by

    looks = ("plain",) if drawn.model in PLAIN else LOOKS
    count = drawn.pictures.shape[0] * drawn.pictures.shape[1]
    with tqdm(total=count, unit="picture", desc="oracles", disable=None, file=sys.stderr, leave=False) as bar:
        by = artifact_rating(looks=looks, progress=lambda n: None if bar.update(n) else None)
        return choose_by(drawn, by, options.near_tie, options.pairs_per_prompt)


def _for_a_person(drawn: Drawn, out: Path) -> dict[str, Any]:
    """Contact sheets and choices.json beside the pictures; a file that is there already is left as it is."""
    from dodgeburn.checkpoint.tensorfile import write_atomic
    from dodgeburn.images.png import png_bytes
    from dodgeburn.rework.dpo.make_pairs import sheets, template

    out.mkdir(parents=True, exist_ok=True)
    count = len(drawn.settings.prompts)
    names = []
    for start in range(0, count, SHEET_PROMPTS):
        rows = range(start, min(start + SHEET_PROMPTS, count))
        names.append(f"sheet-{start // SHEET_PROMPTS:03d}.png")
        write_atomic(out / names[-1], png_bytes(sheets(drawn, rows)))
    choices = out / "choices.json"
    if not choices.exists():
        entries = ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in template(drawn))
        write_atomic(choices, f"[{entries}]\n".encode())
    print(f"{len(names)} sheets in {out}; say in {choices} which picture wins and which loses, then:")
    print(f"dodgeburn dpo pairs --pictures {drawn.folder} --by {choices} -o PAIRS")
    return {"sheets": names, "choices": str(choices), "prompts": count}
