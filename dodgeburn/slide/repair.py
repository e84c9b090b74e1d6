"""Repair sliders: the share of waving hands with five fingers before and after, and drawings to learn it from.

A hand has the right number of fingers or not, so nothing here is measured in deviations: a repair slider has no unit,
and 1.0 is what training made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.checkpoint.slider_card import Certificate
from dodgeburn.measure.intervals import Interval, bootstrap_mean
from dodgeburn.pocket.attributes import FINGER_COUNTS, draw_attributes
from dodgeburn.pocket.reader import Readings
from dodgeburn.pocket.world import render
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.evaluate import number
from dodgeburn.slide.readings import FINGERS, ReadsPictures, sweep_rows
from dodgeburn.slide.splits import Split

FIVE = 5
WRONG = tuple(n for n in FINGER_COUNTS if n != FIVE)


def shows_five(readings: Readings) -> np.ndarray:
    """1 where a hand with five fingers is read, else 0: float64 [n]. Unreadable, or without a hand, is a failure."""
    return ((np.asarray(readings.values[FINGERS]) == FIVE) & ~np.asarray(readings.unreadable)).astype(np.float64)


def five_fingers(
    edit: Edit, reader: ReadsPictures, prompts: Sequence[str], seeds: Sequence[int], scale: float
) -> np.ndarray:
    """`shows_five` of every prompt (which should ask for a waving hand) with every seed: float64 [prompts, seeds]."""
    found = reader.read(edit.pictures(*sweep_rows(prompts, seeds, [scale])))
    return shows_five(found).reshape(len(prompts), len(seeds))


@dataclass(frozen=True)
class Repair:
    """What a repair slider does to hands."""

    name: str
    reader: str
    split: Split
    by_scale: dict[float, np.ndarray]  # `five_fingers` at rising scales, 0 and 1 among them
    off_class: Interval | None = None  # slide/off_class.py

    @property
    def figures(self) -> dict[str, Interval]:
        """By name; the gain is picture by picture, so its interval is the narrower one."""
        before, after = self.by_scale[0.0], self.by_scale[1.0]
        found = {
            "five_fingers_before": bootstrap_mean(before, shares=True),
            "five_fingers_after": bootstrap_mean(after, shares=True),
            "five_fingers_gain": bootstrap_mean(after - before),
        }
        return found if self.off_class is None else found | {"off_class_effect": self.off_class}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 %, by name."""
        ends = {name: found.ends for name, found in self.figures.items()}
        return {name: (round(two[0], 4), round(two[1], 4)) for name, two in ends.items() if two is not None}


def evaluate_repair(
    edit: Edit, split: Split, reader: ReadsPictures, reader_name: str = "judge", name: str = "",
    scales: Sequence[float] = (), off_class: Interval | None = None,
) -> Repair:  # fmt: skip
    """Count fingers at scales 0 and 1, and at further `scales`, on prompts that ask for a waving hand."""
    rising = sorted({0.0, 1.0, *map(float, scales)})
    found = {scale: five_fingers(edit, reader, split.prompts, split.seeds, scale) for scale in rising}
    return Repair(name, reader_name, split, found, off_class)


def as_json(found: Repair) -> dict[str, Any]:
    """As JSON values: figures by name, `intervals` by the same names, `curve` of (scale, share with five fingers)."""
    return {
        "name": found.name, "attribute": FINGERS, "reader": found.reader, "prompts": len(found.split.prompts),
        "seeds": len(found.split.seeds), "prompts_sha256": found.split.sha256, "off_class_effect": None,
        **{name: number(figure.mean) for name, figure in found.figures.items()},
        "curve": [[scale, number(float(grid.mean()))] for scale, grid in found.by_scale.items()],
        "intervals": {name: list(ends) for name, ends in found.intervals.items()},
    }  # fmt: skip


def summary(found: Repair) -> str:
    """A few lines for the terminal."""

    def said(name: str, pattern: str = ".1%") -> str:
        ends = found.intervals.get(name)
        between = f" [{ends[0]:{pattern}}, {ends[1]:{pattern}}]" if ends else ""
        return f"{found.figures[name].mean:{pattern}}{between}"

    lines = [
        f"{found.name or 'slider'}: {FINGERS}, {len(found.split.prompts)} prompts x {len(found.split.seeds)} seeds, "
        f"read by the {found.reader}",
        f"  waving hands with five fingers: {said('five_fingers_before')} before, {said('five_fingers_after')} at 1.0; "
        f"gain {said('five_fingers_gain', '+.1%')}",
    ]
    if len(found.by_scale) > 2:
        shares = (f"{scale:g}: {grid.mean():.1%}" for scale, grid in found.by_scale.items())
        lines.append("  by scale: " + ", ".join(shares))
    if found.off_class is not None:
        lines.append(f"  off-class effect {said('off_class_effect', '.2f')}")
    return "\n".join(lines)


def certificate_of(found: Repair) -> Certificate:
    """What is to stand in the slider's file."""
    figures: dict[str, Any] = {name: number(figure.mean) for name, figure in found.figures.items()}
    return Certificate(
        reader=found.reader, n=len(found.split.prompts) * len(found.split.seeds), seeds=found.split.seeds,
        prompts_sha256=found.split.sha256, intervals=found.intervals, **figures,
    )  # fmt: skip


def draw_hand_pairs(folder: Path, pairs: int) -> None:
    """`pairs` drawings of waving people with 3, 4, 6 or 7 fingers (folder/before), and the same with 5 (after)."""
    seed = 0
    for i in range(pairs):
        while (a := draw_attributes(np.random.default_rng([77, seed]), ()))["hand"] != "waving":
            seed += 1
        seed += 1
        for side, fingers in (("before", WRONG[i % len(WRONG)]), ("after", FIVE)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(render({**a, FINGERS: fingers}, 64)).save(folder / side / f"{i}.png")
