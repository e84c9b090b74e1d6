"""`dodgeburn generate --x steps=10,20 --y sampler=euler,ddim`: every combination of settings, on sheets with labels."""

from __future__ import annotations

import csv
import itertools
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from dodgeburn.cli.embeddings import check_named
from dodgeburn.cli.lists import numbers, seeds_of
from dodgeburn.cli.picture_files import free_name, made_before, new_folder, picture_path, slug
from dodgeburn.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from dodgeburn.cli.generate_options import Generate
    from dodgeburn.cli.generate_plan import Plan
    from dodgeburn.images.png import Infotext
    from dodgeburn.sampling.loop import Generated

MOST_PICTURES = 500  # all stay in memory until their sheets are drawn
ALIASES = {"cfg": "guidance", "scheduler": "spacing", "size": "width", "seeds": "seed", "checkpoint": "model"}
OTHERS = ("prompt", "seed", "model", "lora")
Value = str | int | float | bool | None


@dataclass
class Grid:
    """A picture for every combination of settings (A1111's X/Y/Z plot), each a file, and sheets with labels."""

    x: Annotated[str | None, tyro.conf.arg(metavar="NAME=VALUES")] = None
    """Across: a setting and its values, as in steps=10,20,40 or guidance=2..8/4. NAME is any setting of a picture
    (sampler, spacing, clip_skip, width …), seed, model, lora (the scale; lora:NAME of several) or prompt, whose first
    value is looked for in the prompt and replaced by the others: prompt="red hair,blue hair"."""
    y: Annotated[str | None, tyro.conf.arg(metavar="NAME=VALUES")] = None
    """Downwards: the same."""
    z: Annotated[str | None, tyro.conf.arg(metavar="NAME=VALUES")] = None
    """One sheet each: the same."""


@dataclass(frozen=True)
class Axis:
    """A setting and its values."""

    name: str
    values: list[Value]

    def label(self, i: int) -> str:
        """What stands at the sheet's side."""
        value = self.values[i]
        if self.name == "prompt":
            return str(value)
        if self.name == "model":
            return Path(str(value)).stem or str(value)
        plain = value is None or isinstance(value, bool)
        said = f"{value:g}" if isinstance(value, float) else str(value).lower() if plain else value
        return f"{self.name.removeprefix('lora:').replace('_', ' ')} {said}"


@dataclass(frozen=True)
class Made:
    """A picture, its file, and what is said of its making: for that its model must be there, with its embeddings."""

    picture: Generated
    path: Path
    infotext: Infotext
    record: dict[str, Any]


@dataclass
class Cell:
    """One combination: positions on the axes, what to make there, and what was made."""

    at: dict[str, int]  # by axis letter
    plan: Plan
    pictures: dict[int, Made] = field(default_factory=dict)  # by number of the seed


def axes_of(options: Grid) -> dict[str, Axis]:
    """The axes asked for, by letter. Raises UserError for a name or value that cannot be, and for one name twice."""
    found = {k: parse_axis(k, text) for k in ("x", "y", "z") if (text := getattr(options, k)) is not None}
    names = [axis.name for axis in found.values()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two axes change {name}: give it to one")
    return found


def parse_axis(letter: str, text: str) -> Axis:
    """An axis from NAME=VALUES."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    name = ALIASES.get(name.lower(), name)
    if not equals or not values.strip():
        raise UserError(f"--{letter} {text}: expected a setting and its values, say --{letter} steps=10,20,40")
    if name == "seed":
        return Axis(name, list(seeds_of(values, letter)))
    if name == "lora" or name.startswith("lora:"):
        return Axis(name, list(numbers(values, letter)))
    if name in ("prompt", "model"):
        return Axis(name, list(_texts(values)))
    kinds = _kinds()
    if name not in kinds:
        known = (*kinds, *OTHERS)
        raise UserError(f"--{letter} {text}: no setting {name!r}: {did_you_mean(name, known)}"
                        f"expected one of {', '.join(known)}")  # fmt: skip
    return Axis(name, _values(kinds[name], values, f"--{letter} {text}", letter))


def _kinds() -> dict[str, type]:
    """Settings of a picture that one value says, and the type of it."""
    from dodgeburn.sampling.settings import GenerateSettings

    out: dict[str, type] = {}
    for name, hint in get_type_hints(GenerateSettings).items():
        plain = [t for t in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]) if t]
        kind = next((t for t in plain if t is not type(None)), None)
        if name in GenerateSettings.model_fields and kind in (int, float, str, bool):
            out[name] = kind
    return out


def _values(kind: type, text: str, said: str, letter: str) -> list[Value]:
    if kind is str:
        return list(_texts(text))
    if kind is bool:
        named = {"true": True, "false": False, "yes": True, "no": False}
        if any(part.lower() not in named for part in _texts(text)):
            raise UserError(f"{said}: expected true,false")
        return [named[part.lower()] for part in _texts(text)]
    if ".." in text:
        found: list[float | None] = list(numbers(text, letter))
    else:
        found = [None if part.lower() == "none" else numbers(part, letter)[0] for part in _texts(text)]
    if kind is int:
        if any(x is not None and x != int(x) for x in found):
            raise UserError(f"{said}: expected whole numbers")
        return [None if x is None else int(x) for x in found]
    return list(found)


def _texts(text: str) -> list[str]:
    """Texts separated by commas; quoted ("a, b") where they have commas themselves."""
    found = [part.strip() for part in next(csv.reader([text], skipinitialspace=True))]
    return found


def cells_of(options: Generate, axes: dict[str, Axis], given: frozenset[str]) -> list[Cell]:
    """All combinations, z slowest, each with its plan. given: as in `plan_of`. UserError for what cannot be."""
    sizes = [range(len(axes[k].values)) if k in axes else range(1) for k in ("z", "y", "x")]
    out = []
    for z, y, x in itertools.product(*sizes):
        at = {"x": x, "y": y, "z": z}
        out.append(Cell(at, _plan(options, given, [(axis.name, axis.values, at[k]) for k, axis in axes.items()])))
    count = sum(len(cell.plan.seeds) for cell in out)
    if count > MOST_PICTURES:
        raise UserError(
            f"the grid has {count} pictures: {MOST_PICTURES} are the most, take fewer values or a smaller -n"
        )
    named = {path for cell in out for path in cell.plan.embeddings}
    check_named(options.embeddings.embedding, named, out[0].plan.settings.prompt_syntax)
    return out


def _plan(options: Generate, given: frozenset[str], chosen: Sequence[tuple[str, list[Value], int]]) -> Plan:
    """The plan of one combination: (setting, all its values, which)."""
    from dodgeburn.cli.generate_plan import plan_of

    by_name = {name: values[i] for name, values, i in chosen}
    asked = replace(options)
    for name, values, i in chosen:
        if name == "prompt":
            prompt = _prompt(asked)
            if str(values[0]) not in prompt:
                raise UserError(f"prompt={values[0]}: the prompt {prompt!r} has no such words to replace")
            asked = replace(asked, prompt=prompt.replace(str(values[0]), str(values[i])))
        if name == "model":
            asked = replace(asked, model=str(values[i]))
    kinds = _kinds()
    plan = plan_of(asked, given, {name: value for name, value in by_name.items() if name in kinds})
    if plan.row is not None:  # a picture's place in its batch, which a grid doesn't keep
        plan.seeds, plan.row, plan.batch_size = plan.seeds[:1], None, options.batch_size
    if "seed" in by_name:
        plan.seeds = [int(str(by_name["seed"])) + i for i in range(len(plan.seeds))]
    for name, value in by_name.items():
        if name == "lora" or name.startswith("lora:"):
            _scale(plan, name.partition(":")[2], float(str(value)))
    return plan


def _prompt(options: Generate) -> str:
    from dodgeburn.sampling.reproduce import request_of

    if options.prompt is not None:
        return options.prompt
    if options.source is None:
        raise UserError("no prompt: give one, or a picture to take it from with --from PICTURE")
    return request_of(options.source).prompt


def _scale(plan: Plan, wanted: str, scale: float) -> None:
    """Another scale for the LoRA of that name ("": the only one)."""
    names = [use.name for _, use in plan.loras]
    if (not wanted and len(names) != 1) or (wanted and wanted not in names):
        there = (
            f"there are {', '.join(names)}: say lora:{names[0]}=…" if names else "there is none: give it with --lora"
        )
        raise UserError(f"lora{':' * bool(wanted)}{wanted}: {there}")
    chosen = wanted or names[0]
    plan.loras = [(path, replace(use, scale=scale) if use.name == chosen else use) for path, use in plan.loras]


def run(options: Generate, axes: dict[str, Axis], cells: Sequence[Cell]) -> dict[str, Any]:
    """Make all pictures and sheets; what the JSON says of them.

    Each model is loaded once, and cells of the same settings are drawn in common batches.
    """
    from tqdm import tqdm

    from dodgeburn.cli.generate_plan import read_embeddings, tell_source
    from dodgeburn.cli.loras import apply
    from dodgeburn.models.loading import load_model
    from dodgeburn.sampling.loop import planned, stream
    from dodgeburn.sampling.saving import infotext_of, record_of, save_picture

    began, written, model = time.perf_counter(), 0, None
    total = sum(len(cell.plan.seeds) * cell.plan.settings.steps for cell in cells)
    bar = tqdm(total=total, unit="step", disable=None, file=sys.stderr, leave=False)
    with new_folder(options.out), bar:
        loaded = beside = tuned = None
        told = not any(axis.name.startswith("lora") for axis in axes.values())
        for number, group in enumerate(_groups(cells)):
            plan = group[0].plan
            if model is None or loaded != (plan.model, plan.dtype):
                model = load_model(plan.model, options.device, plan.dtype, options.tokenizer)
                loaded = plan.model, plan.dtype
                tell_source(plan, model)
            if plan.tuned is not None and beside != (plan.tuned, plan.dtype):  # every picture keeps hold of its own
                tuned = plan.tuned.load(options.device, plan.dtype, options.tokenizer)
                beside = plan.tuned, plan.dtype
            read_embeddings(plan, [model, None if tuned is None else tuned.model], not number)
            places = [(cell, i) for cell in group for i in range(len(cell.plan.seeds))]
            prompts = [cell.plan.prompts[i] for cell, i in places]
            seeds = [cell.plan.seeds[i] for cell, i in places]
            adapters = apply(plan.loras, options.lora_blocks, model, told and not number)
            there = set()
            for one in planned(model, prompts, seeds, plan.settings, adapters, tuned) if options.resume else ():
                cell, i = places[one.index]
                path = picture_path(options.out, cell.plan.prompt, options.format, one, model)
                if (before := made_before(path, one, model)) is not None:
                    cell.pictures[i] = Made(before, path, infotext_of(before, model), record_of(before, model))
                    there.add(one.index)
                    bar.update(plan.settings.steps)
            found = stream(
                model, prompts, seeds, plan.settings, lambda step: bar.update(len(step.indices)), plan.batch_size,
                adapters=adapters, tuned=tuned, there=there,
            )  # fmt: skip
            for picture in found:
                cell, i = places[picture.index]
                path = picture_path(options.out, cell.plan.prompt, options.format, picture, model)
                save_picture(path, picture, model)
                cell.pictures[i] = Made(picture, path, infotext_of(picture, model), record_of(picture, model))
                written += 1
    rows = [
        {"path": str(made.path), "prompt": made.picture.prompt, "seed": made.picture.seed,
         "model": made.record["model"], "settings": made.picture.settings.model_dump(),
         "loras": {use.name: use.scale for use in made.picture.adapters},
         **{k: axis.values[cell.at[k]] for k, axis in axes.items()}}
        for cell in cells for _, made in sorted(cell.pictures.items(), key=lambda item: item[0])
    ]  # fmt: skip
    sheets = [str(_write(options, axes, cells, z, i)) for z, i in (_sheets(axes, cells) if options.sheet else ())]
    return {
        "pictures": rows, "sheets": sheets, "sheet": sheets[0] if sheets else None,
        "axes": {k: {"name": axis.name, "values": axis.values} for k, axis in axes.items()},
        "not_honoured": cells[0].plan.not_honoured, "kept": len(rows) - written,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that one call can draw, those of a model one after another: loading is what takes longest."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        plan = cell.plan
        key = (plan.model, plan.dtype, repr(plan.settings), repr(plan.loras), repr(plan.tuned), plan.batch_size,
               repr(plan.embeddings))  # fmt: skip
        found.setdefault(key, []).append(cell)
    order = list(dict.fromkeys(key[:2] for key in found))
    return [found[key] for key in sorted(found, key=lambda key: order.index(key[:2]))]


def _sheets(axes: dict[str, Axis], cells: Sequence[Cell]) -> Iterator[tuple[int, int]]:
    """(position on z, number of the seed) of each sheet."""
    most = max(len(cell.plan.seeds) for cell in cells)
    yield from itertools.product(range(len(axes["z"].values) if "z" in axes else 1), range(most))


def _write(options: Generate, axes: dict[str, Axis], cells: Sequence[Cell], z: int, number: int) -> Path:
    """One sheet; its path."""
    from dodgeburn.images.png import write_picture
    from dodgeburn.images.sheet import contact_sheet

    labels = {k: [axes[k].label(i) for i in range(len(axes[k].values))] if k in axes else None for k in ("x", "y")}
    rows: list[list[Image.Image | None]] = []
    shown = [cell for cell in cells if cell.at["z"] == z]
    for y in range(len(labels["y"] or [""])):
        row = sorted((cell for cell in shown if cell.at["y"] == y), key=lambda cell: cell.at["x"])
        rows.append([cell.pictures[number].picture.image if number in cell.pictures else None for cell in row])
    made = next(cell.pictures[number] for cell in shown if number in cell.pictures)
    first = made.picture
    title = [first.prompt] if not any(axis.name == "prompt" for axis in axes.values()) else []
    title += [axes["z"].label(z)] if "z" in axes else []
    title += [f"seed {first.seed}"] if not any(axis.name == "seed" for axis in axes.values()) else []
    sheet = contact_sheet(rows, labels["y"], labels["x"], " · ".join(title))
    record = {**made.record, "grid": {k: [axis.name, *axis.values] for k, axis in axes.items()}}
    path = free_name(options.out, f"{slug(first.prompt)}-grid", options.format, record)
    write_picture(path, sheet, made.infotext, record)
    return path
