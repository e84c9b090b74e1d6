"""The table of benchmarks/sliders.py: means over concepts with their intervals, and edits against the slider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dodgeburn.slide.evaluate import Evaluation


def mean_leak(found: Evaluation) -> float | None:
    """Mean leakage onto the other attributes at one deviation."""
    values = [leak.absolute for leak in found.leaks.values() if not math.isnan(leak.absolute)]
    return float(np.mean(values)) if values else None


def less(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much less the slider leaks than another edit, over the concepts on which both reach one deviation."""
    apart = [
        {"less": b["leak"] - a["leak"]}
        for a, b in zip(ours, theirs, strict=False)
        if a["leak"] is not None and b["leak"] is not None
    ]
    mean, ends = over(apart, "less")
    return {"mean": mean, "interval": ends, "concepts": len(apart)}


def summary(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """What all judged sliders come to; rows have `name`, the figures, `within` (the same within the safe range) and
    `safe_range`, one training's concepts after another's.
    """
    concepts = _by_name(rows, keys)
    safe = _by_name([{"name": row["name"], **row["within"]} for row in rows], keys)
    whole = {key: over(list(concepts.values()), key) for key in keys}
    n = len(concepts)
    return {
        **{key: mean for key, (mean, _) in whole.items()},
        "intervals": {key: ends for key, (_, ends) in whole.items()},
        "within_safe_range": {key: over(list(safe.values()), key) for key in keys},
        "safe_ranges": {name: [row["safe_range"] for row in rows if row["name"] == name] for name in concepts},
        "by_concept": concepts,
        "by_training": [{key: over(rows[i : i + n], key)[0] for key in keys} for i in range(0, len(rows), n)],
    }


def _by_name(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Each concept's mean over its trainings: these are alike, so intervals are over concepts."""
    out: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        known = {key: [row[key] for row in own if row.get(key) is not None] for key in keys}
        out[name] = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    return out


def over(rows: Sequence[dict[str, Any]], key: str) -> tuple[float | None, list[float] | None]:
    """Mean over rows and its 95 % interval, by resampling rows."""
    values = np.array([row[key] for row in rows if row.get(key) is not None], dtype=np.float64)
    if not len(values):
        return None, None
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    return float(values.mean()), [float(v) for v in np.quantile(drawn, [0.025, 0.975])]
