"""Natural standard deviations: how far attributes spread over a model's own pictures, measured once and kept.

A slider's 1.0 is one of them. Estimated from the few pictures of a training they would be off by a tenth or two, so
the packaged model's are shipped (`benchmarks/natural_spread.py` measures them), bound to its file's hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.model import WEIGHTS
from dodgeburn.pocket.reader import Readings

NATURAL = WEIGHTS / "natural.json"


def spread(readings: Readings, prompts: Sequence[str]) -> dict[str, float]:
    """Standard deviation (n - 1) of every attribute over the readable pictures whose prompts leave it open.

    Continuous attributes by name; every value of a categorical one as "hat=crown", as a 0-or-1 variable.
    """
    asked = [parse(prompt) for prompt in prompts]
    out = {}
    for name in (*CONTINUOUS, *CATEGORICAL):
        rows = np.array([name not in wishes for wishes in asked]) & ~readings.unreadable
        values = np.asarray(readings.values[name])[rows]
        if len(values) < 2:
            continue
        if name in CONTINUOUS:
            out[name] = float(np.std(values.astype(np.float64), ddof=1))
        else:
            out |= {f"{name}={v}": float(np.std(values.astype(str) == v, ddof=1)) for v in CATEGORICAL[name]}
    return {name: sigma for name, sigma in out.items() if sigma > 0}


@lru_cache(maxsize=1)
def _shipped(path: Path) -> tuple[str, dict[str, float]]:
    if not path.exists():
        return "", {}
    said = json.loads(path.read_text(encoding="utf-8"))
    return str(said["model_sha256"]), {str(name): float(sigma) for name, sigma in said["sigma"].items()}


def known_sigma(model: Model, target: str) -> float | None:
    """The shipped natural standard deviation of an attribute ("smile", "hat=crown"); None for any other model."""
    sha256, sigma = _shipped(NATURAL)
    return sigma.get(target) if sha256 and model.sha256 == sha256 else None
