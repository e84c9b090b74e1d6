"""How far attributes spread over the packaged model's own pictures: the unit of sliders, shipped with the weights.

    python benchmarks/natural_spread.py --json            # measures and prints
    python benchmarks/natural_spread.py --write           # and writes dodgeburn/pocket/weights/natural.json

512 prompts of the development list (no prompt of the gate), one seed each, default generation settings, read by the
reader; each attribute over the prompts that leave it open. --quick takes 96 prompts.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from dodgeburn.models.loading import load_model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings
from dodgeburn.slide.edits import draw
from dodgeburn.slide.natural import NATURAL, spread
from dodgeburn.training.pocket import development_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = development_prompts(96 if args.quick else 512)
    model = load_model("pocket", device="cpu", dtype="fp32")
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    readings = Reader.load("reader").read(draw(model, prompts, seeds, GenerateSettings()))
    sigma = {name: round(value, 4) for name, value in spread(readings, prompts).items()}
    found = {
        "model_sha256": model.sha256, "pictures": len(rows), "reader": "reader",
        "unreadable": float(np.mean(readings.unreadable)), "sigma": sigma,
    }  # fmt: skip
    if args.write:
        NATURAL.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<24} {value:.4f}" for name, value in sigma.items()))


if __name__ == "__main__":
    main()
