"""Train the reader and the judge on drawings, VAE round trips, other looks and junk; and grade them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, Attributes
from dodgeburn.pocket.reader import FINGERS, Reader, Readings, network, to_input
from dodgeburn.training.loop import LoopSettings, train

JUNK = ("noise", "blank", "scrambled")


def junk(kind: str, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures that are no portraits, uint8 [n, 64, 64, 3]: `noise` (white or coarse), `blank` (one colour or a
    gradient), `scrambled` (a real picture with its 8 x 8 tiles shuffled)."""
    n, size = len(pictures), pictures.shape[1]
    if kind == "noise":
        cell = int(rng.choice([1, 2, 4, 8]))
        x = rng.normal(127, rng.uniform(30, 90), (n, size // cell, size // cell, 3))
        return np.clip(x.repeat(cell, 1).repeat(cell, 2), 0, 255).astype(np.uint8)
    if kind == "blank":
        a, b = rng.uniform(0, 255, (2, n, 1, 1, 3))
        t = np.linspace(0, 1, size)[None, :, None, None] * (rng.random((n, 1, 1, 1)) < 0.5)
        return np.broadcast_to(a + (b - a) * t, (n, size, size, 3)).astype(np.uint8)
    tile = int(rng.choice([8, 16]))
    k = size // tile
    out = np.empty_like(pictures)
    for i, p in enumerate(pictures):
        tiles = p.reshape(k, tile, k, tile, 3).transpose(0, 2, 1, 3, 4).reshape(k * k, tile, tile, 3)
        order = rng.permutation(k * k)
        out[i] = tiles[order].reshape(k, k, tile, tile, 3).transpose(0, 2, 1, 3, 4).reshape(size, size, 3)
    return out


class Targets:
    """The attributes of many pictures as tensors."""

    def __init__(self, attributes: list[Attributes]) -> None:
        self.mean = torch.tensor([[a[k] for k in CONTINUOUS] for a in attributes], dtype=torch.float32)
        self.classes = {
            k: torch.tensor([table.index(a[k]) for a in attributes])
            for k, table in {**CATEGORICAL, "fingers": FINGERS}.items()
        }

    def at(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mean[index], {k: v[index] for k, v in self.classes.items()}


def _disturb(x: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Mild noise, contrast and colour casts, so that a reading doesn't hang on exact colours of the drawing."""
    n = len(x)
    gain = 1 + strength * 0.06 * torch.randn(n, 3, 1, 1, generator=generator)
    shift = strength * 0.03 * torch.randn(n, 3, 1, 1, generator=generator)
    noise = strength * 0.05 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return (x * gain + shift + noise).clamp(-1, 1)


def train_reader(
    name: str,
    sources: list[np.ndarray],
    attributes: list[list[Attributes]],
    folder: Path,
    settings: LoopSettings,
    batch: int,
    polish: LoopSettings | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> Reader:
    """Train one reader on several lists of uint8 pictures [n, 64, 64, 3] with their attributes, equally often each.

    One picture in eight of a batch is junk and only trains the unreadable verdict. The first stage disturbs pictures
    and learns the values; `polish` hardly disturbs them and weighs the continuous attributes, whose last hundredths
    (sharpness above all) drown in noise and colour casts.
    """
    net = network(name)
    targets = [Targets(a) for a in attributes]
    n_junk = batch // 8

    strength, mean_weight = 1.0, 40.0

    def make(step: int, generator: torch.Generator) -> tuple[Any, ...]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        parts, means, classes = [], [], []
        for k, share in enumerate(np.array_split(np.arange(batch - n_junk), len(sources))):
            index = torch.randint(len(sources[k]), (len(share),), generator=generator).sort().values
            parts.append(to_input(sources[k][index.numpy()]))
            mean, cls = targets[k].at(index)
            means.append(mean)
            classes.append(cls)
        pick = np.sort(rng.integers(len(sources[0]), size=n_junk))
        kind = JUNK[step % 3]
        x = torch.cat([_disturb(torch.cat(parts), generator, strength), to_input(junk(kind, sources[0][pick], rng))])
        return x, torch.cat(means), {k: torch.cat([c[k] for c in classes]) for k in classes[0]}

    def losses(made: tuple[Any, ...], generator: torch.Generator) -> dict[str, Tensor]:
        x, mean, classes = made
        out = {k: v.float() for k, v in net(x).items()}
        real = len(mean)
        error = (out["mean"][:real] - mean).square()
        log_sigma = out["log_sigma"][:real]
        spread = (0.5 * error.detach() * torch.exp(-2 * log_sigma) + log_sigma).mean()
        parts = {k: F.cross_entropy(out[k][:real], target) for k, target in classes.items()}
        parts["fingers"] = 2 * parts["fingers"]
        junk_target = (torch.arange(len(x)) >= real).float()
        return {
            "classes": torch.stack(list(parts.values())).sum(),
            "mean": mean_weight * error.mean(),
            "spread": 0.05 * spread,
            "junk": F.binary_cross_entropy_with_logits(out["junk"], junk_target),
        }

    train(name, {name: net}, make, losses, folder, settings, callback)
    if polish is not None:
        strength, mean_weight = 0.15, 300.0
        train(f"{name}-polish", {name: net}, make, losses, folder, polish, callback)
    return Reader(net, name)


def grade(readings: Readings, attributes: list[Attributes]) -> dict[str, Any]:
    """Accuracy per categorical attribute, finger accuracy over hands, RMSE per continuous attribute.

    Unreadable pictures count as wrong, and as an error of 0.5 for continuous attributes.
    """
    bad = readings.unreadable
    accuracy = {
        k: float(np.mean((readings.values[k] == np.array([a[k] for a in attributes])) & ~bad)) for k in CATEGORICAL
    }
    fingers = np.array([a["fingers"] for a in attributes])
    hands = fingers > 0
    rmse = {}
    for k in CONTINUOUS:
        error = np.where(bad, 0.5, readings.values[k] - np.array([a[k] for a in attributes]))
        rmse[k] = float(np.sqrt(np.mean(error**2)))
    return {
        "categorical_accuracy": float(np.mean(list(accuracy.values()))),
        "categorical": accuracy,
        "finger_accuracy": float(np.mean((readings.values["fingers"] == fingers)[hands] & ~bad[hands])),
        "rmse_worst": max(rmse.values()),
        "rmse": rmse,
        "unreadable": float(bad.mean()),
    }


def junk_unreadable(reader: Reader, pictures: np.ndarray, seed: int) -> dict[str, float]:
    """Share of junk called unreadable, per kind."""
    rng = np.random.default_rng([seed, 4])
    shares = {}
    for kind in JUNK:
        parts = [junk(kind, p, rng) for p in np.array_split(pictures, 16)]
        shares[kind] = float(reader.read(np.concatenate(parts)).unreadable.mean())
    return shares
