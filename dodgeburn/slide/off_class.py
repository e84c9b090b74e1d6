"""What a slider does where its subject is absent: a slider for doctors should leave gardeners in peace.

The subject is what the card's target prompt asks for ("a doctor": the outfit), but for the slider's own attribute. The
pocket's every picture shows a person, so a slider for "a person" has no prompts without its subject, unless they are
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dodgeburn.measure.distances import pixel_distance
from dodgeburn.measure.intervals import Interval, bootstrap_ratio
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.slide.edits import Edit
from dodgeburn.slide.measures import off_class_effect
from dodgeburn.slide.readings import FINGERS, sweep_rows
from dodgeburn.slide.splits import Split, gate_rows, shows

MOST_PROMPTS = 8  # of either kind: pixel distances vary little from picture to picture


@dataclass(frozen=True)
class Sides:
    """Prompts with a slider's subject and without it."""

    own: list[str]
    off: list[str]
    seeds: list[int]


def subject_of(card_target: str, attribute: str) -> Asked:
    """What the pictures a slider is for show; {} where that is every picture ("a person")."""
    own = attribute.partition("=")[0]
    found = {name: asked for name, asked in parse(card_target).items() if name != own}
    return found | {"hand": "waving"} if attribute == FINGERS else found


def sides_of(card_target: str, attribute: str, split: Split, given: Sequence[str] = ()) -> Sides | None:
    """Held-out prompts that name the subject, and some that name another in its place; `MOST_PROMPTS` at most.

    Prompts name nothing of the slider's attribute (of one for fingers there is nothing to name). given: prompts without
    the subject instead, all of them; a subject that every picture shows then has the split's prompts. None where there
    are no prompts of either kind.
    """
    subject, n = subject_of(card_target, attribute), min(MOST_PROMPTS, len(split.prompts))
    if not subject:
        return Sides(split.prompts[:n], list(given), split.seeds) if given else None
    name = attribute.partition("=")[0]
    rows = [prompt for prompt in gate_rows() if name not in parse(prompt)]
    own = [prompt for prompt in rows if shows(prompt, subject) is True][:n]
    off = list(given) or [prompt for prompt in rows if shows(prompt, subject) is False][:n]
    return Sides(own, off, split.seeds) if own and off else None


def measure_off_class(edit: Edit, sides: Sides, scales: Sequence[float] = (-1.0, 1.0)) -> Interval:
    """`measures.off_class_effect` with its 95 % interval over prompts and seeds: pixel distances to the unedited
    pictures, averaged over the scales. NaN if the edit does nothing to its own subject.
    """
    off, own = (_distances(edit, prompts, sides.seeds, scales) for prompts in (sides.off, sides.own))
    found = bootstrap_ratio(off, own)
    return found._replace(mean=off_class_effect(off, own))


def _distances(edit: Edit, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float]) -> np.ndarray:
    """Mean over the scales of each picture's distance to the unedited one: float64 [prompts, seeds]."""
    pictures = edit.pictures(*sweep_rows(prompts, seeds, [0.0, *scales]))
    by_row = pictures.reshape(-1, 1 + len(scales), *pictures.shape[1:])
    found = [pixel_distance(by_row[:, k], by_row[:, 0]) for k in range(1, by_row.shape[1])]
    return np.mean(found, axis=0).reshape(len(prompts), len(seeds))
