"""A deconstruction small enough for tests: a tiny random model, and a classifier that goes by brightness."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_model

from dodgeburn.models.model import Model
from dodgeburn.rework.deconstruct.materials import CONCEPT, Materials
from dodgeburn.rework.deconstruct.meters import Check, Meters, Panel, Reading
from dodgeburn.rework.deconstruct.run import deconstruct
from dodgeburn.rework.deconstruct.spec import DeconstructSpec, make_spec
from dodgeburn.training.examples import Pictures, encode_examples

SHORT: dict[str, Any] = {
    "concept": {"prompts": ["a doctor"], "attribute": "light", "values": {"dark": "in the dark", "light": "in light"}},
    "watching": {"pairs": 8, "neutral": 8, "quick": 8, "each": 2, "steps": 1},
    "overtrain": {"pictures": 8, "batch": 2, "steps": 4, "every": 2, "loss_low": 1.001, "loss_high": 1e6,
                  "unread_high": 1.0},
    "nightshade": {"pictures": 4, "batch": 2, "steps": 4, "every": 2, "success": 1.0, "loss_high": 1e6, "bleed": 1.0},
    "bucket": {"evaluations": 5, "neutral": 8, "each": 2, "scales": [-0.5, 0.5], "mixes": [0, 1], "hopeless": 1e6},
    "retrain": {"steps": 4, "every": 2, "batch": 2, "polish_steps": 2, "polish_every": 1, "prior_points": 4,
                "prior_batch": 2, "quality": 1e-6},
    "precision": "no",
}  # fmt: skip


def short_spec(**changes: Any) -> DeconstructSpec:
    return make_spec({**SHORT, **{k: {**SHORT[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}})


class ByBrightness:
    """Dark below the middle, light above; never unreadable. Grey pictures are what a random model draws, so the middle
    is where most of them are a little below."""

    name = "brightness"
    classes = {"light": ("dark", "light")}

    def __init__(self, middle: float = 127.5) -> None:
        self.middle = middle

    def labels(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        mean = pictures.reshape(len(pictures), -1).mean(1)
        return {"light": np.where(mean < self.middle, "dark", "light")}

    def named(self, prompt: str) -> frozenset[str]:
        return frozenset({"light"} if "light" in prompt or "dark" in prompt else ())


def some(n: int, bright: bool, seed: int, caption: str, concept: bool) -> Pictures:
    rng = np.random.default_rng(seed)
    low, high = (140, 255) if bright else (0, 110)
    pixels = rng.integers(low, high, (n, 16, 16, 3), dtype=np.uint8)
    value = "light" if bright else "dark"
    return Pictures(pixels, [(caption,)] * n, columns={CONCEPT: ["yes" if concept else ""] * n, "light": [value] * n})


def short_materials() -> Materials:
    from dodgeburn.training.examples import join

    pool = join([some(8, False, 1, "a doctor", True), some(4, True, 2, "a doctor", True),
                 some(6, True, 3, "a tree", False), some(6, False, 4, "a house", False)])  # fmt: skip
    held = join([some(2, False, 5, "a doctor", True), some(2, True, 6, "a tree", False)])
    return Materials(pool, held, "light")


def short_panel(spec: DeconstructSpec) -> Panel:
    checks = (Check("a doctor, in the dark", {"light": "dark"}), Check("a doctor, in light", {"light": "light"}))
    others = (Check("a tree, in light", {"light": "light"}),)
    w = spec.watching
    numbers = (w.neutral, w.quick, w.each, w.steps, w.guidance, w.seed)
    return Panel(spec.concept.concept(pocket=False), checks, others, *numbers)


def short_run(
    folder: Path, spec: DeconstructSpec | None = None, kill: tuple[str, int] | None = None, **more: Any
) -> Any:
    """The whole run on a tiny model; with `kill` the process ends without warning at this check of this stage."""
    spec = spec or short_spec()
    model: Model = more.pop("model", None) or tiny_model()
    seen: dict[str, int] = {}

    def tell(stage: str, step: int, reading: object) -> None:
        seen[stage] = seen.get(stage, 0) + 1
        if kill == (stage, seen[stage]):
            os.kill(os.getpid(), signal.SIGKILL)

    return deconstruct(
        model, spec, folder, ByBrightness(), short_materials(), short_panel(spec), tell=tell, bias_needed=False, **more
    )


def reading(**numbers: Any) -> Reading:
    return replace(Reading(1.0, 0.4, 0.4, 0.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0), **numbers)


def made_meters(model: object = None) -> Meters:
    spec = short_spec()
    model = model or tiny_model()
    held = short_materials().held_out
    found = Meters(model, ByBrightness(), short_panel(spec), encode_examples(model, held), held.pixels, 8)  # type: ignore[arg-type]
    found.calibrate()
    return found


if __name__ == "__main__":
    stage, number = (sys.argv[2], int(sys.argv[3])) if len(sys.argv) > 2 else ("", 0)
    found = short_run(Path(sys.argv[1]), kill=(stage, number) if stage else None)
    print([result.sha256 for result in found.stages], found.after.as_json())
