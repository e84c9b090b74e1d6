"""Drawings of the pocket's world with defects put in: as many labelled pictures as are wanted, without a U-Net.

The estimator learns to see on them before real failures are shown to it, of which there are a few thousand. What was
drawn is known, so nothing has to be fitted: what is left over of the picture is the defect (`left_over.py`), and
severities are the truth's. Never for evaluation: a generator's failures are of its own kind.

Noise is added anew each time, and the guess of the clean latents is a linear one (Wiener's filter of the drawings'
spectrum), which blurs as the U-Net's does and knows nothing of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from dodgeburn.foresee.feed import Targets
from dodgeburn.foresee.labels import LEVELS, TYPES, Label
from dodgeburn.foresee.nearest import Fit
from dodgeburn.foresee.network import BEFORE, Network
from dodgeburn.foresee.truth import against_drawing
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.model import Model
from dodgeburn.pocket.attributes import CATEGORICAL, CONTINUOUS, Attributes
from dodgeburn.pocket.pictures import attributes_of
from dodgeburn.pocket.world import render

LIST = 641  # names the world's list of portraits that defects are put into
CLEAN = 0.3  # share without a defect
SIDE = 64
LOG_SNR = (-3.0, 7.0)  # of the noise that is added
STEP = 1.2  # of log SNR, between a moment and the one before
SHARP = 0.5  # the filter counts on so much of the noise: a U-Net sees more than a linear filter


@dataclass
class Drawings:
    """n pictures: clean latents fp32 [n, c, h, w], where the defects are (uint8 [n, 64, 64], 0 or 255), labels."""

    latents: Tensor
    mask: Tensor
    labels: list[Label]


def area(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A soft blob over a share of the picture between low and high: [64, 64] in 0..1."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(3, 9))
    edge = np.quantile(smooth, 1 - rng.uniform(low, high))
    return np.asarray(1 / (1 + np.exp(-(smooth - edge) / smooth.std() * rng.uniform(3, 12))))


def mixed(a: Attributes, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """In places the drawing of somebody else: half a hat, two outlines, a colour that runs into another."""
    other = dict(a)
    for name in rng.choice([*CONTINUOUS, *CATEGORICAL], int(rng.integers(1, 4)), replace=False).tolist():
        if name in CATEGORICAL:
            other[name] = str(rng.choice(CATEGORICAL[name]))
        else:
            other[name] = float(rng.random())
    other["fingers"] = int(rng.choice([3, 4, 5, 6, 7])) if other["hand"] == "waving" else 0
    share = area(rng, 0.05, 0.6)[..., None] * rng.uniform(0.3, 1)
    return picture + share * (render(other).astype(float) - picture)


def moved(a: Attributes, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth displacements of up to 2 to 7 pixels."""
    field = ndimage.gaussian_filter(rng.normal(size=(2, SIDE, SIDE)), (0, 4, 4)) * area(rng, 0.1, 0.7)
    field *= rng.uniform(2, 7) / max(1e-6, float(np.abs(field).max()))
    at = np.mgrid[0:SIDE, 0:SIDE] + field
    return np.stack([ndimage.map_coordinates(picture[..., c], at, order=1, mode="nearest") for c in range(3)], -1)


def blurred(a: Attributes, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Softer in places, or everywhere."""
    sigma = rng.uniform(0.8, 2.6)
    share = 1.0 if rng.random() < 0.3 else area(rng, 0.05, 0.6)[..., None]
    return np.asarray(picture + share * (ndimage.gaussian_filter(picture, (sigma, sigma, 0)) - picture))


def coloured(a: Attributes, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another colour over a place."""
    share = area(rng, 0.02, 0.4)[..., None] * rng.uniform(0.15, 0.8)
    return np.asarray(picture + share * (rng.uniform(0, 255, 3) - picture))


def speckled(a: Attributes, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Single pixels of another colour, in places."""
    hit = rng.random((SIDE, SIDE)) < area(rng, 0.1, 0.9) * rng.uniform(0.002, 0.04)
    out = picture.copy()
    out[hit] += rng.choice([-1, 1], (int(hit.sum()), 1)) * rng.uniform(40, 200, (int(hit.sum()), 3))
    return out


DEFECTS = (mixed, mixed, mixed, moved, moved, blurred, coloured, speckled)


def defective(a: Attributes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A portrait as it should be and with one to three defects, or none: uint8 [64, 64, 3] each."""
    drawn = render(a)
    if rng.random() < CLEAN:
        return drawn, drawn
    picture = drawn.astype(float)
    for defect in rng.choice(np.array(DEFECTS, dtype=object), int(rng.integers(1, 4)), replace=False):
        picture = defect(a, picture, rng)
    return drawn, picture.round().clip(0, 255).astype(np.uint8)


@torch.inference_mode()
def draw(model: Model, count: int, seed: int = 0, batch: int = 64) -> Drawings:
    """`count` portraits with their labels; number i depends on seed and i alone. A waving hand has five fingers, or
    not, as the world draws it. The autoencoder runs in bf16, twice as fast where there is hardware for it."""
    latents, masks, labels = [], [], []
    for start in range(0, count, batch):
        pairs, portraits = [], []
        for i in range(start, min(count, start + batch)):
            a = attributes_of(seed * 1_000_000 + i, LIST)
            portraits.append(a)
            pairs.append(defective(a, np.random.default_rng([LIST, seed, i])))
        with torch.autocast(model.device.type, torch.bfloat16):
            found = encode_pictures(model.vae, torch.from_numpy(np.stack([p for _, p in pairs])))
        for a, (drawn, picture) in zip(portraits, pairs, strict=True):
            costs = {5: 10.0} if a["fingers"] not in (0, 5) else {}
            said = against_drawing(picture, Fit(a, drawn.astype(np.float32), "plain", costs))
            masks.append(said.mask.astype(np.uint8) * 255)
            labels.append(said.label("drawn"))
        latents.append(found.float().cpu())
    return Drawings(torch.cat(latents), torch.from_numpy(np.stack(masks)), labels)


@dataclass
class Filter:
    """Mean [1, c, 1, 1] and power spectrum [c, h, w] of clean latents."""

    mean: Tensor
    power: Tensor

    @staticmethod
    def of(latents: Tensor) -> Filter:
        """Of drawings' latents [n, c, h, w]."""
        mean = latents.mean((0, 2, 3), keepdim=True)
        return Filter(mean, torch.fft.fft2(latents - mean, norm="ortho").abs().square().mean(0))

    def estimate(self, clean: Tensor, noise: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents of unit variance and the linear guess of the clean ones, of [n, c, h, w] at log SNR [n]."""
        sigma = torch.exp(-log_snr / 2).view(-1, 1, 1, 1)
        noisy = clean + sigma * noise
        share = self.power / (self.power + (SHARP * sigma) ** 2)
        guess = torch.fft.ifft2(torch.fft.fft2(noisy - self.mean, norm="ortho") * share, norm="ortho").real
        return noisy / (1 + sigma**2).sqrt(), guess + self.mean


def batches(
    drawings: Drawings, network: Network, size: int
) -> Callable[[int, torch.Generator], tuple[dict[str, Tensor], Targets]]:
    """`feed(i, generator)` as `feed.Feed` is, one moment each: what only a U-Net can tell is at its mean (scalars and
    features) or 0 (maps). All pictures are of one group: any two can be compared."""
    spectrum, n = Filter.of(drawings.latents), len(drawings.labels)
    severity = torch.tensor([label.severity for label in drawings.labels])
    histogram = torch.tensor([label.histogram for label in drawings.labels])
    types = torch.tensor([[float(s >= 1) for s in label.types or (0.0,) * len(TYPES)] for label in drawings.labels])
    space = network.space
    shape = drawings.latents.shape[-2:]

    def feed(i: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Targets]:
        rows = torch.randint(n, (size,), generator=generator)
        clean = drawings.latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        level = LOG_SNR[0] + (LOG_SNR[1] - LOG_SNR[0]) * torch.rand(size, generator=generator)
        x_t, x0 = spectrum.estimate(clean, noise, level)
        tensors = {"log_snr": level[:, None], "x_t": x_t[:, None], "x0": x0[:, None], "mask": drawings.mask[rows]}
        tensors[BEFORE] = spectrum.estimate(clean, noise, level - STEP)[1][:, None]
        tensors["there"] = torch.ones(size, 1, dtype=torch.bool)
        for (_, wide), name, part in zip(space.maps, ("near", "far"), (1, 2), strict=False):
            tensors[name] = torch.zeros(size, 1, wide, shape[0] // part, shape[1] // part)
        for name, names in (("scalars", ("scalars",)), ("features", ("cond", "delta"))):
            if name in network.settings.inputs:
                mean: Tensor = getattr(network, f"{name}_mean")
                tensors |= {k: v.expand(size, 1, -1) for k, v in zip(names, mean.chunk(len(names)), strict=True)}
        tensors["words"] = torch.zeros(size, network.settings.words)
        y = severity[rows]
        at_least = (y[:, None] >= torch.arange(1, LEVELS)).float()
        ones = torch.ones(size)
        return tensors, Targets(
            y, at_least, histogram[rows], types[rows], ones.bool(), ones, torch.zeros(size, dtype=torch.int64)
        )  # fmt: skip

    return feed
