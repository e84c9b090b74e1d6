"""Where a default beta comes from: the margin |z| = |beta / 2 m| that training reaches at the latents of the pocket.

Diffusion-DPO's 5000 belongs to SD1.5's latents (4 x 64 x 64) because its errors are means. Scaled by the number of
elements it is 312.5 at the pocket's 4 x 16 x 16. Beta is in order where the median |z| after 100 steps is about 0.1 to
1: below, the sigmoid is a straight line and the reference holds nothing back; above, most pairs have nothing left to
say. This trains on preference pairs with several learning rates and betas and prints what the last 20 steps say.

    dodgeburn dpo pairs --model pocket --by looks -n 64 --best-of 4 -o looks
    python benchmarks/dpo_beta.py --pairs looks --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

from dodgeburn.measure.machine import machine
from dodgeburn.models.loading import load_model
from dodgeburn.rework.dpo.pairs import read_pairs
from dodgeburn.rework.dpo.settings import DpoSettings
from dodgeburn.rework.dpo.train import align

GRID = ((1e-4, 312.5), (3e-4, 312.5), (1e-3, 312.5), (1e-3, 31.25), (1e-3, 3125.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--loss", default="sigmoid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the first point of the grid, ten steps")
    parser.add_argument("--grid", nargs="+", metavar="LR:BETA", help="instead of its own")
    options = parser.parse_args()
    pairs, rows = read_pairs(options.pairs), []
    print(pairs.report())
    points = [tuple(float(x) for x in point.split(":")) for point in options.grid or ()]
    steps, grid = (10, GRID[:1]) if options.quick else (options.steps, points or GRID)
    model = load_model("pocket", "cpu", "fp32")
    for lr, beta in grid:
        settings = DpoSettings(
            loss=options.loss, lr=lr, beta=beta, steps=steps, batch=options.batch, seed=options.seed
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aligned = align(model, pairs, settings, Path(folder))
        last = aligned.history[-2:]
        mean = {
            key: sum(row[key] for row in last) / len(last) for key in ("loss", "accuracy", "winner", "loser", "margin")
        }
        rows.append({"lr": lr, "beta": beta, **{k: round(v, 4) for k, v in mean.items()}, "s": round(aligned.seconds)})
        print(rows[-1], flush=True)
    if options.json:
        print(json.dumps({"rows": rows, "steps": steps, "batch": options.batch, "pairs": len(pairs),
                          "loss": options.loss, "seed": options.seed, "machine": machine()}))  # fmt: skip


if __name__ == "__main__":
    main()
