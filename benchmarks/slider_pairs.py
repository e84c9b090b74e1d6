"""Sliders from a few pairs of pictures on the pocket: two attributes that differ, and hands repaired.

    python benchmarks/slider_pairs.py --json              # 6 pairs, both objectives, 3 training seeds
    python benchmarks/slider_pairs.py --quick --json

Pairs are drawn by the pocket world: portraits that differ in one attribute alone (0.1 and 0.9; for hands, 3, 4, 6 or 7
fingers before and 5 after). The judge reads the pictures, of held-out prompts that leave the attribute open, or, for
hands, that ask for a waving hand. Figures of the first two are `slide/measures.py`'s, with 95 % intervals over prompts
and seeds; of hands, the share with five fingers with its exact interval, how many wrong hands were repaired and how
many right ones spoiled, and what else changed. forwards: samples through the U-Net.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dodgeburn.measure.intervals import binomial_interval
from dodgeburn.measure.machine import machine
from dodgeburn.models.adapters import Adapter
from dodgeburn.models.loading import load_model
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.pocket.reader import Reader
from dodgeburn.pocket.world import render
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.edits import AdapterEdit, Unedited
from dodgeburn.slide.evaluate import evaluate, number
from dodgeburn.slide.pairs import PairSpec, TrainedPairs, train_pairs
from dodgeburn.slide.splits import evaluation_split
from dodgeburn.training.pocket import gate_prompts

PAIR_LIST = 770  # names the world's list of portraits that pairs are drawn from; the training seed is added
WRONG = (3, 4, 6, 7)
FIRST_HAND_SEED = 9_500_000


def write_pairs(folder: Path, attribute: str, n: int, seed: int) -> None:
    """before/ and after/ of n portraits that differ in one attribute."""
    found = i = 0
    while found < n:
        a = attributes_of(i, PAIR_LIST + seed)
        i += 1
        if attribute == "fingers" and a["hand"] != "waving":
            continue
        ends = (WRONG[found % len(WRONG)], 5) if attribute == "fingers" else (0.1, 0.9)
        for side, value in zip(("before", "after"), ends, strict=True):
            (folder / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(render({**a, attribute: value})).save(folder / side / f"{found}.png")
        found += 1


def trained(model: Model, attribute: str, objective: Any, pairs: int, seed: int) -> tuple[PairSpec, TrainedPairs]:
    """A slider with the defaults, from pairs of its own."""
    prompt = "a person, waving" if attribute == "fingers" else ""
    spec = PairSpec(name=attribute, objective=objective, prompt=prompt, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs", attribute, pairs, seed)
        return spec, train_pairs(model, spec, Path(folder) / "pairs", Path(folder) / "run")


def moved(base: Unedited, adapter: Adapter, spec: PairSpec, prompts: int, seeds: int, judge: Reader) -> dict[str, Any]:
    """An attribute's figures."""
    edit = AdapterEdit(base.model, adapter, spec.start, unedited=base)
    split = evaluation_split([spec.name], prompts, seeds)
    found = evaluate(edit, spec.name, split, (-2, -1, -0.5, 0, 0.5, 1, 2), judge, resamples=50)
    keys = ("monotone", "spearman", "range_sigma", "selectivity", "identity", "unreadable")
    leaks = [leak.absolute for name, leak in found.leaks.items() if name != spec.name]
    return {
        **{key: [number(found.mean(key)), found.ends(key)] for key in keys},
        "curve": [[s, number(m)] for s, m in found.curve],
        "leak_at_1_sigma": number(float(np.nanmean(leaks))) if np.isfinite(leaks).any() else None,
    }


def hands(base: Unedited, adapter: Adapter, spec: PairSpec, pictures: int, judge: Reader) -> list[dict[str, Any]]:
    """Five fingers, by scale."""
    asked = [row["prompt"] for row in gate_prompts() if parse(row["prompt"]).get("hand") == "waving"]
    prompts = [asked[i % len(asked)] for i in range(pictures)]
    seeds = [FIRST_HAND_SEED + i for i in range(pictures)]
    edit = AdapterEdit(base.model, adapter, spec.start, unedited=base)
    rows, before = [], judge.read(base.pictures(prompts, seeds))
    right_before = (np.asarray(before.values["fingers"]) == 5) & ~before.unreadable
    for scale in (0.0, 1.0, 2.0, 3.0):
        read = judge.read(edit.pictures(prompts, seeds, [scale] * pictures))
        right = (np.asarray(read.values["fingers"]) == 5) & ~read.unreadable
        drift = [np.abs(np.asarray(read.values[k]) - np.asarray(before.values[k])).mean() for k in CONTINUOUS]
        changed = [(np.asarray(read.values[k]) != np.asarray(before.values[k])).mean() for k in CATEGORICAL]
        rows.append({
            "scale": scale, "five": number(float(right.mean())), "n": pictures,
            "interval": [number(x) for x in binomial_interval(int(right.sum()), pictures)],
            "repaired": int((right & ~right_before).sum()), "spoiled": int((right_before & ~right).sum()),
            "continuous_drift": number(float(np.mean(drift))), "categorical_changed": number(float(np.mean(changed))),
            "unreadable": int(read.unreadable.sum()),
        })  # fmt: skip
    return rows


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one training seed, few pictures")
    parser.add_argument("--only", choices=["eye_size", "brow_angle", "fingers"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prompts, seeds, pictures, steps = (4, 4, 48, 10) if args.quick else (8, 16, 384, 20)
    model, judge = load_model("pocket"), Reader.load("judge")
    base = Unedited(model, GenerateSettings(steps=steps))
    results = []
    for attribute in [args.only] if args.only else ["eye_size", "brow_angle", "fingers"]:
        for objective in ("difference", "noise"):
            for seed in range(1 if args.quick else 3):
                spec, made = trained(model, attribute, objective, args.pairs, seed)
                row: dict[str, Any] = {
                    "attribute": attribute, "objective": objective, "seed": seed, "pairs": made.pairs,
                    "forwards": made.forwards, "train_s": round(made.seconds, 1),
                }  # fmt: skip
                if attribute == "fingers":
                    row["hands"] = hands(base, made.adapter, spec, pictures, judge)
                else:
                    row |= moved(base, made.adapter, spec, prompts, seeds, judge)
                results.append(row)
                if not args.json:
                    print(json.dumps(row), flush=True)
    if args.json:
        print(json.dumps({"machine": machine(), "steps": steps, "results": results}))


if __name__ == "__main__":
    main()
