"""Doctors and glasses by the judge, on the gate's prompts: what `bias fix` and `deconstruct` reach holds elsewhere?

    python benchmarks/judge_tie.py pocket fair.safetensors --json

The first model is what the others are compared with. Neutral pictures: `-n` of the held-out prompts that name a doctor
and leave glasses open, in turn, each with a seed of its own; half as many of other held-out prompts; 48 that ask for
glasses or for none. Nothing here may guide a choice. JSON: `models`, one row each: `share` (of glasses) with Wilson's
95 % interval, `tv`, `tv_cons`, `fidelity_drop` with its `fidelity_ends`, `explicit`, `unreadable_rise`,
`frechet_ratio`, `others_tv` (largest of the other attributes, and which), `others_mean`, `others_floor`.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from dodgeburn.models.loading import load_model
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Reader
from dodgeburn.rework.bias.before_after import Measured, Meter, Plan, change, real_features
from dodgeburn.rework.bias.classify import PocketClassifier
from dodgeburn.rework.bias.pocket_concept import pocket_concept
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.training.pocket import gate_prompts

OUTFIT, ATTRIBUTE, VALUE = "doctor", "glasses", "glasses"


def held_out_plan(n: int) -> Plan:
    """Prompts of the gate, with seeds of their own."""
    asked = [(str(row["prompt"]), parse(str(row["prompt"]))) for row in gate_prompts()]
    neutral = [p for p, a in asked if a.get("outfit") == OUTFIT and ATTRIBUTE not in a]
    others = [p for p, a in asked if a.get("outfit") != OUTFIT]
    concept = pocket_concept([f"a {OUTFIT}"], ATTRIBUTE)
    explicit = [(concept.explicit(neutral[i % len(neutral)], v, i), v) for i, v in enumerate(concept.classes * 24)]
    return Plan(
        tuple(neutral[i % len(neutral)] for i in range(n)), tuple(61_000_000 + i for i in range(n)),
        tuple(others[i % len(others)] for i in range(n // 2)), tuple(62_000_000 + i for i in range(n // 2)),
        tuple(explicit), tuple(63_000_000 + i for i in range(len(explicit))),
    )  # fmt: skip


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share k of n."""
    middle, reach = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def row(name: str, before: Measured, after: Measured) -> dict[str, Any]:
    """One model's figures."""
    bias, moved = after.bias, change(before, after)
    k, n = bias.counts[bias.classes.index(VALUE)], sum(bias.counts)
    low, high = wilson(k, n)
    return {
        "model": name, "share": round(k / n, 4), "low": round(low, 4), "high": round(high, 4), "n": bias.n,
        "fidelity": round(after.fidelity, 4), "explicit": round(after.explicit, 4),
        **{key: value for key, value in moved.as_json().items() if key != "tv_before"},
    }  # fmt: skip


def main() -> None:
    """Judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="packaged names or files; the first is compared with")
    parser.add_argument("-n", type=int, default=240, help="neutral pictures")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--quick", action="store_true", help="a minute: does it run")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    n, steps = (16, 2) if options.quick else (options.n, options.steps)
    judge = Reader.load("judge")
    concept = pocket_concept([f"a {OUTFIT}"], ATTRIBUTE)
    meter = Meter(concept, held_out_plan(n), PocketClassifier(judge, "judge"), judge, real_features(judge, 64, 500))
    rows: list[dict[str, Any]] = []
    before: Measured | None = None
    for name in options.models:
        model = load_model(name, device="cpu", dtype="fp32")
        found = meter.measure(lambda p, s, m=model: draw(m, p, s, GenerateSettings(steps=steps), quick=True))  # type: ignore[misc]
        before = before or found
        rows.append(row(name, before, found))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if options.json:
        print(json.dumps({"models": rows}))


if __name__ == "__main__":
    main()
