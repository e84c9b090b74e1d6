"""Contact sheets of a comparison: a few variants between A and B on each, as PNG files and in the report."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.checkpoint.tensorfile import write_atomic
from dodgeburn.images.png import png_bytes
from dodgeburn.images.sheet import contact_sheet
from dodgeburn.measure.report import Report
from dodgeburn.merge.compare import PARENTS, Comparison
from dodgeburn.merge.compare_pictures import about_merge
from dodgeburn.merge.variants import FOUND, Variant

COLUMNS_A_SHEET = 8  # variants beside A and B: ten pictures of 64 pixels, each drawn twice as large, fill a screen
WIDEST = 20  # letters that fit over one
CELL = 144  # pixels a picture has in the PNG sheets, at least


def shown_settings(result: Comparison) -> dict[str, Any]:
    """The settings as plain values, without local folders."""
    described = [{"name": v.name, **about_merge(v)} for v in result.settings.variants]
    return {**result.settings.model_dump(mode="json"), "variants": described}


def sheet_groups(result: Comparison) -> list[tuple[str, list[str]]]:
    """(title, names of its variants) of every contact sheet: method by method and base by base, a few presets on each,
    as in the settings; described variants and found ones last.
    """
    together: dict[str, list[str]] = {}
    described = {variant.name for variant in result.settings.variants}
    plain = all(row.method in (None, "weighted_sum") for row in result.rows)
    for variant in result.variants.values():
        title = f"base {variant.base:g}" if plain else f"{variant.choice}, base {variant.base:g}"
        if variant.name in described:
            title = "described variants"
        elif variant.name.startswith(FOUND):
            title = "found by search"
        elif variant.merge.preset is None:
            title = "no preset"
        together.setdefault(title, []).append(variant.name)
    groups = []
    for title, names in together.items():
        for start in range(0, len(names), COLUMNS_A_SHEET):
            part = names[start : start + COLUMNS_A_SHEET]
            labels = [label(result.variants[name]) for name in (part[0], part[-1])]
            groups.append((f"{title}: {' to '.join(dict.fromkeys(labels))}", part))
    return groups


def label(variant: Variant) -> str:
    """A variant's name in a sheet whose title says method and base."""
    preset = variant.merge.preset
    return preset if preset and variant.name.endswith(f"{preset}-{variant.base:g}") else variant.name


def _first_seed(result: Comparison, name: str) -> np.ndarray:
    same = next((row.same_as for row in result.rows if row.name == name), None)
    return result.pictures(same or name)[:, 0]


def write_sheets(result: Comparison) -> list[str]:
    """Write all sheets as PNG files into the comparison's folder; their paths."""
    (result.folder / "sheets").mkdir(exist_ok=True)
    written = []
    parents = {name: _first_seed(result, name) for name in PARENTS}
    for number, (title, names) in enumerate(sheet_groups(result), 1):
        columns = [parents["A"], *(_first_seed(result, name) for name in names), parents["B"]]
        rows: list[list[Image.Image | None]] = [
            [Image.fromarray(column[r]) for column in columns] for r in range(len(result.settings.prompts))
        ]
        labels = [
            "A: " + result.a["name"],
            *(_spaced(label(result.variants[name])) for name in names),
            "B: " + result.b["name"],
        ]
        image = contact_sheet(
            rows, list(result.settings.prompts), labels, f"{title}, seed {result.settings.seeds[0]}",
            cell=max(CELL, *columns[0].shape[1:3]),
        )  # fmt: skip
        path = result.folder / "sheets" / f"{number:02d}.png"
        about = {"sheet": title, "seed": result.settings.seeds[0], "a": result.a, "b": result.b,
                 **shown_settings(result)}  # fmt: skip
        write_atomic(path, png_bytes(image, own=about))
        written.append(str(path))
    return written


def _spaced(label: str) -> str:
    """TrueReverseCubicHermite -> True Reverse Cubic Hermite, so that it can be wrapped; what fits stays as the options
    spell it."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", w) if len(w) > WIDEST else w for w in label.split(" "))


def add_sheets(report: Report, result: Comparison) -> None:
    """All sheets as a section of the report, the first one open."""
    prompts = list(result.settings.prompts)
    parents = {name: _first_seed(result, name) for name in PARENTS}
    report.text(
        f"One row a prompt, the same seed ({result.settings.seeds[0]}) in every picture. A, the base of the merges, "
        "stands first, B last.",
        note=True,
    )
    for number, (title, names) in enumerate(sheet_groups(result)):
        columns = [parents["A"], *(_first_seed(result, name) for name in names), parents["B"]]
        labels = [
            f"A {result.a['name']}", *(label(result.variants[name]) for name in names), f"B {result.b['name']}"
        ]  # fmt: skip
        if number == 0:
            report.heading(title, 3)
        report.sheet(
            [[column[r] for column in columns] for r in range(len(prompts))], prompts, labels,
            parents=(labels[0], labels[-1]), summary=None if number == 0 else title,
        )  # fmt: skip
