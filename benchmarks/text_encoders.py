"""How to train the pocket's text encoders: with the U-Net from scratch, contrastively first, or both.

Three U-Nets are trained from the same weights for the same number of steps, on the VAE and latents of a training folder
(`dodgeburn pocket train -o RUN`), and their pictures are read on prompts that none of them was trained on. Prints, for
each way, prompt fidelity with a 95 % interval over prompts, the mean Spearman of graded words, and the seconds it took
(the contrastive stage included, unless the folder has its outcome already). `--json` prints one object as the last
line; `--quick` trains 60 steps: the same fields, but too few for an answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dodgeburn.measure.fidelity import fidelity, graded_spearman
from dodgeburn.measure.intervals import bootstrap_mean
from dodgeburn.measure.machine import machine
from dodgeburn.pocket.captions import parse
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.training.pocket import PocketRun, PocketTraining, development_prompts

WAYS = {"with the U-Net": (False, True), "contrastively first": (True, False), "first, then with it": (True, True)}


def measure(run: PocketRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fidelity and mean Spearman of a run's model on prompt rows, 20 steps, guidance 4."""
    texts = [row["prompt"] for row in rows]
    pictures = generate(run.model(), texts, [row["seed"] for row in rows], GenerateSettings())
    readings = Reader.load("reader").read(np.stack([np.asarray(p.image) for p in pictures]))
    asked = [parse(t) for t in texts]
    interval = bootstrap_mean(fidelity(asked, readings)[:, None])
    spearman = graded_spearman(asked, readings)
    return {"fidelity": interval.mean, "fidelity_ci": interval.ends,
            "spearman_mean": float(np.mean([r for r, _ in spearman.values()]))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a training folder with vae.safetensors and latents")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("-n", type=int, default=192, help="prompts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    steps, n = (60, 32) if settings.quick else (settings.steps, settings.n)
    default, asked, ways = PocketTraining(), development_prompts(n), {}
    for way, (first, joint) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            parts = (
                *settings.run.glob("latents-*"),
                *settings.run.glob("pictures-*"),
                settings.run / "vae.safetensors",
                *(settings.run.glob("text.safetensors") if first else ()),
            )
            for path in parts:
                (Path(folder) / path.name).symlink_to(path.resolve())
            text = replace(default.text, steps=40) if settings.quick else default.text
            unet = replace(default.unet, steps=steps, warmup=min(200, steps // 4))
            config = replace(default, text_first=first, text_with_unet=joint, text=text, unet=unet, compiled=False)
            start = time.perf_counter()
            run = PocketRun(Path(folder), config)
            run.vae()
            run.text()
            run.unet()
            ways[way] = {**measure(run, asked), "seconds": round(time.perf_counter() - start)}
        print(f"{way:<22} {ways[way]}")
    if settings.json:
        print(json.dumps({"steps": steps, "prompts": n, "ways": ways, "machine": machine()}))


if __name__ == "__main__":
    main()
