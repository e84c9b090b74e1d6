"""Sliders looked at: strips over the scale, grids over two sliders, compositions slider by slider, animations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.checkpoint.atomic import write_atomic
from dodgeburn.errors import UserError
from dodgeburn.images.png import DESCRIPTION_TAG, OWN_MARK
from dodgeburn.images.sheet import contact_sheet
from dodgeburn.sampling.adapted import Applied
from dodgeburn.slide.edits import Unedited, draw
from dodgeburn.slide.readings import FINGERS, ReadsPictures, values_of
from dodgeburn.slide.slider_file import Slider

LARGEST_SWEEP = 2000  # pictures: beyond it a sheet is no sheet


@dataclass(frozen=True)
class Cell:
    """One picture to make: a scale for every slider."""

    prompt: str
    seed: int
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """A sheet of cells with its labels."""

    title: str
    rows: list[list[Cell]]
    row_labels: list[str]
    column_labels: list[str]
    shown: list[list[tuple[int, ...]]]  # by cell: the sliders whose attribute is read under the picture


def strips(sliders: Sequence[Slider], prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float]) -> Plan:
    """A row for every slider, prompt and seed; a column for every scale."""
    rows, labels = [], []
    shown: list[list[tuple[int, ...]]] = []
    for at, slider in enumerate(sliders):
        for prompt in prompts:
            for seed in seeds:
                zeros = [0.0] * len(sliders)
                rows.append([Cell(prompt, seed, tuple([*zeros[:at], s, *zeros[at + 1 :]])) for s in scales])
                names = [slider.name] if len(sliders) > 1 else []
                names += [prompt] if len(prompts) > 1 else []
                labels.append("\n".join([*names, f"seed {seed}"]))
                shown.append([(at,)] * len(scales))
    names = [", ".join(slider.name for slider in sliders), *(prompts if len(prompts) == 1 else [])]
    return Plan(": ".join(names), rows, labels, [_signed(s) for s in scales], shown)


def grids(sliders: Sequence[Slider], prompt: str, seed: int, scales: Sequence[float]) -> Plan:
    """Two sliders against each other: the first along the columns, the second down the rows."""
    if len(sliders) != 2:
        raise UserError(f"a grid is over two sliders, not {len(sliders)}")
    rows = [[Cell(prompt, seed, (across, down)) for across in scales] for down in scales]
    return Plan(
        f"{prompt}, seed {seed}", rows, [f"{sliders[1].name} {_signed(s)}" for s in scales],
        [f"{sliders[0].name} {_signed(s)}" for s in scales], [[(0, 1)] * len(scales)] * len(scales),
    )  # fmt: skip


def _signed(scale: float) -> str:
    return f"{scale:+g}" if scale else "0"


def progressive(sliders: Sequence[Slider], prompts: Sequence[str], seeds: Sequence[int],
                scales: Sequence[float]) -> Plan:  # fmt: skip
    """From nothing to all sliders, one more at each column; a scale for each slider."""
    if len(scales) != len(sliders):
        raise UserError(f"{len(scales)} scales for {len(sliders)} sliders: a composition needs one each")
    zeros = [0.0] * len(sliders)
    steps = [tuple([*scales[:n], *zeros[n:]]) for n in range(len(sliders) + 1)]
    rows, labels = [], []
    for prompt in prompts:
        for seed in seeds:
            rows.append([Cell(prompt, seed, step) for step in steps])
            labels.append("\n".join([*([prompt] if len(prompts) > 1 else []), f"seed {seed}"]))
    columns = ["none", *(f"+ {slider.name} {s:+g}" for slider, s in zip(sliders, scales, strict=True))]
    everyone = tuple(range(len(sliders)))
    shown = [[everyone] * len(steps)] * len(rows)
    return Plan(prompts[0] if len(prompts) == 1 else "composition", rows, labels, columns, shown)


def make_pictures(sliders: Sequence[Slider], plan: Plan, unedited: Unedited) -> list[list[np.ndarray]]:
    """The plan's pictures, each different one made once: uint8 [h, w, 3] by row. UserError if there are too many."""
    cells = list(dict.fromkeys(cell for row in plan.rows for cell in row))
    if len(cells) > LARGEST_SWEEP:
        raise UserError(f"{len(cells)} pictures: {LARGEST_SWEEP} at most, take fewer scales, prompts or seeds")
    plain = [cell for cell in cells if not any(cell.scales)]
    edited = [cell for cell in cells if any(cell.scales)]
    made: dict[Cell, np.ndarray] = {}
    if plain:
        made |= dict(zip(plain, unedited.pictures([c.prompt for c in plain], [c.seed for c in plain]), strict=True))
    if edited:
        applied = [Applied(s.adapter, [cell.scales[i] for cell in edited], s.start) for i, s in enumerate(sliders)]
        pictures = draw(unedited.model, [c.prompt for c in edited], [c.seed for c in edited], unedited.settings,
                        applied, unedited.batch_size, unedited.progress)  # fmt: skip
        made |= dict(zip(edited, pictures, strict=True))
    return [[made[cell] for cell in row] for row in plan.rows]


def read_values(sliders: Sequence[Slider], pictures: list[list[np.ndarray]], reader: ReadsPictures
                ) -> list[list[dict[str, float | None]]]:  # fmt: skip
    """What is read of every slider's attribute in every picture; None where it is unreadable."""
    flat = reader.read(np.stack([picture for row in pictures for picture in row]))
    targets = list(dict.fromkeys(slider.card.attribute for slider in sliders if slider.card.attribute))
    columns = {target: values_of(flat, target) for target in targets}
    cells = [
        {target: None if np.isnan(column[i]) else round(float(column[i]), 4) for target, column in columns.items()}
        for i in range(len(flat))
    ]
    found = iter(cells)
    return [[next(found) for _ in row] for row in pictures]


def sheet(sliders: Sequence[Slider], plan: Plan, pictures: list[list[np.ndarray]],
          values: list[list[dict[str, float | None]]] | None, cell: int | None = None) -> Image.Image:  # fmt: skip
    """The plan as a labelled sheet; with values, those of the row's sliders under each picture."""
    captions = None
    if values is not None:
        captions = [
            [_caption(sliders, which, found) for which, found in zip(shown, row, strict=True)]
            for shown, row in zip(plan.shown, values, strict=True)
        ]
    images = [[Image.fromarray(picture) for picture in row] for row in pictures]
    return contact_sheet(images, plan.row_labels, plan.column_labels, plan.title, cell, captions=captions)


def _caption(sliders: Sequence[Slider], which: tuple[int, ...], found: dict[str, float | None]) -> str:
    said = []
    for i in which:
        target = sliders[i].card.attribute
        if target:
            value = found[target]
            said.append(f"{target} {_value(target, value)}")
    return "\n".join(dict.fromkeys(said))


def _value(target: str, value: float | None) -> str:
    if value is None:
        return "unreadable"
    return f"{value:.0f}" if target == FINGERS else f"{value:.2f}"


def animation(plan: Plan, pictures: list[list[np.ndarray]], cell: int | None = None) -> list[Image.Image]:
    """Frames along the columns and back, each with all rows' pictures and the column's label."""
    across = math.ceil(math.sqrt(len(pictures)))
    frames = []
    for c, label in enumerate(plan.column_labels):
        images: list[Image.Image | None] = [Image.fromarray(row[c]) for row in pictures]
        frames.append(contact_sheet([images[i : i + across] for i in range(0, len(images), across)], title=label,
                                    cell=cell))  # fmt: skip
    return frames + frames[-2:0:-1]


def write_animation(path: str | Path, frames: Sequence[Image.Image], milliseconds: int, record: dict[str, Any]) -> None:
    """Write frames as an endless GIF or WebP by the ending, atomically, with the record as GIF comment or EXIF.

    Raises UserError for another ending.
    """
    exif = Image.Exif()
    exif[DESCRIPTION_TAG] = OWN_MARK + json.dumps(record, sort_keys=True)
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        ".gif": ("GIF", {"comment": exif[DESCRIPTION_TAG].encode(), "disposal": 1}),
        ".webp": ("WEBP", {"quality": 90, "exif": exif}),
    }
    kind, options = kinds.get(Path(path).suffix.lower(), ("", {}))
    if not kind:
        raise UserError(f"{path}: animations are written as {', '.join(kinds)}")
    buffer = BytesIO()
    first, *rest = frames
    first.save(buffer, kind, save_all=True, append_images=rest, duration=milliseconds, loop=0, **options)
    write_atomic(path, buffer.getvalue())
