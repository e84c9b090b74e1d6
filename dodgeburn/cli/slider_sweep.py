"""dodgeburn slider sweep: sliders looked at, as a sheet or an animation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dodgeburn.cli.bake import parse_strength
from dodgeburn.cli.lists import numbers, seeds_of
from dodgeburn.cli.options import parse
from dodgeburn.cli.slider_model import OnModel, drawing, need_files
from dodgeburn.errors import UserError

if TYPE_CHECKING:
    from dodgeburn.slide.slider_file import Slider
    from dodgeburn.slide.sweep import Plan

HELP = "show sliders at several scales: strips, a grid of two, compositions, animations"
EXAMPLE = 'dodgeburn slider sweep smile.safetensors --prompt "a doctor, blue backdrop" --seeds 0-3 -o smile.png'


@dataclass
class Sweep(OnModel):
    """Draw sliders at several scales as one sheet: a row for every slider, prompt and seed, a column for every scale.

    --grid sets two sliders against each other; --progressive adds one slider after the other, each at its own scale.
    On pocket models the reader's value of the attribute stands under every picture. The picture carries the settings.
    """

    files: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="FILE[:SCALE]")] = field(
        default_factory=list
    )
    """Slider or LoRA files; a scale after a colon counts with --progressive (1 if there is none)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """One prompt or several; none: the slider's own subject."""
    scales: Annotated[str | None, tyro.conf.arg(metavar="NUMBERS")] = None
    """-2,-1,0,1,2 or -2..2/9 (say --scales=-2,...); none: 7 across the file's safe range, or -2 to 2."""
    seeds: Annotated[str, tyro.conf.arg(metavar="NUMBERS")] = "0"
    """0,1,2 or 0-3."""
    start: Annotated[float | None, tyro.conf.arg(metavar="TIME")] = None
    """Time step above which sliders are off (1000: on from the beginning); none: as the file says."""
    grid: bool = False
    """Two sliders: the first along the columns, the second down the rows."""
    progressive: bool = False
    """From no slider to all of them."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """The sheet: .png, .jpg or .webp."""
    animate: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """An animation along the columns and back: .gif or .webp."""
    milliseconds: int = 200
    """Of each frame of the animation."""
    cell: int | None = None
    """Pixels of a picture's side in the sheet; none: at least 192."""


def main(args: list[str]) -> int:
    """Run `dodgeburn slider sweep`; raises UserError for bad input."""
    from dodgeburn.checkpoint.atomic import check_output

    options = parse(Sweep, args, "slider sweep", EXAMPLE)
    need_files(options.files, EXAMPLE)
    if options.out is None and options.animate is None:
        raise UserError("no output file: say where to write with -o OUT.png or --animate OUT.gif")
    if options.grid and options.progressive:
        raise UserError("--grid and --progressive are two different sheets: choose one")
    for path, kinds in ((options.out, (".png", ".jpg", ".jpeg", ".webp")), (options.animate, (".gif", ".webp"))):
        if path is not None and path.suffix.lower() not in kinds:
            raise UserError(f"{path}: expected a name that ends in {', '.join(kinds)}")
        if path is not None:
            check_output(path)  # before minutes of work
    if not 20 <= options.milliseconds <= 10_000:
        raise UserError(f"--milliseconds {options.milliseconds}: expected 20 to 10000")
    if options.cell is not None and not 8 <= options.cell <= 4096:
        raise UserError(f"--cell {options.cell}: expected 8 to 4096 pixels")
    seeds = seeds_of(options.seeds)
    scales = numbers(options.scales, "scales") if options.scales is not None else None
    found = _run(options, seeds, scales)
    print(f"drew {found['pictures']} pictures: " + ", ".join(str(path) for path in found["written"]))
    if options.json:
        print(json.dumps(found))
    return 0


def _run(options: Sweep, seeds: list[int], scales: list[float] | None) -> dict[str, Any]:
    from dataclasses import replace

    from dodgeburn.images.png import write_picture
    from dodgeburn.merge.compare_measure import speaks_pocket
    from dodgeburn.pocket.reader import Reader
    from dodgeburn.slide import sweep
    from dodgeburn.slide.slider_file import open_sliders

    named = [parse_strength(text) for text in options.files]
    model = options.load()
    with drawing(model, options, "sweep") as unedited:
        sliders = open_sliders([path for path, _ in named], model)
        if options.start is not None:
            sliders = [replace(s, card=s.card.model_copy(update={"start": _start(options.start)})) for s in sliders]
        plan = _plan(options, sliders, [scale for _, scale in named], seeds, scales)
        pictures = sweep.make_pictures(sliders, plan, unedited)
    values = None
    if speaks_pocket(model) and any(slider.card.attribute for slider in sliders):
        values = sweep.read_values(sliders, pictures, Reader.load("reader"))
    record = {
        "sweep": [slider.path.name for slider in sliders],
        "sliders": [
            {"file": s.path.name, "sha256": s.adapter.origin.sha256 if s.adapter.origin else "", "start": s.start}
            for s in sliders
        ],
        "cells": [[{"prompt": c.prompt, "seed": c.seed, "scales": list(c.scales)} for c in row] for row in plan.rows],
        "values": values, "model": model.name, "model_sha256": model.sha256, **options.settings().model_dump(),
    }  # fmt: skip
    written = []
    if options.out is not None:
        write_picture(options.out, sweep.sheet(sliders, plan, pictures, values, options.cell), own=record)
        written.append(str(options.out))
    if options.animate is not None:
        frames = sweep.animation(plan, pictures, options.cell)
        sweep.write_animation(options.animate, frames, options.milliseconds, record)
        written.append(str(options.animate))
    return {"written": written, "pictures": len({c for row in plan.rows for c in row}), **record}


def _start(time: float) -> float:
    if not 0 <= time <= 1000:
        raise UserError(f"--start {time:g}: expected a time step from 0 to 1000")
    return time


def _plan(
    options: Sweep, sliders: list[Slider], own_scales: list[float], seeds: list[int], scales: list[float] | None
) -> Plan:
    from dodgeburn.slide import sweep
    from dodgeburn.slide.evaluate import even_scales

    prompts = list(options.prompt) or [sliders[0].card.target or "a person"]
    if options.progressive:
        if scales is not None:
            raise UserError("--scales has no effect with --progressive: give each file its scale, as in smile.pt:2")
        return sweep.progressive(sliders, prompts, seeds, own_scales)
    if any(scale != 1.0 for scale in own_scales):
        raise UserError("a scale after a file's name counts with --progressive only: give --scales")
    ranges = [s.card.safe_range for s in sliders]
    known = [r for r in ranges if r is not None]
    both = (max(r[0] for r in known), min(r[1] for r in known)) if len(known) == len(ranges) else None
    chosen = scales if scales is not None else [round(s, 2) for s in even_scales(both, 7)]
    if options.grid:
        if len(prompts) * len(seeds) > 1:
            raise UserError("a grid shows one prompt and one seed: give one of each")
        return sweep.grids(sliders, prompts[0], seeds[0], chosen)
    return sweep.strips(sliders, prompts, seeds, chosen)
