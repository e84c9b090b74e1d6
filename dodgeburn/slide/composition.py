"""Sliders at once: does each still do what it does alone?

Every combination of m sliders is drawn at scales +1 and -1 in all 2^m patterns of signs, one after the other over
prompts and seeds, and compared with each slider alone at the same scale, prompt and seed.

*Kept*: a combination is kept on a prompt if every slider in it moves its own attribute, averaged over the prompt's
seeds, in the asked direction and at least half as far as it does alone. An unreadable picture counts as no move. The
stricter share by picture asks that of every single picture, against half of the slider's mean move alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from dodgeburn.measure.intervals import Interval, bootstrap_mean
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.model import Model
from dodgeburn.sampling.adapted import ALWAYS, Applied
from dodgeburn.slide.edits import AdapterEdit, Unedited, draw
from dodgeburn.slide.readings import ReadsPictures, sweep_rows, values_of
from dodgeburn.slide.splits import Split

LEAST_SHARE = 0.5  # of its own move alone that a slider must still make in company


@dataclass(frozen=True)
class Member:
    """A calibrated slider in a composition."""

    adapter: Adapter
    target: str
    start: float = ALWAYS


@dataclass(frozen=True)
class Kept:
    """Shares of combinations of one size that are kept."""

    prompts: Interval  # over prompts and combinations
    pictures: Interval  # the stricter one
    by_combination: dict[str, float]  # "smile + age" -> share of prompts


def patterns(size: int, prompts: int, seeds: int) -> np.ndarray:
    """Signs [prompts, seeds, size]: all 2^size patterns in turn, beginning one further on each prompt."""
    signs = np.array(list(product((1.0, -1.0), repeat=size)))
    rows = np.arange(prompts)[:, None] + np.arange(seeds)[None, :]
    return signs[rows % len(signs)]


def asked_moves(read: np.ndarray, plain: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """How far pictures moved in the asked direction [prompts, seeds]: sign x (reading - unedited), 0 if unreadable."""
    return np.nan_to_num(signs * (read - plain), nan=0.0)


def kept_by_prompt(composed: np.ndarray, single: np.ndarray) -> np.ndarray:
    """Asked moves [prompts, seeds, members] in company and alone -> bool [prompts]."""
    mine, alone = composed.mean(1), single.mean(1)
    return ((alone > 0) & (mine >= LEAST_SHARE * alone)).all(-1)


def kept_by_picture(composed: np.ndarray, single: np.ndarray) -> np.ndarray:
    """The same for every picture, against the mean move alone: bool [prompts, seeds]."""
    alone = single.mean((0, 1))
    return ((alone > 0) & (composed >= LEAST_SHARE * alone)).all(-1)


def kept(
    model: Model, members: Sequence[Member], size: int, split: Split, reader: ReadsPictures, unedited: Unedited,
    alone: Mapping[int, np.ndarray] | None = None,
) -> Kept:  # fmt: skip
    """Draw, read and judge all combinations of `size` members.

    alone: `read_alone` of every member by its index, to be shared by pairs and triples; read anew if None.
    """
    alone = alone or read_alone(model, members, split, reader, unedited)
    shape = (len(split.prompts), len(split.seeds))
    prompts, seeds, _ = sweep_rows(split.prompts, split.seeds, [0.0])
    signs = patterns(size, *shape)
    by_prompt, by_picture, named = [], [], {}
    for chosen in combinations(range(len(members)), size):
        applied = [
            Applied(members[i].adapter, signs[:, :, at].ravel().tolist(), members[i].start)
            for at, i in enumerate(chosen)
        ]
        made = draw(model, prompts, seeds, unedited.settings, applied, unedited.batch_size, unedited.progress)
        together, single = [], []
        found = reader.read(made)
        for at, i in enumerate(chosen):
            read = values_of(found, members[i].target).reshape(shape)
            minus, plain, plus = np.moveaxis(alone[i], 2, 0)
            sign = signs[:, :, at]
            together.append(asked_moves(read, plain, sign))
            single.append(asked_moves(np.where(sign > 0, plus, minus), plain, sign))
        composed, lone = np.stack(together, 2), np.stack(single, 2)
        by_prompt.append(kept_by_prompt(composed, lone).astype(float))
        by_picture.append(kept_by_picture(composed, lone).astype(float))
        named[" + ".join(members[i].adapter.name for i in chosen)] = float(by_prompt[-1].mean())
    return Kept(
        prompts=bootstrap_mean(np.stack(by_prompt, 1), shares=True),
        pictures=bootstrap_mean(np.concatenate(by_picture, 1), shares=True),
        by_combination=named,
    )


def read_alone(
    model: Model, members: Sequence[Member], split: Split, reader: ReadsPictures, unedited: Unedited
) -> dict[int, np.ndarray]:
    """Each member's own attribute at scales -1, 0 and 1: float64 [prompts, seeds, 3], NaN where unreadable."""
    rows = sweep_rows(split.prompts, split.seeds, [-1.0, 0.0, 1.0])
    shape = (len(split.prompts), len(split.seeds), 3)
    out = {}
    for i, member in enumerate(members):
        edit = AdapterEdit(model, member.adapter, member.start, unedited=unedited)
        out[i] = values_of(reader.read(edit.pictures(*rows)), member.target).reshape(shape)
    return out
