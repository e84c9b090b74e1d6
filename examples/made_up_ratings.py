"""Makes a DiffusionDB folder and an AI-Horde export of made-up ratings with the pocket, to try `artifacts collect` on.

    python examples/made_up_ratings.py rated
    dodgeburn artifacts collect from-ratings --ratings rated/metadata.parquet rated/ratings.parquet
    dodgeburn artifacts train from-ratings -o rated.safetensors
    dodgeburn artifacts score from-ratings --estimator rated.safetensors

A few minutes in all; what is learned from 120 pictures is little. Pictures are the pocket's, with DiffusionDB's
columns; ratings come from pixel oracles, three raters with noise of their own for each, and AI-Horde's columns. Every
fourth picture gets another seed in the metadata: it can't be drawn again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dodgeburn.foresee.truth import find_artifacts
from dodgeburn.foresee.zoo import MEMBERS, draw, pocket_zoo
from dodgeburn.models.loading import load_model
from dodgeburn.pocket.reader import Reader
from dodgeburn.sampling.loop import GenerateSettings, generate
from dodgeburn.training.pocket import development_prompts


def main() -> None:
    """Write FOLDER/*.png, metadata.parquet and ratings.parquet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    zoo = pocket_zoo(load_model("pocket"))
    settings = GenerateSettings(steps=args.steps, sampler="euler", spacing="linspace", guidance=4.0)
    prompts = [row["prompt"] for row in development_prompts(max(1, args.pictures // 4))]
    prompts = [prompts[i % len(prompts)] for i in range(args.pictures)]
    seeds = [1000 + i for i in range(args.pictures)]
    half = args.pictures // 2  # the first half by the model itself, the second by a damaged one
    made = generate(zoo.model, prompts[:half], seeds[:half], settings)
    damaged = draw(next(m for m in MEMBERS if m.name == "overdone-merge"), rng)
    with zoo.changed(damaged):
        made += generate(zoo.model, prompts[half:], seeds[half:], settings)
    pictures = np.stack([np.asarray(g.image) for g in made])
    severity = [f.severity for f in find_artifacts(pictures, prompts, Reader.load())]
    metadata, ratings = [], []
    for i, one in enumerate(made):
        name = f"{i:08d}-made-up.png"
        one.image.save(args.folder / name)
        metadata.append({
            "image_name": name, "prompt": prompts[i], "part_id": 1, "seed": seeds[i] + (i % 4 == 3) * 5000,
            "step": args.steps, "cfg": 4.0, "sampler": 3, "width": one.image.width, "height": one.image.height,
            "user_name": "nobody", "timestamp": "2022-08-20", "image_nsfw": 0.1, "prompt_nsfw": 0.0,
        })  # fmt: skip
        for rater in range(3):
            said = int(np.clip(round(severity[i] + rng.normal(0, 0.7)), 0, 5))
            ratings.append({
                "id": name.removesuffix(".png"), "ratings_count": 3, "rating": 10 - said, "kudos": 10, "account_age": 1,
                "usage_requests": 1, "created_at": f"2023-01-0{rater + 1}", "client_agent": "made-up",
                "artifacts": said, "user_id": f"rater {rater}", "trusted": True, "validated": True,
                "captchas_failed": 0, "country": "",
            })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(metadata), args.folder / "metadata.parquet")
    pq.write_table(pa.Table.from_pylist(ratings), args.folder / "ratings.parquet")
    bad = sum(s >= 3 for s in severity)
    print(f"{args.folder}: {len(made)} pictures, {bad} of them bad, {len(ratings)} ratings")


if __name__ == "__main__":
    main()
