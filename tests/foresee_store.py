"""A made-up store of trajectories with a planted signal, for tests: written in well under a second."""

from pathlib import Path

import numpy as np
import torch

from dodgeburn.foresee.labels import TYPES, one_opinion
from dodgeburn.foresee.observe import SCALARS
from dodgeburn.foresee.shards import NOISED, TRUE, Shard, Space, Store, Trajectory, prompt_id, shard_name, write_shard

STAGES = (("down0", 4), ("mid", 6), ("up0", 4))
SPACE = Space(STAGES, SCALARS, 4, "made-up", (("up1", 4), ("up0", 6)))
SIZE = 4  # latents are 4 x 4


def made_up_store(
    folder: Path, prompts: int = 12, seeds: int = 8, checkpoints: int = 6, per_shard: int = 16, signal: float = 2.0,
    seed: int = 0, generators: tuple[str, ...] = ("sound", "damaged"), provenance: str = TRUE,
) -> Store:  # fmt: skip
    """prompts x seeds trajectories. Severity is 2.5 + noise (sd 1.5) of each seed plus a smaller share of its prompt;
    features, x0 and scalars carry `signal` x progress x severity under unit noise, so late samples tell more.
    """
    rng, other = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(p, s) for p in range(prompts) for s in range(seeds)]
    level = rng.normal(0, 0.6, prompts)
    direction = rng.normal(size=SPACE.features) / 3
    for number, start in enumerate(range(0, len(jobs), per_shard)):
        chunk = jobs[start : start + per_shard]
        records, rows = [], []
        for i, (p, s) in enumerate(chunk):
            severity = float(np.clip(2.5 + level[p] + rng.normal(0, 1.3), 0, 5))
            types = np.zeros(len(TYPES))
            types[rng.integers(len(TYPES))] = severity
            k = checkpoints - int(rng.integers(2))  # not all are equally long
            progress = (np.arange(k) + 1) / k
            strength = signal * progress[:, None] * (severity - 2.5) / 1.5
            cond = rng.normal(size=(k, SPACE.features)) + strength * direction
            scalars = rng.normal(size=(k, len(SCALARS))) + 0.2 * strength
            log_snr = np.linspace(-5, 5, k)
            scalars[:, SCALARS.index("log_snr")] = log_snr
            x0 = rng.normal(size=(k, 4, SIZE, SIZE)) + 0.5 * strength[:, :, None, None]
            rows.append({
                "trajectory": np.full(k, i, np.int32), "step": np.arange(k, dtype=np.int32),
                "progress": progress.astype(np.float32), "log_snr": log_snr.astype(np.float32),
                "x_t": rng.normal(size=(k, 4, SIZE, SIZE)).astype(np.float16), "x0": x0.astype(np.float16),
                "cond": cond.astype(np.float16), "delta": (0.3 * cond).astype(np.float16),
                "scalars": scalars.astype(np.float32), "near": other.normal(size=(k, 4, SIZE, SIZE)).astype(np.float16),
                "far": other.normal(size=(k, 6, SIZE // 2, SIZE // 2)).astype(np.float16),
            })  # fmt: skip
            prompt = f"made-up prompt {p}"
            records.append(
                Trajectory(
                    f"{p}-{s}", prompt, prompt_id(prompt), s, generators[(p + s) % len(generators)], "dpmpp_2m", k, 4.0,
                    one_opinion(severity, "made up", types.tolist()), provenance=provenance,
                    split="test" if p % 4 == 3 else "train",
                )
            )  # fmt: skip
        tensors = {name: torch.from_numpy(np.concatenate([r[name] for r in rows])) for name in rows[0]}
        if provenance == NOISED:
            tensors["step"].fill_(-1)
        tensors["mask"] = torch.zeros(len(chunk), 16, 16, dtype=torch.uint8)
        write_shard(folder / shard_name(number), Shard(records, tensors, SPACE))
    return Store(folder)
