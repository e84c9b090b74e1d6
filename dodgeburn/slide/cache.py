"""What sliders of one class share: clean latents, noised points on them, and the frozen model's predictions there.

Clean latents are sampled once, without any slider, and noised anew to any time step: the network is told exactly the
noise level that there is, and no partial denoising is repeated at every training step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dodgeburn.models.model import Model
from dodgeburn.models.quick import quick_products
from dodgeburn.sampling.loop import GenerateSettings, Step, generate
from dodgeburn.sampling.predict import Predictor, add_noise, alphas_cumprod
from dodgeburn.slide.spec import SliderSpec


@dataclass
class Points:
    """n noised latents: `x` [n, c, h, w] at `timesteps` int64 [n]; the context (preserved attribute) and the text that
    the trained U-Net is given; `neutral` [n, c, h, w] is the frozen prediction for that text.
    """

    x: Tensor
    timesteps: Tensor
    contexts: list[str]
    texts: list[str]
    neutral: Tensor


def clean_latents(model: Model, texts: list[str], seeds: list[int], settings: GenerateSettings) -> Tensor:
    """Sampled latents [n, c, h, w] on the CPU, not decoded."""
    found: dict[int, Tensor] = {}

    def keep(step: Step) -> list[bool] | None:
        if step.i + 1 < step.total:
            return None
        for row, index in enumerate(step.indices):
            found[index] = step.denoised[row].clone().cpu()
        return [False] * len(step.indices)  # nothing is decoded

    with quick_products(model):
        generate(model, texts, seeds, settings, keep)
    return torch.stack([found[i] for i in range(len(texts))])


def make_points(model: Model, predictor: Predictor, spec: SliderSpec) -> Points:
    """The class's points, from the spec's target, preserved attributes and seed alone."""
    generator = torch.Generator().manual_seed(spec.seed)
    contexts = list(spec.preserve) or [""]
    of_latents = [contexts[i % len(contexts)] for i in range(spec.latents)]
    texts = [spec.prompts(context)[0] for context in of_latents]
    settings = GenerateSettings(steps=spec.latent_steps, guidance=spec.guidance, sampler="dpmpp_2m")
    clean = clean_latents(model, texts, [spec.seed * 10_000 + i for i in range(spec.latents)], settings)
    predictor.forwards += spec.latents * spec.latent_steps * (1 if spec.guidance == 1 else 2)
    n = spec.points
    which = torch.arange(n) % spec.latents
    # Evenly spread time steps, one a stratum, in a random order.
    strata = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    timesteps = (strata * spec.start).long().clamp(0, 999)
    noise = torch.randn(n, *clean.shape[1:], generator=generator)
    x = add_noise(clean[which], noise, alphas_cumprod(model)[timesteps])
    point_contexts = [of_latents[int(i)] for i in which]
    empty = torch.rand(n, generator=generator) < spec.unconditional
    asked = ["" if bare else spec.prompts(context)[0] for context, bare in zip(point_contexts, empty, strict=True)]
    return Points(x, timesteps, point_contexts, asked, predictor.frozen(x, timesteps, asked, quick=True))


def directions(predictor: Predictor, points: Points, spec: SliderSpec) -> Tensor:
    """eps(positive) - eps(negative) at every point, the mean over the preserved attributes taken there: [n, c, h, w].

    Concept Sliders (arXiv 2311.12092), eq. 8: over preserved attributes p, eps(x_t, (c+, p)) - eps(x_t, (c-, p)).
    Each point has its own attribute first, then the next ones of the list up to `spec.contexts`. Not in bf16, whose
    rounding would be 8 % of so small a difference (root mean square, smile).
    """
    order = list(dict.fromkeys(points.contexts))
    total = torch.zeros_like(points.x)
    count = min(spec.contexts, len(order))
    for shift in range(count):
        contexts = [order[(order.index(c) + shift) % len(order)] for c in points.contexts]
        plus = [spec.prompts(c)[1] for c in contexts]
        minus = [spec.prompts(c)[2] for c in contexts]
        both = predictor.frozen(points.x.repeat(2, 1, 1, 1), points.timesteps.repeat(2), plus + minus)
        total += both[: len(total)] - both[len(total) :]
    return total / count
