"""Watches pictures while they are denoised: after each U-Net call, everything that an estimator may look at.

The same observer stands behind `artifacts collect` and behind early stopping, so that what is estimated from is what
was trained on. It hangs on the sampler's step callback, and follows pictures that are taken out of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional as F

from dodgeburn.foresee.features import Probe, map_stages, stages_of
from dodgeburn.foresee.shards import Space
from dodgeburn.models.model import Model
from dodgeburn.sampling.loop import Step

SCALARS: tuple[str, ...] = (
    "log_snr",  # ln(alpha_bar / (1 - alpha_bar))
    "progress",  # U-Net calls done, as a share of all
    "guidance",  # the guidance scale; 1 where there was none in this step
    "guidance_difference",  # rms of (noise with the prompt - noise without)
    "guidance_sum",  # the same summed over the steps so far (arXiv 2505.23343 rejects by it)
    "x0_change",  # rms of the estimate's change since the step before; 0 in the first
    "x0_variance",  # variance of the estimate over the steps so far, mean over the picture (arXiv 2406.09358)
    "high_frequency",  # share of the estimate's variance that 2 x 2 averages lose
    "x0_min",
    "x0_max",
    "x0_std",
    "output_rms",  # rms of the model's output with the prompt
)
"""Numbers of a trajectory at one moment, fp32, in this order."""


@dataclass
class Seen:
    """n pictures at one step, as tensors on the CPU ([n, ...], fp32).

    What was not wanted (`Observer`) is empty: cond, delta, near and far have no elements then.
    """

    indices: tuple[int, ...]  # positions in the prompts given to the sampler
    i: int  # 0-based step
    total: int
    progress: float
    log_snr: float
    x_t: Tensor  # [n, c, h, w]
    x0: Tensor  # [n, c, h, w]
    cond: Tensor  # [n, f]
    delta: Tensor  # [n, f]
    scalars: Tensor  # [n, len(SCALARS)]
    near: Tensor  # [n, c, h, w], the last up block's map with the prompt
    far: Tensor  # [n, c, h / 2, w / 2], that of the block before


def space_of(model: Model) -> Space:
    """The space of a model's observations."""
    unet = model.unet
    return Space(
        stages_of(unet), SCALARS, int(unet.config["in_channels"]), model.layout.name, map_stages(unet)
    )  # fmt: skip


def log_snr(sigma: float) -> float:
    """Of a variance-exploding noise level: ln(1 / sigma^2)."""
    return -2 * math.log(max(sigma, 1e-8))


def high_frequency(x: Tensor) -> Tensor:
    """Share of the variance of x [n, c, h, w] that averaging 2 x 2 pixels loses: 0 smooth, 0.75 white noise; [n]."""
    smooth = F.avg_pool2d(x, 2)
    whole = x.var((2, 3), correction=0).sum(1)
    return 1 - smooth.var((2, 3), correction=0).sum(1) / whole.clamp_min(1e-12)


def rms(x: Tensor) -> Tensor:
    """Root mean square of each row of [n, ...]; [n]."""
    return x.flatten(1).square().mean(1).sqrt()


class Observer:
    """`with Observer(model, guidance) as observer:` and call `observer(step)` in the sampler's callback.

    Call it at every step, so that running figures are right. One observer serves one `generate` call after another.
    wanted: of (0-based step, steps in all), whether features and maps are to be had there; none: everywhere. features,
    maps: whether they are wanted at all.
    """

    def __init__(
        self, model: Model, guidance: float, wanted: Callable[[int, int], bool] | None = None, features: bool = True,
        maps: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.guidance = model, guidance
        self.wanted = wanted or (lambda i, total: True)
        self.features, self.maps = features, maps
        self.space = space_of(model)
        self.probe = Probe(model.unet)
        self.probe.pool = features
        self._past: dict[int, _Past] = {}

    def __enter__(self) -> Observer:
        self.probe.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.probe.__exit__(kind, error, trace)
        self._past.clear()

    def __call__(self, step: Step) -> Seen:
        """What is to be seen after this step's U-Net call."""
        x0 = step.denoised.float()
        n = len(x0)
        output = self.probe.output
        assert output is not None
        guided = len(output) == 2 * n
        blocks = self._blocks(n, guided, self.wanted(step.i, step.total))
        positive = output[-n:].float()
        difference = rms(positive - output[:n].float()) if guided else torch.zeros(n, device=x0.device)
        summed, change, variance = self._follow(step, x0, difference)
        level, progress = log_snr(step.sigma), (step.i + 1) / step.total
        flat = x0.flatten(1)
        constant = [torch.full((n,), v, device=x0.device)
                    for v in (level, progress, self.guidance if guided else 1.0)]  # fmt: skip
        scalars = torch.stack(
            [*constant, difference, summed, change, variance, high_frequency(x0), flat.amin(1), flat.amax(1),
             flat.std(1), rms(positive)], 1,
        )  # fmt: skip
        # The blocks are asked in the call that comes: at the first step of a batch, which can't be told, always.
        last = step.i + 1 == step.total
        self.probe.on = (self.features or self.maps) and (last or self.wanted(step.i + 1, step.total))
        cond, delta, near, far = blocks
        found = [t.detach().float().cpu() for t in (step.latents, x0, cond, delta, scalars, near, far)]
        return Seen(step.indices, step.i, step.total, progress, level, *found)

    def _blocks(self, n: int, guided: bool, wanted: bool) -> list[Tensor]:
        """Features with the prompt, their difference to those without, and both maps; empty ones if not wanted."""
        found = [torch.zeros(n, 0)] * 4
        if wanted and self.features:
            features = self.probe.features
            found[:2] = [features[-n:], features[-n:] - features[:n] if guided else torch.zeros_like(features)]
        if wanted and self.maps:
            maps = self.probe.maps(n)
            found[2 : 2 + len(maps)] = maps
        return found

    def _follow(self, step: Step, x0: Tensor, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Running sum of the guidance difference, change of x0 since the last step, variance of x0 so far; each [n]."""
        past = self._past.get(step.batch)
        if past is None or step.i == 0:
            self._past = {step.batch: (past := _Past.begin(step, x0))}
        past.keep(step.indices)
        past.steps += 1
        change = rms(x0 - past.x0) if past.steps > 1 else torch.zeros(len(x0), device=x0.device)
        past.summed = past.summed + difference
        off = x0 - past.mean  # Welford's running variance
        past.mean = past.mean + off / past.steps
        past.squares = past.squares + off * (x0 - past.mean)
        past.x0 = x0
        return past.summed, change, past.squares.flatten(1).mean(1) / past.steps


@dataclass
class _Past:
    indices: tuple[int, ...]
    steps: int
    x0: Tensor
    mean: Tensor
    squares: Tensor
    summed: Tensor

    @staticmethod
    def begin(step: Step, x0: Tensor) -> _Past:
        zeros = torch.zeros_like(x0)
        return _Past(step.indices, 0, zeros, zeros, zeros, torch.zeros(len(x0), device=x0.device))

    def keep(self, indices: tuple[int, ...]) -> None:
        """Go on with these pictures."""
        if indices == self.indices:
            return
        rows = torch.tensor([self.indices.index(i) for i in indices], device=self.x0.device, dtype=torch.int64)
        self.x0, self.mean, self.squares, self.summed = (
            t[rows] for t in (self.x0, self.mean, self.squares, self.summed)
        )  # fmt: skip
        self.indices = indices
