"""Pairs as training sees them: encoded once, then point i is a pair, a time step and a noise, shared by both pictures.

Point i depends on the seed and on i alone. Time steps follow the golden ratio, so any stretch of points covers them
evenly; pairs come in an order that is drawn anew for every round. A flip is drawn for the pair, not for each picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dodgeburn.errors import UserError
from dodgeburn.images.opening import cropped, fitted
from dodgeburn.models.latents import encode_pictures
from dodgeburn.models.model import Model
from dodgeburn.rework.dpo.pairs import PreferencePairs
from dodgeburn.sampling.predict import Predictor, add_noise, alphas_cumprod

GOLDEN = 0.6180339887498949
ENCODED_AT_ONCE = 32  # pairs
TEXT_BYTES = 1 << 30  # of encoded captions kept
MOST_SIGMA = 16.0  # that an error is multiplied by: a little above Stable Diffusion's largest (14.6)


@dataclass(frozen=True)
class PairBucket:
    """Pairs whose pictures have one size: latents [pairs, c, h, w], with flips those of the mirrored pictures too."""

    winners: Tensor
    losers: Tensor
    mirrored: tuple[Tensor, Tensor] | None
    captions: list[str]
    weights: Tensor  # [pairs]
    predictor: Predictor

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Rows:
    """A batch: winners first, then losers of the same n pairs; `noise`, `timesteps` and `texts` count 2n as well."""

    bucket: int
    points: list[int]
    x: Tensor  # noised latents [2n, c, h, w]
    noise: Tensor
    clean: Tensor
    timesteps: Tensor  # int64 [2n]
    texts: list[str]
    weights: Tensor  # [n]

    def halves(self) -> tuple[Rows, Rows]:
        """The winners and the losers, as batches of n samples each (the points and weights are those of the pairs)."""
        n = len(self.points)
        first, second = (
            replace(
                self, x=self.x[s], noise=self.noise[s], clean=self.clean[s], timesteps=self.timesteps[s],
                texts=self.texts[s],
            )
            for s in (slice(0, n), slice(n, None))
        )  # fmt: skip
        return first, second


def encode_pairs(model: Model, pairs: PreferencePairs, flips: bool = False, guidance: float = 1.0) -> list[PairBucket]:
    """The pairs by size, each scaled to about the model's own area, encoded by its VAE; asked with this guidance.

    Raises UserError if the VAE gives values that are not finite.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(pairs):
        height, width = pair.pixels()[0].shape[:2]
        size = fitted(width, height, model.native_size**2, model.vae_factor)
        by_size.setdefault(size, []).append(i)
    buckets = []
    for (width, height), members in sorted(by_size.items()):
        sides: list[list[Tensor]] = [[], [], [], []]
        for start in range(0, len(members), ENCODED_AT_ONCE):
            pixels: list[list[np.ndarray]] = [[], []]
            for i in members[start : start + ENCODED_AT_ONCE]:
                for side, picture in zip(pixels, pairs.pairs[i].pixels(), strict=True):
                    side.append(_sized(picture, width, height))
            stacks = [torch.from_numpy(np.stack(side)) for side in pixels]
            if flips:
                stacks += [stack.flip(2) for stack in stacks]
            for encoded, stack in zip(sides, stacks, strict=False):
                encoded.append(encode_pictures(model.vae, stack))
        latents = [torch.cat(side) for side in sides if side]
        if not all(bool(torch.isfinite(side).all()) for side in latents):
            raise UserError("the VAE gives latents that are not finite for these pictures: load the model in fp32")
        chosen = [pairs.pairs[i] for i in members]
        buckets.append(
            PairBucket(
                latents[0], latents[1], (latents[2], latents[3]) if flips else None,
                [pair.caption for pair in chosen], torch.tensor([pair.weight for pair in chosen]),
                Predictor(model, height, width, guidance=guidance, text_bytes=TEXT_BYTES),
            )
        )  # fmt: skip
    return buckets


def _sized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return cropped(Image.fromarray(picture), (width, height))


class PairPoints:
    """Points of encoded pairs, and the errors of predictions at them.

    dropout: share of points with the empty caption. start, end: time steps from `end` to below `start` are drawn.
    emphasis: squared errors of the noise count times sigma^emphasis, sigma = sqrt(1 - a) / sqrt(a), a = alpha_bar. At 0
    they are the noise's, as in the papers; at 2 those of the clean latents that follow from it, so that noisy time
    steps, where the layout, light and colour of a picture are decided and errors of the noise are small, count most.
    """

    def __init__(
        self, model: Model, buckets: list[PairBucket], seed: int = 0, dropout: float = 0.0, start: int = 1000,
        end: int = 0, emphasis: float = 0.0,
    ) -> None:  # fmt: skip
        self.buckets, self.seed, self.dropout, self.start, self.end = buckets, seed, dropout, start, end
        self.emphasis = emphasis
        self.alpha_bar = alphas_cumprod(model)
        kind = model.scheduler_config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"{model.name} predicts {kind}: preferences can be trained where noise or v is predicted")
        self.predicts_v = kind == "v_prediction"
        self._orders: dict[tuple[int, int], list[int]] = {}

    def encode_all(self) -> None:
        """Encode every caption now: text encoders aren't needed afterwards."""
        for bucket in self.buckets:
            bucket.predictor.encode(bucket.captions, alone=True)

    def draw(self, generator: torch.Generator) -> int:
        """A bucket, by its number of pairs. With one there is nothing to draw."""
        if len(self.buckets) == 1:
            return 0
        sizes = torch.tensor([float(len(bucket)) for bucket in self.buckets])
        return int(torch.multinomial(sizes, 1, generator=generator))

    def rows(self, bucket: int, points: Sequence[int]) -> Rows:
        """The batch of these points."""
        chosen = self.buckets[bucket]
        drawn = [self._point(bucket, i) for i in points]
        pairs = torch.tensor([pair for pair, _, _, _, _ in drawn])
        timesteps = torch.tensor([t for _, t, _, _, _ in drawn]).repeat(2)
        texts = ["" if bare else chosen.captions[pair] for pair, _, bare, _, _ in drawn]
        chosen.predictor.encode(texts, alone=True)
        noise = torch.stack([n for _, _, _, _, n in drawn]).repeat(2, 1, 1, 1)
        clean = torch.cat([chosen.winners[pairs], chosen.losers[pairs]])
        if chosen.mirrored is not None:
            flipped = torch.tensor([flip for _, _, _, flip, _ in drawn]).repeat(2).view(-1, 1, 1, 1)
            clean = torch.where(flipped, torch.cat([side[pairs] for side in chosen.mirrored]), clean)
        x = add_noise(clean, noise, self.alpha_bar[timesteps])
        return Rows(bucket, list(points), x, noise, clean, timesteps, texts * 2, chosen.weights[pairs])

    def residuals(self, rows: Rows, said: Tensor) -> Tensor:
        """Predicted minus true noise [2n, c, h, w], from the U-Net's output, times sigma^(emphasis / 2).

        Where it predicts v (arXiv 2202.00512: v = sqrt(a) noise - sqrt(1 - a) x_0, a = alpha_bar), its error times
        sqrt(a) is that of the noise which follows from it.
        """
        noise = rows.noise.to(said.device)
        a = self.alpha_bar[rows.timesteps].view(-1, 1, 1, 1).to(said.device)
        if self.predicts_v:
            error = a.sqrt() * (said - (a.sqrt() * noise - (1 - a).sqrt() * rows.clean.to(said.device)))
        else:
            error = said - noise
        if not self.emphasis:
            return error
        return error * ((1 - a) / a).sqrt().clamp(max=MOST_SIGMA) ** (self.emphasis / 2)

    def _point(self, bucket: int, index: int) -> tuple[int, int, bool, bool, Tensor]:
        """(pair, time step, whether without caption, whether flipped, noise)"""
        chosen = self.buckets[bucket]
        generator = torch.Generator().manual_seed((self.seed * 7919 + bucket) * 1_000_003 + index)
        share, bare, flip = torch.rand(3, generator=generator).tolist()
        timestep = self.end + int((index * GOLDEN + share / 64) % 1 * (self.start - self.end))
        noise = torch.randn(chosen.winners.shape[1:], generator=generator)
        turn, place = divmod(index, len(chosen))
        return self._order(bucket, turn)[place], min(timestep, 999), bare < self.dropout, flip < 0.5, noise

    def _order(self, bucket: int, turn: int) -> list[int]:
        key = bucket, turn
        if key not in self._orders:
            if len(self._orders) > 8:
                self._orders.clear()
            generator = torch.Generator().manual_seed(self.seed * 104_729 + bucket * 1_299_709 + turn)
            self._orders[key] = torch.randperm(len(self.buckets[bucket]), generator=generator).tolist()
        return self._orders[key]
