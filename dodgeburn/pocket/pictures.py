"""A fixed list of rendered pictures with their attributes, drawn once on all cores and kept in memory."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dodgeburn.pocket.attributes import PLANTED, Attributes, Planted, draw_attributes
from dodgeburn.pocket.world import Look, render


def attributes_of(index: int, seed: int, planted: tuple[Planted, ...] = PLANTED) -> Attributes:
    """Attributes of picture `index` of the list named by `seed`: the same whatever the list's length."""
    return draw_attributes(np.random.default_rng([seed, index]), planted)


def _chunk(job: tuple[list[Attributes], int, Look]) -> np.ndarray:
    attributes, size, look = job
    return np.stack([render(a, size, look) for a in attributes])


def draw_pictures(attributes: list[Attributes], size: int, look: Look = "plain", chunk: int = 500) -> np.ndarray:
    """Pictures of these attributes: uint8 [n, size, size, 3], drawn by one process a core."""
    jobs = [(attributes[i : i + chunk], size, look) for i in range(0, len(attributes), chunk)]
    if len(jobs) <= 1:
        return np.concatenate([_chunk(j) for j in jobs])
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(tqdm(pool.map(_chunk, jobs), total=len(jobs), desc="drawing", disable=None)))


def picture_list(n: int, seed: int, size: int, folder: Path | None = None) -> tuple[list[Attributes], np.ndarray]:
    """The first n pictures of the list named by `seed`, cached as one .npy file when a folder is given."""
    attributes = [attributes_of(i, seed) for i in range(n)]
    path = folder / f"pictures-{seed}-{n}-{size}.npy" if folder else None
    if path and path.exists():
        return attributes, np.load(path, mmap_mode="r")
    pictures = draw_pictures(attributes, size)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial.npy")
        np.save(temporary, pictures)
        temporary.replace(path)
    return attributes, pictures
