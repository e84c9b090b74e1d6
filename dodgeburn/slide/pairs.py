"""A slider from pictures: a few before and after pairs say what words cannot.

Visual Concept Sliders (arXiv 2311.12092, eq. 9): the same noise is put on both pictures of a pair at the same time
step, the slider at +m is to explain `after` and at -m `before`. Both go through the U-Net as one batch. Two objectives:

    noise       |eps_{+m}(x_t^after) - n|^2         +  |eps_{-m}(x_t^before) - n|^2          n: the noise added
    difference  |eps_{+m}(x_t^after) - (f' - d)|^2  +  |eps_{-m}(x_t^before) - (f + d)|^2    d = eta (f' - f) / 2

f' and f are what the frozen model says at the two. With n, the slider also learns whatever else the frozen model
doesn't know of these few pictures (most of the loss), which cancels between the signs only in the mean. The difference
has what the pair shares taken out: at eta 1 it asks that the slider explain why the two predictions differ, and change
nothing else; eta above 1 asks for more of it.

Pictures are encoded once; point i (pair, time step, noise) is a function of the seed and i, so a run can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.given_settings import first_problem
from dodgeburn.models.adapters import Adapter, attached, new_adapter, trained_layers
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.model import Model
from dodgeburn.sampling.predict import Predictor, add_noise, alphas_cumprod, predict_scaled
from dodgeburn.slide.pair_folder import Pair, read_pairs
from dodgeburn.training.loop import LoopSettings, train


class PairSpec(BaseModel):
    """One slider from pictures. The defaults were chosen on the pocket."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    prompt: str = ""  # what the pictures show, without what differs; may be empty
    attribute: str | None = None  # pocket: what the readers measure
    objective: Literal["difference", "noise"] = "difference"
    rank: int = Field(default=4, ge=1)
    alpha: float | None = Field(default=None, gt=0)  # None: the rank
    layers: str = "noxattn"
    text_encoders: bool = False  # trained too, and on at all time steps
    eta: float = Field(default=2.0, gt=0)  # difference: how much of it at a pair's own scale
    start: int = Field(default=850, ge=1, le=1000)  # trained, and to be used, at time steps up to this
    points: int = Field(default=96, ge=1)  # difference: pairs with noise whose frozen predictions are kept
    unconditional: float = Field(default=0.25, ge=0, le=1)  # share trained with the empty prompt
    steps: int = Field(default=40, ge=1)
    batch: int = Field(default=8, ge=1)  # pairs a step, two samples each
    lr: float = Field(default=3e-3, gt=0)
    seed: int = Field(default=0, ge=0)


def make_pair_spec(said: dict[str, Any], where: str = "slider") -> PairSpec:
    """A checked spec; UserError of one line that names what is wrong."""
    try:
        return PairSpec(**said)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, PairSpec)}") from None


@dataclass(frozen=True)
class TrainedPairs:
    """A slider from pictures, and what it cost."""

    adapter: Adapter
    loss: float
    pairs: int
    forwards: int  # samples through the U-Net, frozen ones included
    seconds: float


@dataclass(frozen=True)
class Bucket:
    """Pairs of one size: latents [pairs, c, h, w] before and after, the magnitude of each [pairs]."""

    before: Tensor
    after: Tensor
    magnitudes: Tensor
    predictor: Predictor


def train_pairs(
    model: Model,
    spec: PairSpec,
    pictures: str | Path,
    folder: Path,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    first: Adapter | None = None,
) -> TrainedPairs:
    """Train a slider on the pairs in the folder `pictures`. `folder` holds the checkpoint that a run resumes from.

    `first` is a start other than 0. Raises UserError for a folder in which pairs are missing or broken, or layers that
    cannot be, and a loss that is no longer finite.
    """
    began = time.perf_counter()
    pairs = read_pairs(pictures, model.native_size**2, model.vae_factor)
    buckets = make_buckets(model, pairs)
    components = model.components()
    layers = trained_layers(components, spec.layers, spec.text_encoders)
    adapter = first or new_adapter(components, layers, spec.rank, spec.alpha, spec.seed, spec.name)
    for module in components.values():
        module.requires_grad_(False)
    made = PairPoints(model, buckets, spec)
    frozen = sum(bucket.predictor.forwards for bucket in buckets)

    with attached(components, [adapter], trains=True) as attachment:

        def batch(step: int, generator: torch.Generator) -> tuple[int, list[int]]:
            sizes = torch.tensor([float(len(bucket.before)) for bucket in buckets])
            bucket = int(torch.multinomial(sizes, 1, generator=generator))
            if spec.objective == "noise":  # noise costs nothing: never the same twice
                return bucket, [step * spec.batch + i for i in range(spec.batch)]
            drawn = torch.randint(made.kept[bucket], (spec.batch,), generator=generator)
            return bucket, [int(i) for i in drawn]

        def losses(drawn: tuple[int, list[int]], generator: torch.Generator) -> dict[str, Tensor]:
            bucket, indices = drawn
            x, timesteps, texts, scales, target = made.rows(bucket, indices)
            said = predict_scaled(buckets[bucket].predictor, attachment, scales, x, timesteps, texts)
            return {"loss": (said - target.to(said.device)).square().mean()}

        settings = LoopSettings(
            steps=spec.steps, lr=spec.lr, weight_decay=0.0, warmup=max(1, spec.steps // 20), constant=0.3, final=0.02,
            ema=0.9, precision="no", seed=spec.seed, checkpoint_every=25, log_every=5,
            settings={**spec.model_dump(exclude={"name", "attribute"}), "pictures": made.digest()},
        )  # fmt: skip
        means = train(spec.name, {"adapter": adapter}, batch, losses, folder, settings, callback, str(model.device))
    forwards = frozen + spec.steps * spec.batch * 2  # of all steps, also those before an interruption
    return TrainedPairs(adapter, means.get("loss", float("nan")), len(pairs), forwards, time.perf_counter() - began)


def make_buckets(model: Model, pairs: list[Pair]) -> list[Bucket]:
    """The pairs by size, encoded."""
    by_size: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        by_size.setdefault((pair.before.shape[0], pair.before.shape[1]), []).append(pair)
    buckets = []
    for (height, width), same in sorted(by_size.items()):
        before = encode_pictures(model.vae, torch.from_numpy(np.stack([pair.before for pair in same])))
        after = encode_pictures(model.vae, torch.from_numpy(np.stack([pair.after for pair in same])))
        magnitudes = torch.tensor([pair.magnitude for pair in same])
        if not bool(torch.isfinite(before).all() & torch.isfinite(after).all()):
            raise UserError("the VAE gives latents that are not finite for these pictures: load the model in fp32")
        buckets.append(Bucket(before, after, magnitudes, Predictor(model, height, width)))
    return buckets


class PairPoints:
    """What the U-Net is asked, and what it is to say. Point i of a bucket depends on the spec's seed and i alone."""

    def __init__(self, model: Model, buckets: list[Bucket], spec: PairSpec) -> None:
        self.buckets, self.spec = buckets, spec
        self.alpha_bar = alphas_cumprod(model)
        total = sum(len(bucket.before) for bucket in buckets)
        self.kept = [max(len(b.before), round(spec.points * len(b.before) / total)) for b in buckets]
        self.predicts = str(model.scheduler_config.get("prediction_type", "epsilon"))
        if self.predicts not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.predicts!r}: sliders are trained for epsilon and v_prediction")
        self.targets: list[Tensor] = []  # noise wanted at each kept point of each bucket [2, points, c, h, w]
        if spec.objective == "difference":
            for number, (bucket, count) in enumerate(zip(buckets, self.kept, strict=True)):
                x, timesteps, texts, _, _ = self._noised(number, list(range(count)))
                said = bucket.predictor.frozen(x, timesteps, texts)
                after, before = self._as_noise(said, x, timesteps).chunk(2)
                shift = spec.eta * (after - before) / 2
                self.targets.append(torch.stack([after - shift, before + shift]))

    def digest(self) -> list[float]:
        """What identifies the pictures, for a run that resumes."""
        return [round(float(side.double().sum()), 4) for b in self.buckets for side in (b.before, b.after)]

    def rows(self, bucket: int, indices: list[int]) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
        """x_t [2n, c, h, w] (after, then before), time steps [2n], texts, scales [2n], targets [2n, c, h, w]."""
        x, timesteps, texts, scales, noise = self._noised(bucket, indices)
        if self.spec.objective == "noise":
            target = noise.repeat(2, 1, 1, 1)
        else:
            target = self.targets[bucket][:, indices].flatten(0, 1)
        return x, timesteps, texts, scales, self._as_output(target, x, timesteps)

    def _as_noise(self, output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """eps of the model's output; of v (arXiv 2202.00512) it is sqrt(a) v + sqrt(1 - a) x_t."""
        a = self.alpha_bar[timesteps].view(-1, 1, 1, 1)
        return output if self.predicts == "epsilon" else a.sqrt() * output + (1 - a).sqrt() * x

    def _as_output(self, noise: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """The inverse of `_as_noise`."""
        a = self.alpha_bar[timesteps].view(-1, 1, 1, 1)
        return noise if self.predicts == "epsilon" else (noise - (1 - a).sqrt() * x) / a.sqrt()

    def _noised(self, bucket: int, indices: list[int]) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
        chosen = self.buckets[bucket]
        drawn = [self._draw(bucket, i) for i in indices]
        rows = torch.tensor([row for row, _, _, _ in drawn])
        timesteps = torch.tensor([t for _, t, _, _ in drawn])
        texts = ["" if bare else self.spec.prompt for _, _, bare, _ in drawn]
        noise = torch.stack([n for _, _, _, n in drawn])
        level, m = self.alpha_bar[timesteps], chosen.magnitudes[rows]
        x = torch.cat([add_noise(side[rows], noise, level) for side in (chosen.after, chosen.before)])
        return x, timesteps.repeat(2), texts * 2, torch.cat([m, -m]), noise

    def _draw(self, bucket: int, index: int) -> tuple[int, int, bool, Tensor]:
        """(pair, time step, whether without prompt, noise)"""
        chosen = self.buckets[bucket]
        generator = torch.Generator().manual_seed((self.spec.seed * 7919 + bucket) * 1_000_003 + index)
        share, bare = torch.rand(2, generator=generator).tolist()
        # time steps by the golden ratio: any stretch of points covers them evenly
        timestep = int((index * 0.6180339887498949 + share / 64) % 1 * self.spec.start)
        noise = torch.randn(chosen.before.shape[1:], generator=generator)
        return index % len(chosen.before), min(timestep, 999), bare < self.spec.unconditional, noise
