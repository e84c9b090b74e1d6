"""Which prompts and seeds calibrate a slider and which ones judge it; training uses neither.

Calibration and unmixing: captions of the development list. Evaluation: the gate's held-out prompts. All leave the
sliders' attributes open: where a prompt names one, the prompt holds it in place. The three jobs' seeds are far apart.

The few pictures that end a training are shipped by attribute: pictures respond differently, and so few of them, taken
as they come, say a tenth or two too much or too little (`benchmarks/calibration_rows.py` chooses them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dodgeburn.errors import UserError
from dodgeburn.pocket.captions import Asked, parse
from dodgeburn.pocket.model import WEIGHTS
from dodgeburn.slide.readings import attribute_of

FIRST_CALIBRATION_SEED = 7_000
FIRST_EVALUATION_SEED = 2_000_000
CALIBRATION_ROWS = WEIGHTS / "calibration.json"


@dataclass(frozen=True)
class Split:
    """Prompts and seeds; every prompt is drawn with every seed."""

    prompts: list[str]
    seeds: list[int]

    @property
    def sha256(self) -> str:
        """Of the prompts, in order."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()

    def first(self, prompts: int, seeds: int) -> Split:
        """At most so many of either."""
        return Split(self.prompts[:prompts], self.seeds[:seeds])


def open_prompts(rows: Iterable[str], targets: Sequence[str], n: int) -> list[str]:
    """The first n different prompts that name none of the targets' attributes. UserError if there are not so many."""
    names = {attribute_of(target) for target in targets}
    found: dict[str, None] = {}
    for prompt in rows:
        if len(found) == n:
            break
        if not names & set(parse(prompt)):
            found[prompt] = None
    if len(found) < n:
        raise UserError(f"{len(found)} prompts leave {', '.join(sorted(names))} open, {n} are asked for: take fewer")
    return list(found)


def calibration_split(targets: Sequence[str], prompts: int, seeds: int) -> Split:
    """Development prompts that leave the targets open."""
    from dodgeburn.training.pocket import development_prompts

    rows = (row["prompt"] for row in development_prompts(_enough(prompts, seeds)))
    return Split(open_prompts(rows, targets, prompts), [FIRST_CALIBRATION_SEED + i for i in range(seeds)])


def calibration_prompts(target: str, n: int) -> list[str]:
    """So many development prompts that leave a target open."""
    return calibration_split([target], n, 1).prompts


@lru_cache(maxsize=1)
def _shipped_rows() -> dict[str, list[tuple[str, int]]]:
    if not CALIBRATION_ROWS.exists():
        return {}
    said = json.loads(CALIBRATION_ROWS.read_text(encoding="utf-8"))
    return {target: [(str(prompt), int(seed)) for prompt, seed in rows] for target, rows in said["rows"].items()}


def calibration_rows(target: str, n: int, seed: int) -> list[tuple[str, int]]:
    """n prompts that leave a target open, each with a seed of its own, for the calibration that ends a training.

    The shipped ones of this attribute, which together respond as many pictures do, if they are as many; else the first
    development prompts, with seeds that a training with `seed` does not use.
    """
    shipped = _shipped_rows().get(target, [])
    return list(shipped) if len(shipped) == n else rows_as_they_come(target, n, seed)


def rows_as_they_come(target: str, n: int, seed: int) -> list[tuple[str, int]]:
    """The first n development prompts that leave a target open, and seeds that a training with `seed` does not use."""
    return list(zip(calibration_prompts(target, n), seeds_beside(seed, n), strict=True))


def seeds_beside(seed: int, n: int) -> list[int]:
    """n seeds for looking at a slider, far from those of the latents that a training with `seed` draws."""
    return [seed * 10_000 + 5_000 + i for i in range(n)]


def evaluation_split(targets: Sequence[str], prompts: int, seeds: int) -> Split:
    """Held-out prompts that leave the targets open."""
    _enough(prompts, seeds)
    rows = open_prompts(gate_rows(), targets, prompts)
    return Split(rows, [FIRST_EVALUATION_SEED + i for i in range(seeds)])


def hands_split(prompts: int, seeds: int) -> Split:
    """Held-out prompts that ask for a waving hand, on which repairs of fingers are judged. UserError for too many."""
    _enough(prompts, seeds)
    found = [prompt for prompt in gate_rows() if shows(prompt, {"hand": "waving"})]
    if len(found) < prompts:
        raise UserError(f"{len(found)} prompts ask for a waving hand, {prompts} are asked for: take fewer")
    return Split(found[:prompts], [FIRST_EVALUATION_SEED + i for i in range(seeds)])


def gate_rows() -> list[str]:
    """The gate's held-out prompts, each once."""
    from dodgeburn.training.pocket import gate_prompts

    return list(dict.fromkeys(row["prompt"] for row in gate_prompts()))


def shows(prompt: str, subject: Asked) -> bool | None:
    """Whether a prompt asks for all of a subject (True) or for something else in its place (False); None: it leaves
    that open. Graded attributes agree where their intervals overlap.
    """
    said = parse(prompt)
    same = {name: _agree(said[name], wanted) for name, wanted in subject.items() if name in said}
    if not all(same.values()):
        return False
    return True if len(same) == len(subject) else None


def _agree(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return bool(max(a[0], b[0]) < min(a[1], b[1]))
    return a == b


def _enough(prompts: int, seeds: int) -> int:
    """How many rows to draw prompts from; UserError for less than one prompt or seed."""
    if prompts < 1 or seeds < 1:
        raise UserError(f"{prompts} prompts and {seeds} seeds: give at least 1 of each")
    return 64 + 40 * prompts
