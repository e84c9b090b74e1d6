"""Small pairs, settings and runs that tests of alignment share."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_model

from dodgeburn.errors import DodgeburnWarning
from dodgeburn.models.model import Model
from dodgeburn.rework.dpo.pair_points import PairPoints, encode_pairs
from dodgeburn.rework.dpo.pairs import Preference, PreferencePairs, checked
from dodgeburn.rework.dpo.settings import DpoSettings
from dodgeburn.rework.dpo.train import Aligned, align


def picture(seed: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_pairs(count: int = 5, weight: float = 1.0) -> PreferencePairs:
    return checked(Preference(f"a {i}", picture(2 * i), picture(2 * i + 1), weight) for i in range(count))


def quick(**changes: Any) -> DpoSettings:
    return DpoSettings(**{"steps": 4, "batch": 2, "rank": 2, "layers": "xattn", "lr": 1e-2, **changes})


def run(folder: Path, settings: DpoSettings, model: Model | None = None, **other: Any) -> Aligned:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DodgeburnWarning)
        return align(model or tiny_model(), some_pairs(), settings, folder, log_every=2, checkpoint_every=2, **other)


def points_of(model: Model, **settings: Any) -> PairPoints:
    return PairPoints(model, encode_pairs(model, some_pairs(), settings.pop("flips", False)), **settings)
