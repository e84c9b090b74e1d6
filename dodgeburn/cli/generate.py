"""dodgeburn generate: pictures from a prompt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodgeburn.cli import generate_foresee as early
from dodgeburn.cli import generate_grid as grid
from dodgeburn.cli.generate_options import Generate
from dodgeburn.cli.generate_plan import Plan, plan_of, read_embeddings, tell_source
from dodgeburn.cli.loras import apply
from dodgeburn.cli.options import given_options, parse
from dodgeburn.cli.picture_files import (
    SHEET,
    check_picture_name,
    is_picture_name,
    made_before,
    new_folder,
    picture_path,
    write_sheet,
)
from dodgeburn.cli.warned import said_at_once
from dodgeburn.errors import UserError
from dodgeburn.images.png import KINDS

if TYPE_CHECKING:
    from dodgeburn.sampling.loop import Generated, Step

HELP = "make pictures from a prompt, with their settings inside the PNGs"
EXAMPLE = 'dodgeburn generate "a doctor, smiling broadly, with red hair" --model pocket --seed 0 -n 8'


def main(args: list[str]) -> int:
    """Run `dodgeburn generate`; raises UserError for bad input."""
    options = parse(Generate, early.spelled_out(args), "generate", EXAMPLE)
    if not 1 <= options.n <= 100_000:
        raise UserError(f"-n is {options.n}: give a number of pictures from 1 to 100000")
    given = given_options(args)
    if f".{options.format}" not in KINDS:
        raise UserError(f"--format is {options.format!r}: expected {', '.join(k[1:] for k in KINDS)}")
    early.check(options.seeds, options.source, options.rule)
    if options.resume and early.asked(options.seeds):
        raise UserError("--best-of and --foresee choose among seeds while they draw: leave --resume out")
    if axes := grid.axes_of(options.grid):
        return _main_grid(options, axes, given)
    plan = plan_of(options, given)
    named = is_picture_name(options.out)
    if named:
        if early.asked(options.seeds) or (len(plan.seeds) > 1 and plan.row is None):
            raise UserError(f"-o {options.out} is one picture's name, and more are asked for: name a folder")
        check_picture_name(options.out, options.format if "format" in given else None)
    with said_at_once(), new_folder(options.out.parent if named else options.out):
        found = _run(options, plan)
    print(_wrote(options, found))
    if found["sheet"]:
        print(f"sheet: {found['sheet']}")
    if "foresee" in found:
        print(found["foresee"].pop("summary"))
        print(f"risk over steps: {found['foresee']['chart']}")
    if options.json:
        print(json.dumps(found))
    return 0


def _wrote(options: Generate, found: dict[str, Any]) -> str:
    """A line about the pictures."""
    count = len(found["pictures"]) - found["kept"]
    before = f", {found['kept']} were there" if options.resume else ""
    return f"wrote {count} picture{'' if count == 1 else 's'} to {options.out} in {found['seconds']} s{before}"


def _main_grid(options: Generate, axes: dict[str, grid.Axis], given: frozenset[str]) -> int:
    if early.asked(options.seeds):
        raise UserError("--best-of and --foresee choose among seeds, a grid shows every one: leave one out")
    if is_picture_name(options.out):
        raise UserError(f"-o {options.out} is one picture's name, a grid has many: name a folder")
    cells = grid.cells_of(options, axes, given)
    with said_at_once():
        found = grid.run(options, axes, cells)
    print(_wrote(options, found))
    for sheet in found["sheets"]:
        print(f"sheet: {sheet}")
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Generate, plan: Plan) -> dict[str, Any]:
    from tqdm import tqdm

    from dodgeburn.models.loading import load_model
    from dodgeburn.sampling.loop import planned, stream
    from dodgeburn.sampling.saving import save_picture

    model = load_model(plan.model, options.device, plan.dtype, options.tokenizer)
    tell_source(plan, model)
    adapters = apply(plan.loras, options.lora_blocks, model)
    tuned = None if plan.tuned is None else plan.tuned.load(options.device, plan.dtype, options.tokenizer)
    read_embeddings(plan, [model, None if tuned is None else tuned.model])
    began = time.perf_counter()
    shown: dict[int, Generated] = {}  # on the sheet
    rows: dict[int, dict[str, Any]] = {}
    said: dict[str, Any] = {}

    def keep(picture: Generated, path: Path) -> None:
        rows[picture.index] = {"path": str(path), "prompt": picture.prompt, "seed": picture.seed,
                               "settings": picture.settings.model_dump()}  # fmt: skip
        if picture.index < SHEET or not shown:
            shown[picture.index] = picture

    if options.resume:
        for one in planned(model, plan.prompts, plan.seeds, plan.settings, adapters, tuned):
            if plan.row in (None, one.index):
                path = picture_path(options.out, plan.prompt, options.format, one, model)
                if (picture := made_before(path, one, model)) is not None:
                    keep(picture, path)
    there = range(len(plan.seeds)) if plan.row in rows else tuple(rows)
    written = 0
    # disable=None: a bar on a terminal only
    with tqdm(
        total=(len(plan.seeds) - len(there)) * plan.settings.steps, unit="step", disable=None, file=sys.stderr,
        leave=False,
    ) as bar:  # fmt: skip

        def progress(step: Step) -> None:
            bar.update(len(step.indices))

        found: Iterable[Generated]
        if early.asked(options.seeds):
            bar.reset(total=None)
            found, said["foresee"] = early.run(
                model, plan.prompt, plan.seeds[0], plan.settings, options, adapters, tuned, progress
            )
        else:
            found = stream(
                model, plan.prompts, plan.seeds, plan.settings, progress, plan.batch_size, adapters=adapters,
                tuned=tuned, there=there,
            )  # fmt: skip
        for picture in found:
            if plan.row is None or picture.index == plan.row:
                path = picture_path(options.out, plan.prompt, options.format, picture, model)
                save_picture(path, picture, model)
                keep(picture, path)
                written += 1
    made = [shown[index] for index in sorted(shown)]
    sheet = (
        write_sheet(options.out, options.format, plan.prompt, made, model) if options.sheet and len(made) > 1 else None
    )
    return {
        "pictures": [rows[index] for index in sorted(rows)],
        "sheet": None if sheet is None else str(sheet),
        "model": model.name,
        "model_sha256": model.sha256,
        "adapters": [use.record() for use in made[0].adapters] if made else [],
        "tuned": None if tuned is None else {"model": tuned.model.name, "strength": tuned.strength},
        "not_honoured": plan.not_honoured,
        "kept": len(rows) - written,
        "seconds": round(time.perf_counter() - began, 3),
        **said,
    }
