"""A tie by the judge, on the gate's prompts: what `bias fix` and `deconstruct` reach holds elsewhere?

    python benchmarks/judge_tie.py pocket fair.safetensors --json
    python benchmarks/judge_tie.py pocket ages.safetensors --prompt "a person" --attribute age --json

The first model is what the others are compared with. Neutral pictures: `-n` of the held-out prompts that name what
the prompt names (a doctor) and leave the attribute (glasses) open, in turn, each with a seed of its own; half as many
of other held-out prompts, which for a prompt that names nothing are those that name the attribute; some 48 that ask
for its classes. Nothing here may guide a choice. JSON: `models`, one row each: `shares` of the classes, `share` of
the one that the first model draws most often with Wilson's 95 % interval, `tv`, `tv_cons`, `fidelity_drop` with its
`fidelity_ends`, `explicit`, `unreadable_rise`, `frechet_ratio`, `others_tv` (largest of the other attributes, and
which), `others_mean`, `others_floor`.
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
from dodgeburn.rework.bias.concept import Concept
from dodgeburn.rework.bias.pocket_concept import asked_by_all, pocket_concept
from dodgeburn.sampling.settings import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.training.pocket import gate_prompts

ASKED = 48  # pictures that ask for a class, or a few more


def held_out_plan(concept: Concept, n: int) -> Plan:
    """Prompts of the gate, with seeds of their own."""
    own, attribute = asked_by_all(concept.prompts), concept.attribute
    asked = [(str(row["prompt"]), parse(str(row["prompt"]))) for row in gate_prompts()]
    about = [all(a.get(name) == wish for name, wish in own.items()) for _, a in asked]
    neutral = [p for (p, a), of_it in zip(asked, about, strict=True) if of_it and attribute not in a]
    others = [p for (p, a), of_it in zip(asked, about, strict=True) if (not of_it if own else attribute in a)]
    each = -(-ASKED // len(concept.classes))
    explicit = [(concept.explicit(neutral[i % len(neutral)], v, i), v) for i, v in enumerate(concept.classes * each)]
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
    k, n = bias.counts[bias.classes.index(before.bias.majority)], sum(bias.counts)
    low, high = wilson(k, n)
    return {
        "model": name, "shares": [round(x, 4) for x in bias.shares], "share": round(k / n, 4),
        "low": round(low, 4), "high": round(high, 4), "n": bias.n,
        "fidelity": round(after.fidelity, 4), "explicit": round(after.explicit, 4),
        **{key: value for key, value in moved.as_json().items() if key != "tv_before"},
    }  # fmt: skip


def main() -> None:
    """Judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="packaged names or files; the first is compared with")
    parser.add_argument("--prompt", default="a doctor", help="what is tied")
    parser.add_argument("--attribute", default="glasses", help="to a value of this")
    parser.add_argument("-n", type=int, default=240, help="neutral pictures")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    parser.add_argument("--quick", action="store_true", help="a minute: does it run")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    n, steps = (16, 2) if options.quick else (options.n, options.steps)
    judge = Reader.load("judge")
    concept = pocket_concept([options.prompt], options.attribute)
    meter = Meter(
        concept, held_out_plan(concept, n), PocketClassifier(judge, "judge"), judge, real_features(judge, 64, 500)
    )
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
